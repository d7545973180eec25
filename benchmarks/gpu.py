"""The measurements of `make gpu`, each of which `gpu_run.py` runs as a process of its own.

python benchmarks/gpu.py times    # or facts, sanitizer, order, where, training, options, ncu

In Triton's interpreter (TRITON_INTERPRET=1, --small) all of it runs without a GPU, less what only a GPU can tell.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from torch.nn.utils import skip_init

from cbp_fast import ContinualBackprop, Rule, UnitGroup
from cbp_fast.backends.triton import kernels, launching
from cbp_fast.bench import networks
from cbp_fast.bench.step import compiled_select

DEVICE = "cpu" if triton.knobs.runtime.interpret or not torch.cuda.is_available() else "cuda"
# gpu_ahead.py compiles what is launched here, and launches nothing
AHEAD = bool(os.environ.get("CBP_FAST_COMPILE_FOR"))
KERNELS = ("select", "score", "rank", "reinit", "capture", "hat", "transfer")


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


class Work(NamedTuple):
    """A model, its groups, and for each slot the activations that a step sees."""

    model: nn.Module
    groups: list[UnitGroup]
    held: list[Tensor]


def chain(net: Net) -> Work:
    """The nets above, with numbers in them."""
    layers, groups, held = build(net, DEVICE)
    for tensor in () if AHEAD else (*(layer.weight.data for layer in layers), *held):
        tensor.normal_()
    return Work(nn.ModuleList(layers), groups, held)


def flattened(channels: int, size: int, width: int, samples: int) -> Work:
    """The end of a VGG: a convolution that a wide linear layer reads, and another wide one."""
    conv = skip_init(nn.Conv2d, channels, channels, 3, device=DEVICE)
    one = skip_init(nn.Linear, channels * size * size, width, device=DEVICE)
    two, three = (skip_init(nn.Linear, width, n, device=DEVICE) for n in (width, max(8, width // 4)))
    layers = (conv, one, two, three)
    for layer in layers:
        layer.weight.data.normal_()
        layer.bias.data.zero_()
    groups = [UnitGroup(f"{i}", a, b) for i, (a, b) in enumerate(itertools.pairwise(layers))]
    held = [torch.randn(samples, layer.in_features, device=DEVICE) for layer in layers[1:]]
    return Work(nn.ModuleList(layers), groups, held)


def one_group(inputs: int, units: int, outputs: int, samples: int) -> Work:
    """One hidden layer."""
    a, b = (skip_init(nn.Linear, *n, bias=False, device=DEVICE) for n in ((inputs, units), (units, outputs)))
    for layer in (a, b):
        layer.weight.data.normal_()
    return Work(nn.ModuleList([a, b]), [UnitGroup("0", a, b)], [torch.randn(samples, units, device=DEVICE)])


class Case(NamedTuple):
    """What is timed, and how long the kernels of a step should take together by bytes and latencies (an H100, us)."""

    make: Callable[[], Work]
    expected: tuple[float, float]
    capture: str = "deferred"


def cases(small: bool) -> dict[str, Case]:
    """The shapes; small ones are for the rehearsal."""
    f32, bf16 = torch.float32, torch.bfloat16

    def net(depth: int, width: int, hidden: int, samples: int, dtype: torch.dtype) -> Callable[[], Work]:
        if small:
            depth, width, hidden, samples = 2, 16, hidden and 32, 8
        return lambda: chain(Net(depth, width, hidden, samples, dtype))

    found = {
        "2 x 256, batch 32": Case(net(2, 256, 0, 32, f32), (9, 14)),
        "2 x 256, batch 64": Case(net(2, 256, 0, 64, f32), (9, 14)),
        "2 x 256, batch 2048": Case(net(2, 256, 0, 2048, f32), (9, 16)),
        "3 x 1024, batch 32": Case(net(3, 1024, 0, 32, f32), (16, 22)),
        "3 x 4096, batch 256": Case(net(3, 4096, 0, 256, f32), (105, 125)),
        "12 x 4096, batch 256": Case(net(12, 4096, 0, 256, f32), (330, 370)),
        "GPT-2 small, inline": Case(net(12, 768, 3072, 8192, bf16), (390, 500), "inline"),
        "MLPs of 1.3 billion, bf16": Case(net(*NETS["MLPs of a transformer of 1.3 billion"]), (1100, 1500)),
        "VGG-like, flattened": Case(
            (lambda: flattened(8, 2, 16, 4)) if small else lambda: flattened(512, 7, 4096, 32), (200, 1000)
        ),
        "131,072 units": Case(lambda: one_group(1, 64 if small else 2**17, 1, 32), (6, 1100)),
    }
    return dict(itertools.islice(found.items(), 0, None, 3)) if small else found


class Fit:
    """Whether there is time for more."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def __bool__(self) -> bool:
        return time.monotonic() < self.end


