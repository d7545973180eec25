"""Other people's models, each looked at in a process of its own: what is found, whether it is right, what it costs.

    make zoo
    .venv-zoo/bin/python benchmarks/zoo.py --only timm/vit    # one model, all that is known of it

Every model of zoo_models.py is built twice. One copy is run, for the CPU time and the memory of a forward (with
gradients, in one thread). The other, which has never run, is looked at by `find_unit_groups`; all that can be reached
from it (tensors, attributes, containers, configs) is compared before and after; then `verify_unit_group` checks each
group. Records are appended to a file of JSON lines, and a run goes on where one was stopped.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib
import json
import os
import random
import re
import resource
import signal
import statistics
import sys
import time
import traceback
import types
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")

import torch
import zoo_models
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import cbp_fast
from cbp_fast.groups.layers import LAYERS, kind
from cbp_fast.groups.resolving import resolve

# what discovery may take, in forwards or seconds, whichever is more, and in the memory of forwards or MB
FORWARDS, SECONDS = 40, 2.0
MEMORY_FORWARDS, MEGABYTES = 20, 100.0
BLAME = "does not run on the example_inputs"
CHECK_FAILED, SHOWS_NOTHING = "does not pass the check", "the check shows nothing"


# one model, in a process of its own


def examine(library: str, name: str, note: Any, seconds_to_verify: float) -> None:
    """Looks at one model and hands every result to `note` as soon as it is there."""
    note(stage="build")
    built = zoo_models.build(library, name)
    model, inputs = built.model, built.inputs
    note(
        stage="forward",
        detail=built.detail,
        inputs=shapes(inputs),
        training=model.training,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=sum(kind(m) in LAYERS for m in model.modules()),
    )
    times = []
    while len(times) < 3 or (len(times) < 9 and sum(times) < 0.5):
        times.append(timed(run, model, inputs)[0])
    note(forward_seconds=statistics.median(times[1:]), forward_megabytes=timed(run, model, inputs)[1])
    model = inputs = None
    built = built.again()
    model, inputs = built.model, built.inputs

    note(stage="discovery")
    before = everything(model)
    # what was allocated for this comparison is not discovery's to look through
    gc.collect()
    try:
        seconds, megabytes, groups = timed(cbp_fast.find_unit_groups, model, inputs)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        note(blames=BLAME in text, error=text[:600], traceback=short_traceback(error))
        groups = None
    changed = differences(before, everything(model))
    if groups is None:
        note(changed=changed)
        return
    del before
    resolved = [resolve(model, group) for group in groups]
    made_by = {member.name for group in resolved for member in group.incoming}
    note(
        seconds=seconds,
        megabytes=megabytes,
        changed=changed,
        groups=len(groups),
        units=sum(group.num_units for group in resolved),
        left_out=sum(kind(m) in LAYERS and n not in made_by for n, m in model.named_modules()),
        stage="verification",
    )
    verdicts, start = {}, time.thread_time()
    for group in evenly(groups):
        if time.thread_time() - start > seconds_to_verify:
            break
        try:
            cbp_fast.verify_unit_group(model, group, inputs)
            verdicts[group.name] = "right"
        except Exception as error:
            verdicts[group.name] = f"{type(error).__name__}: {error}"[:300]
        note(verdicts=verdicts, verification_seconds=time.thread_time() - start)
    note(stage="done")


def run(model: nn.Module, inputs: Any) -> Any:
    if callable(inputs):
        return inputs(model)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def shapes(inputs: Any) -> str:
    return "a function" if callable(inputs) else str(tree_map_only(Tensor, lambda t: tuple(t.shape), inputs))


def timed(function: Any, *args: Any) -> tuple[float, float, Any]:
    """Seconds of CPU time, MB that the process grew at most meanwhile, and the result."""
    ctypes.CDLL(None).malloc_trim(0)
    # sets the greatest size so far to the size now
    Path("/proc/self/clear_refs").write_text("5")
    size = process_size("VmRSS")
    # of the processor, which a busy machine does not lengthen; of the thread, because the process's has only ticks
    # where CPU time is limited
    start = time.thread_time()
    result = function(*args)
    seconds = time.thread_time() - start
    return seconds, process_size("VmHWM") - size, result


def process_size(key: str) -> float:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def short_traceback(error: BaseException) -> list[str]:
    """Where it was raised: the last few places of the error and of what caused it."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return [f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in frames]


