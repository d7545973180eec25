"""`make gpu`: the Triton backend on this machine's GPU, checked and measured in at most eight minutes.

python benchmarks/gpu_run.py OUT              # all of it
python benchmarks/gpu_run.py OUT --rehearse   # without a GPU, small, in Triton's interpreter

Every phase is a process of its own under its own limit; a failed phase stops no other. OUT gets log.txt, summary.md and
gpu_<device>.json, which are there, as far as they go, after every phase. Nothing is installed and nothing is fetched.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
PROGRAM = str(ROOT / "benchmarks" / "gpu.py")
# of each phase's output, so much goes into log.txt from its beginning and from its end
LOGGED = 200_000
# an interrupted process gets so many seconds to say what it was at
GRACE = 3
KERNELS = "select|score|rank|reinit|capture|hat|transfer"


class Phase(NamedTuple):
    """What runs under one limit. Without `needed`, its failure is told and does not fail the whole."""

    name: str
    seconds: float
    command: Sequence[str]
    needed: bool = True
    beside: bool = False  # starts together with the phase after it
    environment: Mapping[str, str] = {}
    skip: str = ""  # why it is left out


class Running:
    """A phase's process, in a process group of its own."""

    def __init__(self, phase: Phase, limit: float, work: Path) -> None:
        self.phase, self.limit, self.begin = phase, limit, time.monotonic()
        self.log, self.json = work / f"{phase.name}.log", work / f"{phase.name}.json"
        command = [argument.replace("{json}", str(self.json)) for argument in phase.command]
        environment = {**os.environ, **phase.environment}
        with self.log.open("wb") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def kill(self, number: int) -> None:
        """Send the whole group a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def result(self) -> str | None:
        """How it ended, once it has: "passed", "failed" or "timed out"; past its limit, it is ended."""
        if self.process.poll() is None:
            if time.monotonic() < self.begin + self.limit:
                return None
            self.kill(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
            self.kill(signal.SIGKILL)
            self.process.wait()
            return "timed out"
        # what it may have left behind
        self.kill(signal.SIGKILL)
        return "failed" if self.process.returncode else "passed"


def output(*command: str, seconds: float = 20) -> str:
    """What a command prints; nothing if there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def workers(rehearse: bool) -> int:
    """Processes that share the tests: each has a GPU context, and some need gigabytes for a while."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if rehearse:
        return min(cores, 4)
    memory = output("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits").split()
    return max(1, min(cores - 6, 10, int(memory[0]) // 6000 if memory and memory[0].isdigit() else 1))


def pytest_options(rehearse: bool, work: Path) -> list[str]:
    """With as many processes as pay, if pytest-xdist is there."""
    number = workers(rehearse)
    parallel = number > 1 and bool(output(sys.executable, "-c", "import xdist; print(1)"))
    # a warning of another PyTorch or pytest is none of ours; a cache would be written into the checkout
    options = ["-W", "default", "-p", "no:cacheprovider", "-q", "--durations", "10", "--maxfail", "30", "-ra"]
    options += [f"--junitxml={work / 'junit.xml'}", "-o", "junit_family=xunit1"]
    return options + (["-n", str(number)] if parallel else [])


def plan(rehearse: bool, cheap: bool, work: Path, out: Path) -> list[Phase]:
    """All phases, in the order in which they run."""
    python = sys.executable

    def measure(name: str, seconds: float, *options: str, **more: Any) -> Phase:
        small = ["--small"] if rehearse else []
        # what it measures before the limit is worth having
        inner = ["--seconds", f"{0.9 * seconds - 5:.0f}"]
        words = [python, PROGRAM, name.split()[0], "--json", "{json}", *inner, *small, *options]
        return Phase(name, seconds, words, **more)

    tests = [python, "-m", "pytest", "tests/gpu/test_gpu.py", *pytest_options(rehearse, work)]
    if cheap:
        tests += ["-k", "one_step and nature and float32 or hundred"]
    phases = [
        Phase("build", 150, [python, __file__, "--build"]),
        measure("facts", 40),
    ]
    checker = shutil.which("compute-sanitizer")
    under = [checker, "--target-processes", "application-only", "--error-exitcode", "1", "--tool"] if checker else []
    for tool in ("memcheck", "initcheck") if checker or not rehearse else ("memcheck",):
        sanitizer = measure(
            "sanitizer" if tool == "memcheck" else f"sanitizer {tool}",
            100,
            beside=True,
            # freed memory stays with the caching allocator, which would hide an access to it
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            skip="" if checker or rehearse else "there is no compute-sanitizer",
        )
        phases.append(sanitizer._replace(command=[*under, tool, *sanitizer.command] if checker else sanitizer.command))
    phases += [
        Phase("correctness", 500 if rehearse else 110, tests),
        measure("order", 40),
        measure("times", 100),
        measure("where", 25),
        measure("training", 50),
        measure("options launch", 20, "--options", "launch", needed=False),
        measure("options warps", 20, "--options", "num_warps=8", needed=False),
    ]
    profiler = shutil.which("ncu")
    ncu = measure(
        "ncu", 60, needed=False, skip="the hardware's counters" if rehearse else "" if profiler else "there is no ncu"
    )
    sections = ["SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats", "WarpStateStats"]
    metrics = "gpu__time_duration.sum,dram__bytes_read.sum,sm__cycles_active.avg.pct_of_peak_sustained_elapsed"
    # the clocks stay as they are: the card may be shared
    words = ["--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw", "--log-file"]
    words += [str(out / "ncu.csv"), "-k", f"regex:^({KERNELS})$", "--metrics", metrics]
    words += [word for section in sections for word in ("--section", section)]
    return [*phases, ncu._replace(command=[profiler or "ncu", *words, *ncu.command])]


def compile_plainly() -> None:
    """The compiled module by one command, for a setuptools that does not know all of pyproject.toml."""
    import pybind11
    from torch.utils import cpp_extension

    directories = [pybind11.get_include(), *cpp_extension.include_paths(), sysconfig.get_path("include")]
    libraries = cpp_extension.library_paths()
    target = ROOT / "cbp_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = "-O3 -g0 -std=c++20 -fPIC -shared -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden"
    flags += " -DTORCH_TARGET_VERSION=0x020a000000000000 -DTORCH_EXTENSION_NAME=_C"
    compiler = [*shlex.split(os.environ.get("CXX", "c++")), *flags.split(), *(f"-I{d}" for d in directories)]
    with tempfile.TemporaryDirectory() as place:
        sources = sorted((ROOT / "csrc").glob("*.cpp"))
        objects = [Path(place) / f"{source.stem}.o" for source in sources]
        compile_one = [word for word in compiler if word != "-shared"]
        running = [
            subprocess.Popen([*compile_one, "-c", str(source), "-o", str(made)])
            for source, made in zip(sources, objects, strict=True)
        ]
        statuses = [process.wait() for process in running]
        if any(statuses):
            sys.exit("the compiler failed")
        found = [word for library in libraries for word in (f"-L{library}", f"-Wl,-rpath,{library}")]
        subprocess.run([*compiler, *map(str, objects), "-o", str(target), *found, "-ltorch_cpu"], check=True)


def build() -> int:
    """Build the compiled module in place unless it imports; with setup.py, or else by the compiler alone."""
    # in a process of its own, as one that failed to import would stay so
    attempt = [sys.executable, "-c", "import cbp_fast, cbp_fast._C; print('cbp_fast', cbp_fast.__version__)"]
    if subprocess.run(attempt, cwd=ROOT).returncode == 0:
        return 0
    print("cbp_fast._C does not import: it is built here", flush=True)
    made = subprocess.run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=ROOT)
    if made.returncode or subprocess.run(attempt, cwd=ROOT).returncode:
        print("setup.py did not make it: the compiler alone", flush=True)
        compile_plainly()
    return subprocess.run(attempt, cwd=ROOT).returncode


def kernels_in(cache: Path) -> int:
    """Compiled kernels in Triton's cache."""
    return sum(1 for _ in cache.glob("*/*.cubin")) + sum(1 for _ in cache.glob("*/*.hsaco"))