def often(number: int) -> int:
    """So many times on a GPU, and once where nothing is measured."""
    return number if DEVICE == "cuda" else 1


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def flush() -> None:
    """What the last step left in the device's cache is not there for this one in training."""
    if DEVICE == "cuda":
        if not FLUSH:
            FLUSH.append(torch.empty(2**26, device=DEVICE))
        FLUSH[0].zero_()


FLUSH: list[Tensor] = []


def seconds(step: Callable[[], None], repeats: int = 30) -> float:
    """Median time from one call's first work on the device to its last, after a warm-up."""
    for _ in range(5):
        step()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times)


def wall(step: Callable[[], None], repeats: int) -> float:
    """Median seconds of one of so many steps in a row, on the host and the device."""
    times = []
    for _ in range(often(3)):
        synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        synchronize()
        times.append((time.perf_counter() - begin) / repeats)
    return median(times)


def host(step: Callable[[], None], repeats: int) -> float:
    """Least seconds of the host in one of so many steps in a row that nothing waits for."""
    times = []
    for _ in range(often(3)):
        synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            step()
        times.append((time.perf_counter() - begin) / repeats)
    synchronize()
    return min(times)


def kernel_times(step: Callable[[], None], repeats: int = 10) -> tuple[dict[str, float], float]:
    """Median seconds of each of our kernels by the profiler, with a cold cache, and of all of them in a step."""
    from torch.profiler import ProfilerActivity, profile

    synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            flush()
            step()
        synchronize()
    times = defaultdict(list)
    for event in found.events():
        # the driver's own calls are events, too
        if event.device_type == torch.autograd.DeviceType.CUDA and event.name in KERNELS:
            times[event.name].append(event.time_range.elapsed_us() / 1e6)
    return {name: median(t) for name, t in times.items()}, sum(map(sum, times.values())) / repeats


def graph_of(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of a step that has been warmed up on a stream of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph, repeats: int = 20) -> float:
    """Median seconds of a replay, of several in a row."""
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(repeats):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / repeats)
    return median(times)


def stepper(work: Work, backend: str = "triton", **options: Any) -> tuple[ContinualBackprop, Callable[[], None]]:
    """An attached object, and one step of it on the activations at hand."""
    options = {"capture": "deferred", "maturity_threshold": 1, "seed": 1, **options}
    cbp = ContinualBackprop(work.model, groups=work.groups, backend=backend, **options)
    engine = cbp._engine

    def step() -> None:
        for slot, h in enumerate(work.held):
            engine.record(slot, h)
        cbp.step()

    return cbp, step


def nbytes(work: Work) -> int:
    """Of what a step of the rule `nature` has to read: weights of the readers, and activations."""
    weights = {id(layer): layer.weight for group in work.groups for layer in group.outgoing}
    return sum(t.nbytes for t in (*weights.values(), *work.held))