# what a model is, all of it


def everything(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """By path, a description of every object that can be reached from a model, and the object, so that it lives on."""
    found: dict[str, tuple[str, Any]] = {}
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", model)]
    while todo:
        path, value = todo.pop()
        plain = isinstance(value, (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, torch.Size))
        if plain:
            found[path] = (f"{type(value).__name__} {value!r}", None)
            continue
        about = f"{type(value).__name__} at {id(value):x}"
        if isinstance(value, Tensor):
            about += tensor_state(value)
        found[path] = (about, value)
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            todo += [(f"{path}.grad", value.grad)] if value.is_leaf else []
            todo += [(f"{path}.{k}", v) for k, v in vars(value).items()]
        elif not isinstance(value, (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)):
            todo += [(f"{path}{step}", child) for step, child in children(value)]
    if hasattr(model, "config"):
        found["repr of config"] = (repr(model.config), None)
    found["random states"] = (f"{random.getstate()} {torch.get_rng_state().sum()}", None)
    return found


def children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        # the order counts
        yield " keys", str([repr(k)[:80] for k in dict.keys(value)])
        yield from ((f"[{k!r}]", v) for k, v in dict.items(value))
    elif isinstance(value, (list, tuple, collections.deque)):
        yield " length", len(value)
        yield from ((f"[{i}]", v) for i, v in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield " members", str(sorted(map(repr, value)))[:2000]
    elif isinstance(value, types.MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, functools.partial):
        yield from ((".args", value.args), (".keywords", value.keywords))
    with contextlib.suppress(TypeError):
        yield from ((f".{k}", v) for k, v in dict(vars(value)).items())
    for base in type(value).__mro__:
        slots = base.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if isinstance(base.__dict__.get(slot), types.MemberDescriptorType) and hasattr(value, slot):
                yield f".{slot}", getattr(value, slot)


def tensor_state(tensor: Tensor) -> str:
    if tensor.layout != torch.strided or tensor.device.type == "meta" or type(tensor) not in (Tensor, nn.Parameter):
        return f" {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad}"
    values = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy() if tensor.numel() else b""
    version = None if tensor.is_inference() else tensor._version
    return (
        f" {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad} {tensor.data_ptr():x} version {version} "
        f"{hashlib.md5(values).hexdigest()}"
    )


def differences(before: dict[str, tuple[str, Any]], after: dict[str, tuple[str, Any]]) -> list[str]:
    """The first few paths at which they differ."""
    changed = [
        f"{path}: {before.get(path, ('absent',))[0][:120]} -> {after.get(path, ('absent',))[0][:120]}"
        for path in {**before, **after}
        if before.get(path, ("",))[0] != after.get(path, ("",))[0]
    ]
    return changed[:5] + ([f"and {len(changed) - 5} more"] if len(changed) > 5 else [])


# all of them


def evenly(things: Sequence[Any]) -> list[Any]:
    """In such an order that every beginning is an even sample: multiples of the golden ratio fall evenly."""
    return [things[i] for i in sorted(range(len(things)), key=lambda i: i * (5**0.5 - 1) / 2 % 1)]


def spread(libraries: Sequence[str]) -> list[tuple[str, str]]:
    """All models, so ordered that every beginning is an even sample of each library, a smaller share of large ones."""
    ranked = []
    for library in libraries:
        every = evenly(zoo_models.names(library))
        ranked += [(rank / len(every) ** 0.5, library, name) for rank, name in enumerate(every)]
    return [(library, name) for _, library, name in sorted(ranked)]


def start(library: str, name: str, path: Path, options: argparse.Namespace) -> int:
    """Forks a process that writes its record to `path`; its number."""
    child = os.fork()
    if child:
        return child
    record: dict[str, Any] = {"library": library, "name": name}

    def note(**results: Any) -> None:
        record.update(results)
        new = path.with_name(f"{path.name}.new")
        new.write_text(json.dumps(record))
        new.replace(path)

    status = 1
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (options.gigabytes * 2**30,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (int(options.limit), int(options.limit) + 2))
        # a server's signal handlers and what a model prints are of no use here
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not options.only:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            os.dup2(devnull, 2)
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        examine(library, name, note, options.verify_seconds)
        status = 0
    except BaseException as error:
        note(error=f"{type(error).__name__}: {error}"[:600], traceback=short_traceback(error))
    finally:
        os._exit(status)


def finished(path: Path, library: str, name: str, ended: str) -> dict[str, Any]:
    """The record of a process; `ended`, if it did not end by itself."""
    record = json.loads(path.read_text()) if path.exists() else {"library": library, "name": name, "stage": "build"}
    path.unlink(missing_ok=True)
    if ended:
        record["ended"] = f"{ended} in its {record['stage']}"
    return record


def run_all(todo: Sequence[tuple[str, str]], options: argparse.Namespace) -> None:
    running: dict[int, tuple[str, str, Path, float]] = {}
    queue = list(todo)
    begun = time.monotonic()
    while queue or running:
        while queue and len(running) < options.jobs:
            if options.total and time.monotonic() - begun > options.total:
                print(f"{len(queue)} models left: the time is up", file=sys.stderr)
                queue.clear()
                break
            library, name = queue.pop(0)
            prepare(library)
            path = options.out.with_name(f"{options.out.name}.{os.getpid()}.{len(queue)}")
            running[start(library, name, path, options)] = library, name, path, time.monotonic()
        time.sleep(0.02)
        for child, (library, name, path, since) in list(running.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            ended = ""
            if not done:
                if time.monotonic() - since < 6 * options.limit:
                    continue
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                ended = f"stopped after {6 * options.limit:.0f} s"
            elif os.WIFSIGNALED(status):
                number = os.WTERMSIG(status)
                ended = f"{options.limit:.0f} s of CPU time are up" if number == signal.SIGXCPU else f"signal {number}"
            del running[child]
            record = finished(path, library, name, ended)
            record["wall_seconds"] = round(time.monotonic() - since, 2)
            with options.out.open("a") as out:
                out.write(json.dumps(record) + "\n")
            print(f"{len(queue):5d} {line(record)}", flush=True)


@functools.cache
def prepare(library: str) -> None:
    """Imports a library here, so that its models' processes have it, and discovery, whose first run takes longer."""
    for module in zoo_models.LIBRARIES[library].modules:
        importlib.import_module(module)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    cbp_fast.find_unit_groups(net, torch.zeros(2, 1, 2, 2))


def line(record: dict[str, Any]) -> str:
    about = f"{record['library']}/{record['name']}"
    if record.get("seconds") is None:
        return f"{about}: {record.get('ended') or record.get('error', '')[:200]}"
    return (
        f"{about}: {record['groups']} groups, {record['seconds']:.2f} s = {ratio(record):.0f} forwards, "
        f"{record['megabytes']:.0f} MB beside {record['forward_megabytes']:.0f}"
        + "".join(f", WRONG {name}: {why}" for name, why in wrong(record).items())
        + (f", CHANGED {record['changed'][0]}" if record["changed"] else "")
        + (f", {record['ended']}" if "ended" in record else "")
    )


# what came of it


def ratio(record: dict[str, Any]) -> float:
    return record["seconds"] / record["forward_seconds"]


def wrong(record: dict[str, Any]) -> dict[str, str]:
    verdicts = record.get("verdicts", {})
    return {name: why for name, why in verdicts.items() if CHECK_FAILED in why and SHOWS_NOTHING not in why}


def unclear(record: dict[str, Any]) -> dict[str, str]:
    return {n: why for n, why in record.get("verdicts", {}).items() if why != "right" and n not in wrong(record)}


def slow(record: dict[str, Any]) -> bool:
    if record.get("seconds") is None:
        return "ended" in record and record["stage"] == "discovery"
    return record["seconds"] > max(FORWARDS * record["forward_seconds"], SECONDS)


def large(record: dict[str, Any]) -> bool:
    if record.get("megabytes") is None:
        return False
    return record["megabytes"] > max(MEMORY_FORWARDS * record["forward_megabytes"], MEGABYTES)


def crashed(record: dict[str, Any]) -> bool:
    """Whether discovery raised, where a plain forward had run."""
    return "error" in record and record["stage"] != "build" and record["stage"] != "forward"


def table(rows: Sequence[Sequence[Any]]) -> list[str]:
    header, *body = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *body)]


def report(records: Sequence[dict[str, Any]], counts: dict[str, int], versions: dict[str, str], remark: str) -> str:
    columns = (
        "library tried of built|with groups|groups|units|layers left out|right|wrong|not shown|not checked|changed|"
        "crashes|blame the user|seconds median, worst|forwards median, worst|too slow|too large"
    )
    rows: list[list[Any]] = [[*columns.split("|")[0].split(), *columns.split("|")[1:]]]
    libraries = [*dict.fromkeys(r["library"] for r in records)]
    for library in (*libraries, "all"):
        own = [r for r in records if library in ("all", r["library"])]
        built = [r for r in own if r["stage"] not in ("build", "forward")]
        looked = [r for r in built if r.get("seconds") is not None]
        seconds, ratios = [r["seconds"] for r in looked] or [0.0], [ratio(r) for r in looked] or [0.0]
        rows.append(
            [
                library,
                len(own),
                counts.get(library, sum(counts.values())),
                len(built),
                sum(r["groups"] > 0 for r in looked),
                sum(r["groups"] for r in looked),
                sum(r["units"] for r in looked),
                sum(r["left_out"] for r in looked),
                sum(v == "right" for r in built for v in r.get("verdicts", {}).values()),
                sum(len(wrong(r)) for r in built),
                sum(len(unclear(r)) for r in built),
                sum(r["groups"] - len(r.get("verdicts", {})) for r in looked),
                sum(bool(r.get("changed")) for r in built),
                sum(map(crashed, built)),
                sum(bool(r.get("blames")) for r in built),
                f"{statistics.median(seconds):.2f}, {max(seconds):.1f}",
                f"{statistics.median(ratios):.0f}, {max(ratios):.0f}",
                sum(map(slow, built)),
                sum(map(large, built)),
            ]
        )
    names = ", ".join(f"{name} {number}" for name, number in versions.items())
    out = ["# Other people's models", "", f"`make zoo`, one thread: {names}. {remark}".strip(), "", *table(rows), ""]
    out += [
        "Right, wrong: groups, by `verify_unit_group`; not shown: groups that it could not judge; not checked: for "
        "lack of time. Changed: something that can be reached from the model is otherwise after `find_unit_groups`. "
        "Seconds and forwards: CPU time of discovery, in seconds and in forwards. Too slow: more than "
        f"{FORWARDS} forwards and than {SECONDS:.0f} s; too large: more than "
        f"{MEMORY_FORWARDS} times the memory of a forward and than "
        f"{MEGABYTES:.0f} MB. Crashes: "
        "discovery raised an exception where a forward had run; they blame the user if they say that the forward does "
        "not run.",
        "",
    ]
    for title, kept, why in (
        ("Wrong", wrong, lambda r: "; ".join(f"{name}: {text}" for name, text in wrong(r).items())),
        ("Not shown", unclear, lambda r: "; ".join(f"{name}: {text}" for name, text in unclear(r).items())[:300]),
        ("Changed by looking", lambda r: r.get("changed"), lambda r: "; ".join(r["changed"])[:300]),
        ("Crashes", crashed, lambda r: r["error"][:300]),
        ("Too slow", slow, cost),
        ("Too large", large, cost),
        ("Stopped", lambda r: "ended" in r and r["stage"] not in ("build", "forward"), lambda r: r["ended"]),
    ):
        found = [r for r in records if r["stage"] not in ("build", "forward") and kept(r)]
        if found:
            lines = table([("model", "what"), *((f"{r['library']}/{r['name']}", why(r)) for r in found)])
            out += [f"## {title} ({len(found)})", "", *lines, ""]
    reasons: dict[str, list[str]] = {}
    for r in records:
        if r["stage"] in ("build", "forward"):
            reason = (r.get("ended") or r.get("error") or "nothing said").splitlines()[0]
            reason = reason.removeprefix("ValueError: ")[:140]
            reasons.setdefault(re.sub(r"\d+", "N", reason), []).append(f"{r['library']}/{r['name']}")
    if reasons:
        several = sorted(reasons.items(), key=lambda item: -len(item[1]))
        lines = table([("because", "models"), *((why, f"{len(n)}: {', '.join(n)}") for why, n in several)])
        out += [f"## Not built ({sum(map(len, reasons.values()))})", "", *lines, ""]
    return "\n".join(out)


def cost(record: dict[str, Any]) -> str:
    if record.get("seconds") is None:
        return record["ended"]
    return (
        f"{record['seconds']:.1f} s = {ratio(record):.0f} forwards of {1e3 * record['forward_seconds']:.0f} ms; "
        f"{record['megabytes']:.0f} MB beside {record['forward_megabytes']:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", nargs="*", choices=zoo_models.LIBRARIES, default=list(zoo_models.LIBRARIES))
    parser.add_argument("--only", metavar="LIBRARY/NAME", help="look at this one, here, and print all that is known")
    parser.add_argument("--explain", action="store_true", help="with --only: print what explain() says too")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--limit", type=float, default=60, help="seconds of CPU time for a model")
    parser.add_argument("--verify-seconds", type=float, default=3, help="after which no more groups are verified")
    parser.add_argument(
        "--total",
        type=float,
        default=0,
        help="seconds after which no more are begun: an even sample of all models",
    )
    parser.add_argument("--gigabytes", type=int, default=6, help="memory for a model")
    parser.add_argument("--out", type=Path, default=Path("build/zoo.jsonl"), help="records; those there are kept")
    parser.add_argument("--report", type=Path, help="write the tables there, and the records beside them")
    parser.add_argument("--remark", default="", help="a sentence for the report")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only:
        library, name = options.only.split("/", 1)
        prepare(library)
        torch.manual_seed(0)
        record: dict[str, Any] = {"library": library, "name": name}
        examine(library, name, record.update, options.verify_seconds)
        print(json.dumps(record, indent=1))
        if options.explain:
            built = zoo_models.build(library, name)
            print(cbp_fast.explain(built.model, built.inputs))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    records = [json.loads(text) for text in options.out.read_text().splitlines()] if options.out.exists() else []
    had = {(r["library"], r["name"]) for r in records}
    for library in options.library:
        prepare(library)
    counts = {library: len(zoo_models.names(library)) for library in options.library}
    todo = [model for model in spread(options.library) if model not in had]
    print(f"{len(todo)} models, {len(had)} in {options.out}", flush=True)
    run_all(todo, options)
    if options.report:
        records = [json.loads(text) for text in options.out.read_text().splitlines()]
        order = list(zoo_models.LIBRARIES)
        records.sort(key=lambda r: (order.index(r["library"]), r["name"]))
        packages = ["torch", "torchvision", *(zoo_models.LIBRARIES[r].package for r in order)]
        versions = {"cbp_fast": cbp_fast.__version__, **{p: version(p) for p in packages}}
        options.report.write_text(report(records, counts, versions, options.remark))
        options.report.with_suffix(".json").write_text(
            "{"
            + f'"versions": {json.dumps(versions)},\n"models": [\n'
            + ",\n".join(map(json.dumps, records))
            + "\n]}\n"
        )


if __name__ == "__main__":
    main()
