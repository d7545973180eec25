"""Peak memory of accumulated micro-batches with and without continual backprop, each run in a process of its own.

python benchmarks/memory.py [--write]

What is compared is the resident memory of the process at its peak, 16 micro-batches to a step, a few steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbp_fast import ContinualBackprop
from cbp_fast.cli.info import versions

RESULTS = Path(__file__).parent / "results" / "memory.json"
_MICRO_BATCHES, _STEPS = 16, 3


class LastStep(nn.Module):
    """A reader that sees a small view of a large activation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(8, 64, 3, padding=1), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """The last time step of a convolution, read by a linear layer."""
        return self.head(F.relu(self.conv(x))[:, :, -1])


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def _convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


CASES = {
    "MLP 2 x 1024, batch 32": (_mlp, (32, 256)),
    "conv net 32, 64 @ 32 x 32, batch 32": (_convolutions, (32, 3, 32, 32)),
    "last of 2048 time steps, 64 channels, batch 32": (LastStep, (32, 8, 2048)),
}
CAPTURES = ("none", "auto", "deferred", "inline")


def run(name: str, capture: str) -> None:
    """Train one case, and print the peak in KiB."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make, shape = CASES[name]
    model = make()
    optimizer = torch.optim.Adam(model.parameters())
    # the groups are found in both, so that what finding them takes is no difference
    cbp = ContinualBackprop(model, optimizer, example_inputs=torch.randn(2, *shape[1:]), capture="auto")
    cbp.remove()
    if capture != "none":
        ContinualBackprop(model, optimizer, groups=cbp.groups, capture=capture)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        for _ in range(_MICRO_BATCHES):
            model(torch.randn(shape)).square().mean().backward()
        optimizer.step()
    # in KiB on Linux
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    """Measures every case with every capture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace {RESULTS.name}")
    parser.add_argument("--run", nargs=2, metavar=("CASE", "CAPTURE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run(*args.run)
        return
    found: dict[str, dict[str, float]] = {}
    print(f"{'peak MiB, and MiB more than without':50} " + " ".join(f"{capture:>10}" for capture in CAPTURES))
    for name in CASES:
        peaks = {}
        for capture in CAPTURES:
            command = [sys.executable, __file__, "--run", name, capture]
            peaks[capture] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024
        found[name] = {capture: round(peak, 1) for capture, peak in peaks.items()}
        more = [f"{peaks['none']:10.1f}", *(f"{peaks[capture] - peaks['none']:+10.1f}" for capture in CAPTURES[1:])]
        print(f"{name:50} " + " ".join(more), flush=True)
    if args.write:
        about = {**versions(), "micro-batches": _MICRO_BATCHES}
        RESULTS.write_text(json.dumps({"about": about, "peak MiB": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