def settle(cache: Path) -> None:
    """Triton's cache names its files by their full paths: those of where it was made become those that are here."""
    for group in cache.glob("*/__grp__*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            names = json.loads(group.read_text())["child_paths"]
            here = {name: str(group.parent.absolute() / name) for name in names if (group.parent / name).exists()}
            if here != names:
                group.write_text(json.dumps({"child_paths": here}))


def shortened(text: str) -> str:
    """The beginning and the end of a text."""
    if len(text) <= 2 * LOGGED:
        return text
    return f"{text[:LOGGED]}\n\n[{len(text) - 2 * LOGGED} characters left out]\n\n{text[-LOGGED:]}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def summary(found: Mapping[str, Any]) -> str:
    """What a reader wants first: which phases passed, and one line a measurement."""
    facts = found["results"].get("facts", {})
    compiled = f"{found['kernels compiled here']} compiled here, {found['kernels at hand']} brought along"
    lines = [
        f"# {found['device']}",
        "",
        f"PyTorch {facts.get('torch', '?')}, Triton {facts.get('triton', '?')}, driver {facts.get('driver', '?')}; "
        f"a copy runs at {facts.get('copy GB/s', '?')} GB/s; kernels: {compiled}",
        "",
        markdown(
            ["phase", "result", "seconds", ""],
            [[p["name"], p["result"], f"{p['seconds']:.0f}", p["note"]] for p in found["phases"]],
        ),
    ]
    if found["device"].startswith("rehearsal"):
        lines[3:3] = [
            "Nothing below is a time of a GPU: the interpreter's times mean nothing beside what is expected.",
            "",
        ]
    for name, result in found["results"].items():
        if isinstance(result, dict) and result.get("rows"):
            lines += ["", f"## {name}", "", markdown(result["head"], result["rows"])]
    return "\n".join(lines) + "\n"


# of all that ncu tells: how long, how much was read, how busy, and what a program takes
COUNTERS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__cycles_active.avg.pct_of_peak_sustained_elapsed": "multiprocessors active %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
}