def measure(net: Net) -> dict[str, float]:
    """Seconds of a step on each backend, the compiled reference among them, and the bytes it has to read."""
    work = chain(net)
    times = {}
    for backend in ("triton", "reference"):
        cbp, step = stepper(work, backend)
        times[backend] = seconds(step)
        if backend == "reference":
            select, engine = compiled_select(cbp), cbp._engine

            def run(engine: Any = engine, select: Callable[[], None] = select) -> None:
                for slot, h in enumerate(work.held):
                    engine.record(slot, h)
                select()
                engine.finish()

            times["compiled reference"] = seconds(run)
        cbp.remove()
    return {**times, "bytes": nbytes(work)}


class Report:
    """The phase's results, written as they come."""

    def __init__(self, file: Path | None, head: Sequence[str] = ()) -> None:
        self.file = file
        self.found: dict[str, Any] = {"head": list(head), "rows": []}

    def add(self, name: str, values: dict[str, Any], row: Sequence[object] = ()) -> None:
        """Keep one measurement, and its line in the table."""
        self.found[name] = values
        if row:
            self.found["rows"].append([name, *row])
        said = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())
        print(name, *said, sep="; ", flush=True)
        if self.file:
            self.file.write_text(json.dumps(self.found))


@contextlib.contextmanager
def no_memory_is_no_failure(report: Report, name: str) -> Iterator[None]:
    """A GPU that is too small for a case is told, and goes on with the next."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        report.add(name, {"error": str(error).splitlines()[0]}, ["not enough memory"])
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


def microseconds(value: float | None) -> str:
    return "" if value is None else f"{value * 1e6:.{1 if value < 1e-4 else 0}f}"


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.empty(2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def registers() -> dict[str, tuple[int, int]]:
    """Registers and spills of every kernel that was launched here, by Triton's own records."""
    found = {}
    for name in KERNELS:
        kernel = getattr(kernels, name, None)
        for caches in getattr(kernel, "device_caches", {}).values():
            for number, built in enumerate(caches[0].values()):
                found[f"{name} {number}"] = (getattr(built, "n_regs", None), getattr(built, "n_spills", None))
    return found


def facts(report: Report, fit: Fit, small: bool) -> None:
    """What this machine is, and whether the kernels at hand are taken."""
    about: dict[str, Any] = {"device": f"rehearsal on {platform.machine()}" if DEVICE == "cpu" else ""}
    about |= {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    for package in ("numpy", "pytest", "setuptools"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about[package] = importlib.metadata.version(package)
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about["device"] = properties.name
        about["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        about["multiprocessors"], about["memory"] = properties.multi_processor_count, properties.total_memory
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
            print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20).stdout)
            said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
            about["driver"], about["clocks"] = said.splitlines()[0].split(", ", 1)
    report.found.update(about)
    report.add("about", about)
    if DEVICE == "cuda":
        bandwidth = copy_bandwidth()
        report.found["copy GB/s"] = round(bandwidth / 1e9)
        report.add("copy", {"GB/s": round(bandwidth / 1e9)})
    hits: list[bool] = []
    if hasattr(triton.knobs, "compilation") and hasattr(triton.knobs.compilation, "listener"):
        triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    for rule, capture in (("nature", "deferred"), ("nature", "inline"), ("clarena", "deferred")):
        begin = time.perf_counter()
        cbp, step = stepper(chain(Net(2, 16 if small else 256, 0, 32, torch.float32)), rule=rule, capture=capture)
        assert cbp.backend == "triton"
        step()
        synchronize()
        report.add(f"first step, {rule} {capture}", {"s": round(time.perf_counter() - begin, 2)})
    report.found["triton's cache"] = {"hits": sum(hits), "misses": len(hits) - sum(hits)}
    report.add("cache", report.found["triton's cache"])
    report.add("registers and spills", registers())


RULES = {
    "nature": Rule.nature(),
    "nature, normal": Rule.nature(init="normal"),
    "adaptable_contribution": Rule.gnt("adaptable_contribution", transfer_bias=True),
    "random": Rule.gnt("random", accumulate=False),
}


def sanitizer(report: Report, fit: Fit, small: bool) -> None:
    """One net of three groups, with split sums, more than eight units chosen and convolutions; for NVIDIA's checker.

    Activations come as they are: no library's kernel runs under the checker.
    """
    width, places = (8, 1) if small else (64, 36)
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, width, 3), nn.Conv2d(width, 32, 3, groups=2), nn.Linear(32 * places, 2 * width)]
    model = nn.Sequential(*layers, nn.Linear(2 * width, 8)).to(DEVICE)
    groups = [UnitGroup(f"{i}", a, b) for i, (a, b) in enumerate(itertools.pairwise(model))]
    held = [torch.randn(8, width, 8, 8, device=DEVICE), torch.randn(8, 32 * places, device=DEVICE)]
    held.append(torch.randn(8 if small else 4096, 2 * width, device=DEVICE))
    work = Work(model, groups, held)
    linear = chain(Net(3, width, 0, 32, torch.float32))
    runs = [(work, name, rule, capture) for name, rule in RULES.items() for capture in ("deferred", "inline")]
    runs += [(linear, "clarena", Rule.clarena(), "deferred")]
    for which, name, rule, capture in runs[::4] if small else runs:
        options = {"replacement_rate": 0.3, "maturity_threshold": 0, "rule": rule, "capture": capture}
        cbp, step = stepper(which, **options)
        for _ in range(1 if small else 2):
            step()
        synchronize()
        report.add(f"{name}, {capture}", {"replaced": sum(cbp.num_replaced.values())})
        cbp.remove()


