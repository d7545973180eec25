"""
How many units a rate replaces
==============================

``replacement_rate`` counts *mature* units, those older than ``maturity_threshold``. Of N units
N / (1 + rate x threshold) are mature in the long run, so that both numbers decide how many are replaced. Here they are
counted, and compared with the formula.
"""

# %%
# A small network on noise: which units are replaced is of no interest, how many is the same for every network.

import matplotlib.pyplot as plt
import torch
from torch import nn

import cbp_fast

torch.set_num_threads(1)
UNITS, STEPS = 100, 3000


def count(rate, maturity):
    """Units replaced after each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, UNITS), nn.ReLU(), nn.Linear(UNITS, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    cbp = cbp_fast.ContinualBackprop(
        model, optimizer, replacement_rate=rate, maturity_threshold=maturity
    )
    counts, x = [], torch.randn(4, 4)
    for _ in range(STEPS):
        model(x).square().mean().backward()
        optimizer.step()
        counts.append(cbp.num_replaced["0"])
    return counts


# %%
# The dashed lines are the long run's slope, rate x N / (1 + rate x threshold), from the step after which units are
# mature.

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for i, (rate, maturity) in enumerate([(1e-3, 100), (1e-3, 1000), (2e-4, 100)]):
    counts = count(rate, maturity)
    slope = rate * UNITS / (1 + rate * maturity)
    axes.plot(counts, color=f"C{i}", label=f"rate {rate:g}, threshold {maturity}")
    axes.plot([maturity, STEPS], [0, slope * (STEPS - maturity)], f"C{i}--", linewidth=1)
    measured = (counts[-1] - counts[1000]) / (STEPS - 1000)
    print(
        f"rate {rate:g}, threshold {maturity}: {measured:.3f} a step, by the formula {slope:.3f}"
    )
axes.set(xlabel="step", ylabel=f"units replaced, of {UNITS}")
axes.legend()
plt.show()

# %%
# At first all units mature at once, and more fall due than in the long run; with a long threshold they come in waves.
