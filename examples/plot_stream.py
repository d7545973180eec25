"""
A stream that does not stop changing
====================================

Handwritten digits, whose pixels are permuted anew for every task. The network is never reset: it meets one task after
the other, each image once. Plain backprop gets worse at it; with continual backprop it does not. This is a small
version of what ``cbp-fast demo`` does with three seeds and three step sizes.
"""

# %%
# The stream: 1,797 images of 8 x 8 pixels, in batches of 16.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import cbp_fast

torch.set_num_threads(1)
TASKS, BATCH = 40, 16
digits = load_digits()
images = torch.tensor(digits.data, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)


def task(generator):
    """Batches of one task: pixels in an order of their own, images in an order of their own."""
    pixels = torch.randperm(64, generator=generator)
    order = torch.randperm(len(images), generator=generator)
    x, y = images[order][:, pixels], labels[order]
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))[:-1]


# %%
# One run. Accuracy is measured on every batch before the update on it, so that it tells how fast the task is learnt.
# The only line that differs between the two runs is the one that attaches.


def run(continual, step_size=2e-3, seed=0):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, 100),
        nn.ReLU(),
        nn.Linear(100, 100),
        nn.ReLU(),
        nn.Linear(100, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=step_size)
    cbp = None
    if continual:
        cbp = cbp_fast.ContinualBackprop(
            model, optimizer, replacement_rate=1e-3, maturity_threshold=100
        )
    accuracy = []
    for _ in range(TASKS):
        right = 0
        batches = task(generator)
        for x, y in batches:
            scores = model(x)
            right += (scores.argmax(1) == y).sum().item()
            loss = F.cross_entropy(scores, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracy.append(right / (len(batches) * BATCH))
    return accuracy, cbp


plain, _ = run(continual=False)
continual, cbp = run(continual=True)

# %%
# Mean accuracy over the first and the last ten tasks, and how many units were replaced in each layer of 100:

for name, accuracy in (("backprop", plain), ("continual backprop", continual)):
    print(f"{name:20} {sum(accuracy[:10]) / 10:.3f} -> {sum(accuracy[-10:]) / 10:.3f}")
print(cbp.num_replaced)

# %%

figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
axes.plot(plain, label="backprop")
axes.plot(continual, label="continual backprop")
axes.set(xlabel="task", ylabel="online accuracy")
axes.legend()
plt.show()

# %%
# One seed and one step size are an illustration. What holds over seeds and step sizes, and how the compared step size
# was chosen, is in :doc:`/performance`.