def counters(file: Path) -> dict[str, Any]:
    """A table of what ncu wrote, in the order of the launches."""
    try:
        lines = [line for line in file.read_text(errors="replace").splitlines() if line.startswith('"')]
    except OSError:
        return {}
    head, units, *launches = list(csv.reader(lines)) if len(lines) > 2 else ([], [])
    at = {name: head.index(name) for name in COUNTERS if name in head}
    columns = [f"{COUNTERS[name]} {units[i] if units[i] != '%' else ''}".strip() for name, i in at.items()]
    if "Kernel Name" not in head:
        return {}
    rows = [[line[head.index("Kernel Name")], *(line[i] for i in at.values())] for line in launches]
    return {"head": ["kernel", *columns], "rows": rows}


def last_line(log: Path) -> str:
    """What a phase said last, for the table."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[-1].replace("|", "/"))[:120] if lines else ""


class Run:
    """All phases of one call, and what they leave in the folder."""

    def __init__(self, out: Path, minutes: float, cache: Path | None) -> None:
        self.out, self.cache = out, cache
        self.deadline = time.monotonic() + 60 * minutes
        self.running: list[Running] = []
        self.log = ""
        self.found: dict[str, Any] = {"device": "no GPU was found", "phases": [], "results": {}}
        self.had = self.found["kernels at hand"] = kernels_in(cache) if cache else 0
        self.found["kernels compiled here"] = 0

    def start(self, phase: Phase, work: Path) -> None:
        """Start a phase, unless there is a reason not to."""
        left = self.deadline - time.monotonic()
        if phase.skip or left < 2 * GRACE:
            self.note(phase, "left out" if phase.skip else "timed out", 0.0, phase.skip or "no time was left")
            return
        print(f"{phase.name} ...", flush=True)
        try:
            self.running.append(Running(phase, min(phase.seconds, left - GRACE), work))
        except OSError as error:
            self.note(phase, "failed", 0.0, str(error))

    def finish(self) -> None:
        """Wait for what runs."""
        while self.running:
            for running in list(self.running):
                result = running.result()
                if result is not None:
                    self.running.remove(running)
                    self.ended(running, result)
            time.sleep(0.05)

    def ended(self, running: Running, result: str) -> None:
        phase, seconds = running.phase, time.monotonic() - running.begin
        text = running.log.read_text(errors="replace")
        self.log += f"===== {phase.name}: {result} after {seconds:.1f} s\n{shortened(text)}\n"
        with contextlib.suppress(OSError, ValueError):
            self.found["results"][phase.name] = json.loads(running.json.read_text())
        if phase.name == "ncu":
            self.found["results"]["ncu"] = counters(self.out / "ncu.csv")
        self.found["device"] = self.found["results"].get("facts", {}).get("device", self.found["device"])
        if result != "passed":
            print("\n".join(text.splitlines()[-15:]), flush=True)
        self.note(phase, result, seconds, last_line(running.log))

    def note(self, phase: Phase, result: str, seconds: float, note: str) -> None:
        """Keep a phase's result, and write all that is known so far."""
        print(f"{phase.name}: {result}, {seconds:.1f} s", flush=True)
        line = {"name": phase.name, "result": result, "seconds": round(seconds, 1), "needed": phase.needed}
        self.found["phases"].append({**line, "note": note})
        if self.cache:
            self.found["kernels compiled here"] = kernels_in(self.cache) - self.had
        name = re.sub("[^a-z0-9]+", "_", self.found["device"].lower()).strip("_")
        (self.out / f"gpu_{name}.json").write_text(json.dumps(self.found, indent=1) + "\n")
        (self.out / "summary.md").write_text(summary(self.found))
        (self.out / "log.txt").write_text(self.log)

    def passed(self) -> bool:
        """Whether all that is needed has passed, or was left out for a reason."""
        return all(p["result"] in ("passed", "left out") or not p["needed"] for p in self.found["phases"])


