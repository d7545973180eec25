"""What an installed cbp_fast has to do anywhere, with PyTorch alone: one line that says where it ran and what came out.

Weights and activations are small whole numbers, so that PyTorch's own sums are exact, and what came out is the same on
every CPU, instruction set, Python and PyTorch.
"""

import hashlib
import platform

import torch
from torch import nn

import cbp_fast
from cbp_fast import _C


def whole_numbers(step, *shape):
    return ((torch.arange(torch.Size(shape).numel()) * 7919 + step * 104729) % 11 - 5).float().reshape(shape)


def run(rule, backend):
    """All that eight steps leave behind: weights, utilities, ages, replaced units."""
    first = [nn.Linear(40, 20)]
    if rule == "nature":
        first = [nn.Unflatten(1, (1, 4, 10)), nn.Conv2d(1, 5, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*first, nn.ReLU(), nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))
    cbp = cbp_fast.ContinualBackprop(
        model, rule=rule, backend=backend, replacement_rate=0.1, maturity_threshold=1, decay_rate=0.5, seed=3
    )
    found = []
    for step in range(8):
        with torch.no_grad():
            for i, parameter in enumerate(model.parameters()):
                parameter.copy_(whole_numbers(step + i, *parameter.shape))
        model(whole_numbers(step, 6, 40))
        cbp.step()
        for group in cbp.groups:
            found += [cbp.utility[group.name], cbp.age[group.name], cbp.last_replaced[group.name]]
        found += list(model.parameters())
    assert all(cbp.num_replaced.values())
    return [tensor.detach().clone() for tensor in found]


def train():
    """The optimizer's hook: continual backprop runs by itself."""
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 5))
    optimizer = torch.optim.Adam(model.parameters())
    cbp = cbp_fast.ContinualBackprop(model, optimizer, replacement_rate=0.1, maturity_threshold=2)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
    assert all(cbp.num_replaced.values())
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def main():
    train()
    digests = set()
    picked = _C.get_isa()
    for name in _C.isa_levels():
        _C.set_isa(name)
        digest = hashlib.sha256()
        for rule in ("nature", "gnt", "clarena"):
            found = run(rule, "cpp")
            for tensor, expected in zip(found, run(rule, "reference"), strict=True):
                torch.testing.assert_close(tensor, expected)
                digest.update(bytes(tensor.reshape(-1).view(torch.uint8).tolist()))
        digests.add(digest.hexdigest()[:16])
    assert len(digests) == 1, f"results depend on the instruction set: {digests}"
    print(
        f"cbp_fast {cbp_fast.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}: {picked} of {', '.join(_C.isa_levels())}; results {digests.pop()}"
    )


if __name__ == "__main__":
    main()