def whole_numbers(work: Work) -> None:
    """The same ones in every run, whose sums are exact in any order."""
    for tensor in (*work.model.parameters(), *work.held):
        generator = torch.Generator().manual_seed(tensor.numel())
        tensor.data.copy_(torch.randint(-3, 4, tensor.shape, generator=generator))


def order(report: Report, fit: Fit, small: bool) -> None:
    """The same step over and over gives the same bits, whatever else runs; and one on another stream than its forward.

    Whole numbers, so that no sum depends on an order that is not meant; what is left are races.
    """
    sizes = {"2 x 256": (2, 256), "12 x 512": (12, 512), "1 x 20000": (1, 20000), "64 x 32": (64, 32)}
    works = {name: chain(Net(*((1, 16) if small else size), 0, 32, torch.float32)) for name, size in sizes.items()}
    works["1 x 20000"] = one_group(3, 40 if small else 20000, 5, 32)
    works["convolution"] = flattened(8, 2, 16, 4) if small else flattened(64, 7, 512, 32)
    report.found["head"] = ["step", "repeats", "that differ"]
    failed = []
    for (name, work), beside in itertools.product(works.items(), (False, True)):
        if beside and DEVICE == "cpu":
            continue
        for tensor in (*work.model.parameters(), *work.held):
            tensor.data.copy_(
                torch.randint(-3, 4, tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()))
            )
        rate = 0.1 if small else 0.02
        cbp, step = stepper(work, replacement_rate=rate, maturity_threshold=0, decay_rate=0.5)
        step()
        # all that a step writes: the state, and the parameters
        tensors = [cbp._engine.state.buffer, *(p.data for p in work.model.parameters())]
        saved = [t.clone() for t in tensors]
        torch._foreach_copy_(tensors, saved)
        step()
        expected = [t.clone() for t in tensors]
        differ, repeats = torch.zeros((), dtype=torch.int64, device=DEVICE), 0
        other = torch.cuda.Stream() if beside else None
        factor = torch.randn(2048, 2048, device=DEVICE) if beside else None
        share = Fit((fit.end - time.monotonic()) / 11)
        while repeats < often(2000) and share:
            torch._foreach_copy_(tensors, saved)
            if other is not None and repeats % 4 == 0:
                with torch.cuda.stream(other):
                    factor @ factor
            step()
            for mine, theirs in zip(tensors, expected, strict=True):
                differ += (mine.view(torch.uint8) != theirs.view(torch.uint8)).any()
            repeats += 1
            if repeats % 100 == 0:
                synchronize()
        label = f"{name}, beside matrix products" if beside else name
        report.add(label, {"repeats": repeats, "differ": int(differ)}, [repeats, int(differ)])
        failed += [label] * bool(differ)
        assert sum(cbp.num_replaced.values()) > 0 or AHEAD
        cbp.remove()
    if DEVICE == "cuda":
        wrong = two_streams(200)
        report.add("forward and step on two streams", {"steps": 200, "differ": wrong}, [200, wrong])
        failed += ["two streams"] * bool(wrong)
    if failed:
        sys.exit(f"not the same bits: {', '.join(failed)}")


