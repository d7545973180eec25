"""
Is plasticity lost? Measure before
==================================

Attached with a ``replacement_rate`` of 0, continual backprop replaces nothing and watches: a monitor then shows whether
a network has what it is a remedy for. Here it is a network on permuted digits, at a large step size.
"""

# %%

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import cbp_fast
from cbp_fast import metrics

torch.set_num_threads(1)
TASKS, BATCH = 25, 16
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)

steps_a_task = len(images) // BATCH


def watch(rate):
    """A monitor's history; dormant units and rank of the last hidden layer on all images."""
    torch.manual_seed(0)
    hidden = [
        layer for inputs in (64, 100, 100) for layer in (nn.Linear(inputs, 100), nn.ReLU())
    ]
    model = nn.Sequential(*hidden, nn.Linear(100, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    # new weights as nn.Linear draws its own
    rule = cbp_fast.Rule.nature(init="default")
    cbp = cbp_fast.ContinualBackprop(model, optimizer, rule=rule, replacement_rate=rate)
    monitor = metrics.Monitor(cbp, every=steps_a_task)
    dormant, ranks = [], []
    for _ in range(TASKS):
        x, order = images[:, torch.randperm(64)], torch.randperm(len(images))
        for batch in order[: steps_a_task * BATCH].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), labels[batch]).backward()
            optimizer.step()
            monitor.step()
        with torch.no_grad():
            h = model[:-1](x)
        dormant.append(metrics.dormant_units(h).float().mean().item())
        ranks.append(metrics.effective_rank(h).item())
    return monitor.history, dormant, ranks


# %%
# Once without any replacement, once with it.

plain, plain_dormant, plain_ranks = watch(rate=0)
continual, dormant, ranks = watch(rate=1e-3)


def show(name, before, after):
    """First and last of what was measured in both runs."""
    without, replaced = (f"{m[0]:7.3f} -> {m[-1]:7.3f}" for m in (before, after))
    print(f"{name:22} {without}   with replacement {replaced}")


show("dormant units", plain_dormant, dormant)
show("effective rank", plain_ranks, ranks)
show(
    "mean weight magnitude",
    *([m["weight_magnitude"] for m in history] for history in (plain, continual)),
)

# %%
# Numbers want another run beside them: seen alone, the rank of the plain run would pass for an improvement. And they
# are signs, not the loss: the weights grow with replacement, too, though new ones are drawn at the size of the first,
# which is what ``init="default"`` is for. The default of the rule draws them 2.45 times as large as ``nn.Linear`` does.
#
# The monitor's history is plain numbers, which ``json.dump`` takes; ``metrics.plot`` draws it, and ``figure.savefig``
# writes the picture. This is the run without replacement, whose ages grow without an end. Dormant units and ranks are
# those on the batch of 16 that the monitor saw, where a rank is at most 16: it wants larger batches, or what was done
# above.

figure = metrics.plot(plain)