def refusal(rehearse: bool) -> str:
    """Why nothing can come of a run with this Python; nothing if something can."""
    looks = [sys.executable, "-c", "import torch; print(torch.__version__, torch.cuda.is_available())"]
    version, _, sees = output(*looks, seconds=120).strip().rpartition(" ")
    if not version:
        return (
            f"{sys.executable} has no PyTorch that imports; name the Python that has, as in "
            "make gpu GPU_PYTHON=/opt/torch/bin/python3"
        )
    if sees != "True" and not rehearse:
        return f"PyTorch {version} of {sys.executable} sees no GPU; make gpu REHEARSE=1 runs the script without one"
    return ""


def perform(phases: Sequence[Phase], out: Path, minutes: float, work: Path) -> bool:
    """Run the phases; whether all that are needed passed."""
    out.mkdir(parents=True, exist_ok=True)
    for old in (out / "junit.xml", out / "ncu.csv"):
        old.unlink(missing_ok=True)
    cache = Path(os.environ["TRITON_CACHE_DIR"]) if os.environ.get("TRITON_CACHE_DIR") else None
    if cache:
        settle(cache)
    run = Run(out, minutes, cache)
    try:
        for phase in phases:
            run.start(phase, work)
            if not phase.beside:
                run.finish()
        run.finish()
    finally:
        for running in run.running:
            running.kill(signal.SIGKILL)
    # the results before there was a device's name
    if run.found["device"] != "no GPU was found":
        (out / "gpu_no_gpu_was_found.json").unlink(missing_ok=True)
    junit = work / "junit.xml"
    if junit.exists() and junit.stat().st_size < 2**23:
        shutil.copy(junit, out / "junit.xml")
    print(f"\n{summary(run.found)}\nall of it is in {out}", flush=True)
    return run.passed()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, small, in Triton's interpreter")
    parser.add_argument("--cheap", action="store_true", help="with --rehearse: a few of the tests only")
    parser.add_argument("--minutes", type=float, help="all phases together; 8, and 15 in a rehearsal")
    parser.add_argument("--build", action="store_true", help="only build the compiled module, if it does not import")
    given = parser.parse_args()
    if given.build:
        return build()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ["TRITON_INTERPRET"] = "1" if given.rehearse else "0"
    os.environ["PYTHONUNBUFFERED"] = "1"
    wrong = refusal(given.rehearse)
    if wrong:
        print(f"make gpu: {wrong}. Nothing was run, and nothing written.", file=sys.stderr)
        return 2
    # an interrupted run ends its phases, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    minutes = given.minutes or (15 if given.rehearse else 8)
    with tempfile.TemporaryDirectory() as work:
        phases = plan(given.rehearse, given.cheap, Path(work), given.out.absolute())
        return 0 if perform(phases, given.out.absolute(), minutes, Path(work)) else 1


if __name__ == "__main__":
    sys.exit(main())