def two_streams(steps: int) -> int:
    """Steps on one stream while the stream of the forwards goes on and takes freed memory into use; how many differ.

    The forward's stream waits for the step before it runs the next forward, and for nothing else.
    """
    states = []
    for apart in (False, True):
        work = chain(Net(3, 256, 0, 256, torch.float32))
        for tensor in (*work.model.parameters(), *work.held):
            tensor.data.copy_(
                torch.randint(-3, 4, tensor.shape, generator=torch.Generator().manual_seed(tensor.numel()))
            )
        shapes = [h.shape for h in work.held]
        cbp, _ = stepper(work, replacement_rate=0.02, maturity_threshold=0, decay_rate=0.5)
        forward = torch.cuda.current_stream()
        other = torch.cuda.Stream() if apart else forward
        generator = torch.Generator(DEVICE).manual_seed(0)
        seen = []
        for _ in range(steps):
            forward.wait_stream(other)
            for slot, shape in enumerate(shapes):
                h = torch.randint(-3, 4, shape, generator=generator, device=DEVICE).float()
                cbp._engine.record(slot, h)
                del h
            other.wait_stream(forward)
            with torch.cuda.stream(other):
                # the step comes late, and its activations are no longer anybody's
                torch.cuda._sleep(200_000)
                cbp.step()
                seen.append(cbp._engine.state.utility.clone())
            for shape in (*shapes, *shapes):
                torch.full(shape, 1e9, device=DEVICE)
        torch.cuda.synchronize()
        states.append(seen)
        cbp.remove()
    return sum(not torch.equal(a, b) for a, b in zip(*states, strict=True))


def times(report: Report, fit: Fit, small: bool) -> None:
    """Each shape: the kernels by the profiler, graph replays with a cold and a warm cache, the host, the reference."""
    head = ["step", "MB", "kernels us", "expected us", "GB/s", "graph us, cold", "warm", "host us", "eager us"]
    report.found["head"] = [*head, "reference us", "reference in a graph us"]
    nothing = graph_of(flush) if DEVICE == "cuda" else None
    for name, case in cases(small).items():
        if not fit:
            report.add(name, {"left out": "no time was left"}, ["no time was left"])
            continue
        with no_memory_is_no_failure(report, name):
            work = case.make()
            found: dict[str, Any] = {"bytes": nbytes(work), "expected us": case.expected}
            cbp, step = stepper(work, capture=case.capture)
            for _ in range(often(5)):
                step()
            repeats = often(60)
            found["host"], found["eager"] = host(step, repeats), wall(step, repeats)
            if nothing is not None:
                found["by kernel"], found["kernels"] = kernel_times(step)
                found["warm"] = replay_seconds(graph_of(step))

                def cold(step: Callable[[], None] = step) -> None:
                    flush()
                    step()

                found["cold"] = replay_seconds(graph_of(cold)) - replay_seconds(nothing)
            cbp.remove()
            if AHEAD:
                continue
            cbp, step = stepper(work, "reference", capture=case.capture)
            found["reference"] = wall(step, often(5))
            if nothing is not None:
                try:
                    found["reference in a graph"] = replay_seconds(graph_of(step), 5)
                except RuntimeError as error:
                    found["why the reference is in no graph"] = str(error).splitlines()[0]
                    synchronize()
            cbp.remove()
            rate = found["bytes"] / found["kernels"] / 1e9 if found.get("kernels") else 0
            columns = ("cold", "warm", "host", "eager", "reference", "reference in a graph")
            row = [
                f"{found['bytes'] / 1e6:.1f}",
                microseconds(found.get("kernels")),
                "{:.0f}-{:.0f}".format(*case.expected),
            ]
            row += [f"{rate:.0f}", *(microseconds(found.get(key)) for key in columns)]
            report.add(name, found, row)


