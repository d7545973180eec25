"""
Is plasticity lost? Measure before
==================================

Attached with a ``replacement_rate`` of 0, continual backprop replaces nothing and watches: a monitor then shows whether
a network has what it is a remedy for. Here it is plain backprop on permuted digits, at a large step size.
"""

# %%

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import cbp_fast
from cbp_fast import metrics

torch.set_num_threads(1)
torch.manual_seed(0)
TASKS, BATCH = 25, 16
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)

model = nn.Sequential(
    nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)
)
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
cbp = cbp_fast.ContinualBackprop(model, optimizer, replacement_rate=0)
steps_a_task = len(images) // BATCH
monitor = metrics.Monitor(cbp, every=steps_a_task)

ranks = []
for _ in range(TASKS):
    x, order = images[:, torch.randperm(64)], torch.randperm(len(images))
    for batch in order[: steps_a_task * BATCH].split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), labels[batch]).backward()
        optimizer.step()
        monitor.step()
    with torch.no_grad():
        ranks.append(metrics.effective_rank(model[:-1](x)).item())

# %%
# The monitor has one measurement a task, of its last batch. Of 16 samples a rank is at most 16, and says little; so that
# of the last hidden layer is taken on all images of the task as well. What points at lost plasticity: dormant units and
# the size of the weights rise, the rank falls.

for name in ("0", "2", "4"):
    first, last = (monitor.history[i]["groups"][name]["dormant"] for i in (0, -1))
    print(f"layer {name}: dormant on 16 images {first:.2f} -> {last:.2f}")
weights = [measurement["weight_magnitude"] for measurement in monitor.history]
print(f"mean weight magnitude {weights[0]:.3f} -> {weights[-1]:.3f}")
print(f"effective rank of the last hidden layer {ranks[0]:.1f} -> {ranks[-1]:.1f}")

# %%
# The history is plain numbers, which ``json.dump`` takes; ``metrics.plot`` draws it, and ``figure.savefig`` writes the
# picture.

figure = metrics.plot(monitor.history)
