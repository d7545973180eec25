"""One step on a GPU: time, bytes a second and share of the measured copy bandwidth, beside the reference.

python benchmarks/gpu.py    # writes benchmarks/results/gpu_<device>.json
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import triton
from torch import nn
from torch.nn.utils import skip_init

from cbp_fast import ContinualBackprop, UnitGroup
from cbp_fast.bench.step import compiled_select

RESULTS = Path(__file__).parent / "results"


class Net(NamedTuple):
    depth: int
    width: int
    hidden: int  # 0: a chain of layers as wide as each other; else blocks of width -> hidden -> width
    samples: int
    dtype: torch.dtype


NETS = {
    "3 x 1024": Net(3, 1024, 0, 256, torch.float32),
    "12 x 4096": Net(12, 4096, 0, 256, torch.float32),
    "MLPs of a transformer of 1.3 billion": Net(24, 2048, 8192, 4096, torch.bfloat16),
}


def build(net: Net, device: str) -> tuple[list[nn.Linear], list[UnitGroup], list[torch.Tensor]]:
    """Layers, groups and one batch of activations for each group, with nothing in them yet."""
    options = {"device": device, "dtype": net.dtype, "bias": False}
    if net.hidden:
        pairs = [
            (
                skip_init(nn.Linear, net.width, net.hidden, **options),
                skip_init(nn.Linear, net.hidden, net.width, **options),
            )
            for _ in range(net.depth)
        ]
        layers = [layer for pair in pairs for layer in pair]
    else:
        layers = [skip_init(nn.Linear, net.width, net.width, **options) for _ in range(net.depth + 1)]
        pairs = list(itertools.pairwise(layers))
    groups = [UnitGroup(f"{i}", a, b) for i, (a, b) in enumerate(pairs)]
    held = [torch.empty(net.samples, b.in_features, device=device, dtype=net.dtype) for _, b in pairs]
    return layers, groups, held


def seconds(step: Callable[[], None], repeats: int = 30) -> float:
    """Median time of one call on the device, after a warm-up."""
    for _ in range(5):
        step()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # what the last call left in the cache is not there for this one in training
        FLUSH.zero_()
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times)


def measure(net: Net, device: str = "cuda") -> dict[str, float]:
    """Seconds of a step on each backend, and what it has to read."""
    layers, groups, held = build(net, device)
    for tensor in (*(layer.weight.data for layer in layers), *held):
        tensor.normal_()
    model = nn.ModuleList(layers)
    times = {}
    for backend in ("triton", "reference"):
        cbp = ContinualBackprop(model, groups=groups, backend=backend, capture="deferred", maturity_threshold=1)
        engine = cbp._engine

        def step(cbp: ContinualBackprop = cbp, engine: object = engine) -> None:
            for slot, h in enumerate(held):
                engine.record(slot, h)
            cbp.step()

        times[backend] = seconds(step)
        if backend == "reference":
            select = compiled_select(cbp)

            def run(engine: object = engine, select: object = select) -> None:
                for slot, h in enumerate(held):
                    engine.record(slot, h)
                select()
                engine.finish()

            times["compiled reference"] = seconds(run)
        cbp.remove()
    outgoing = {id(w): w for w in (layer.weight for layer in (layers[1::2] if net.hidden else layers[1:]))}
    times["bytes"] = sum(t.nbytes for t in (*outgoing.values(), *held))
    return times


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


if __name__ == "__main__":
    FLUSH = torch.empty(2**26, device="cuda")
    device, bandwidth = torch.cuda.get_device_name(), copy_bandwidth()
    found = {"device": device, "torch": torch.__version__, "triton": triton.__version__, "copy GB/s": bandwidth / 1e9}
    print(f"{device}: a copy runs at {bandwidth / 1e9:.0f} GB/s")
    found["nets"] = {}
    for name, net in NETS.items():
        times = found["nets"][name] = measure(net)
        rate = times["bytes"] / times["triton"]
        print(
            f"{name}: {times['triton'] * 1e6:.0f} us, {rate / 1e9:.0f} GB/s, "
            f"{100 * rate / bandwidth:.0f} % of the copy; "
            f"reference {times['reference'] * 1e6:.0f} us, compiled {times['compiled reference'] * 1e6:.0f} us"
        )
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"gpu_{re.sub('[^a-z0-9]+', '_', device.lower())}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