def where(report: Report, fit: Fit, small: bool) -> None:
    """What the end of a step takes: as many bytes in more or fewer units, and more or fewer units to choose."""
    report.found["head"] = ["kernels of a step", "us", "expected"]
    n = 64 if small else 4096
    rows: list[tuple[str, Callable[[], Work], float, str]] = [
        ("[4096, 4096] read by its columns", lambda: one_group(1, n, n, 32), 0.0, ""),
        ("[65536, 256]", lambda: one_group(1, n // 16, 16 * n, 32), 0.0, "at most 22 us less"),
    ]
    rows += [(f"{n} units, {k} chosen", lambda: one_group(1, n, 8, 32), k / n, "") for k in (0, 1, 8, 9, 131)]
    rows.append(("131,072 units, 131 chosen", lambda: one_group(1, 4 * n if small else 2**17, 1, 32), 0.001, "6-2600"))
    for name, make, rate, expected in rows[::4] if small else rows:
        if not fit:
            break
        cbp, step = stepper(make(), replacement_rate=min(rate, 1.0), maturity_threshold=0)
        for _ in range(often(3)):
            step()
        by_kernel, total = kernel_times(step) if DEVICE == "cuda" else ({}, wall(step, 1))
        report.add(name, {"us": total * 1e6, "by kernel": by_kernel}, [microseconds(total), expected])
        cbp.remove()


class Training(NamedTuple):
    """A net with its data, and how it is trained."""

    make: Callable[[], networks.Network]
    autocast: bool = False
    graphed: bool = True


def training(report: Report, fit: Fit, small: bool) -> None:
    """A training step with Adam, with and without continual backprop; its share of the whole."""
    report.found["head"] = ["training step", "ms", "ms with continual backprop", "share", "expected"]

    def mlp(depth: int, width: int, batch: int) -> Callable[[], networks.Network]:
        return lambda: networks.build(networks.mlp, *((2, 16, 4) if small else (depth, width, batch)), device=DEVICE)

    def gpt() -> networks.Network:
        sizes = (1, 1, 12, 8, 16) if small else (8, 12, 768, 1024, 50257)
        # of activations, only their width matters to what is compiled
        sizes = (1, 12, 768, 8, 64) if AHEAD else sizes
        return networks.build(networks.gpt, *sizes, device=DEVICE)

    ways = {
        "2 x 256, batch 64": (Training(mlp(2, 256, 64)), "a third eager, a tenth in a graph"),
        "2 x 256, batch 2048": (Training(mlp(2, 256, 2048)), "a third eager, a tenth in a graph"),
        "3 x 1024, batch 64": (Training(mlp(3, 1024, 64)), ""),
        "GPT-2 small, 8 x 1024, bf16": (Training(gpt, autocast=True, graphed=False), "3 %"),
    }
    for name, (way, expected) in ways.items():
        for graphed in (False, True) if way.graphed and DEVICE == "cuda" else (False,):
            label = f"{name}, in a graph" if graphed else name
            if not fit:
                report.add(label, {"left out": "no time was left"}, ["no time was left"])
                continue
            with no_memory_is_no_failure(report, label):
                found = share_of_training(way, graphed, small)
                row = [f"{found[key] * 1e3:.3f}" for key in ("without", "with")]
                report.add(label, found, [*row, f"{100 * (1 - found['without'] / found['with']):.1f} %", expected])


def share_of_training(way: Training, graphed: bool, small: bool) -> dict[str, float]:
    """Seconds of a step without and with continual backprop, in turns."""
    steps = {}
    for key in ("without", "with"):
        network = way.make()
        optimizer = torch.optim.Adam(network.model.parameters(), 1e-4, capturable=graphed)
        if key == "with":
            # what a graph replays has to be in it
            options = {"capture": "deferred"} if graphed else {}
            cbp = ContinualBackprop(network.model, optimizer, groups=network.groups, backend="triton", **options)

        def step(network: networks.Network = network, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad(set_to_none=not graphed)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=way.autocast):
                loss = nn.functional.cross_entropy(network.model(network.x), network.y)
            loss.backward()
            optimizer.step()

        for _ in range(often(4)):
            step()
        steps[key] = graph_of(step).replay if graphed else step
        for _ in range(often(2)):
            steps[key]()
    repeats = 1 if DEVICE == "cpu" else max(3, min(100, int(0.8 / wall(steps["with"], 1))))
    turns = [{key: wall(step, repeats) for key, step in steps.items()} for _ in range(often(3))]
    assert cbp.backend == "triton"
    return {key: median(turn[key] for turn in turns) for key in steps}


def options(report: Report, fit: Fit, small: bool, change: str = "") -> None:
    """Two nets with the kernels launched in another way, beside the way they are; or compiled in another way."""
    report.found["head"] = ["step", "kernels us", "host us"]
    nets = {"2 x 256": Net(2, 256, 0, 32, torch.float32), "3 x 4096": Net(3, 4096, 0, 256, torch.float32)}
    if change == "launch":

        def launch(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], meta: Any) -> None:
            kernel[grid](*args, **meta, **launching.OPTIONS)

        ways: dict[str, Callable[[], None]] = {
            "as it is": lambda: None,
            "through Triton's own launcher": lambda: setattr(launching, "launch", launch),
        }
    else:
        key, value = change.split("=")
        # alone in its process: what was compiled before would be launched again
        ways = {change: lambda: launching.OPTIONS.update({key: int(value)})}
    for way, prepare in ways.items():
        prepare()
        for name, net in list(nets.items())[: 1 if small else 2]:
            cbp, step = stepper(chain(net._replace(width=16) if small else net))
            for _ in range(often(5)):
                step()
            total = kernel_times(step)[1] if DEVICE == "cuda" else None
            mine = host(step, often(60))
            report.add(f"{name}, {way}", {"kernels": total, "host": mine}, [microseconds(total), microseconds(mine)])
            cbp.remove()


def ncu(report: Report, fit: Fit, small: bool) -> None:
    """One step of each shape between the profiler's marks; run it under ncu."""
    chosen = ("2 x 256, batch 32", "3 x 4096, batch 256", "12 x 4096, batch 256", "131,072 units")
    for name, case in cases(small).items():
        if (name in chosen or case.capture == "inline" or "bf16" in name) and fit:
            cbp, step = stepper(case.make(), capture=case.capture)
            for _ in range(3):
                step()
            synchronize()
            if DEVICE == "cuda":
                torch.cuda.cudart().cudaProfilerStart()
            step()
            synchronize()
            if DEVICE == "cuda":
                torch.cuda.cudart().cudaProfilerStop()
            report.add(name, {"steps": 1})
            cbp.remove()


PHASES: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (facts, sanitizer, order, times, where, training, options, ncu)
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--seconds", type=float, default=600, help="what would begin later is left out")
    parser.add_argument("--small", action="store_true", help="for the interpreter: small shapes, and few of them")
    parser.add_argument("--options", default="launch", help="for options: launch, or a compiler's option=number")
    given = parser.parse_args()
    if DEVICE == "cpu" and not AHEAD and not triton.knobs.runtime.interpret:
        sys.exit("PyTorch sees no GPU: torch.cuda.is_available() is False. make gpu REHEARSE=1 runs without one.")
    if AHEAD:
        import gpu_ahead

        gpu_ahead.install(int(os.environ["CBP_FAST_COMPILE_FOR"]))
    more = {"change": given.options} if given.phase == "options" else {}
    PHASES[given.phase](Report(given.json), Fit(given.seconds), given.small, **more)
