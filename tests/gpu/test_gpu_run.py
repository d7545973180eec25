"""`make gpu` without a GPU: every phase runs, whatever becomes of the others, and what is compiled ahead is found."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_run.py"
spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
gpu_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_run)


def program(text):
    return [sys.executable, "-c", text]


def results(out):
    (file,) = out.glob("gpu_*.json")
    return json.loads(file.read_text())


def by_name(found):
    return {phase["name"]: phase["result"] for phase in found["phases"]}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)


@pytest.mark.slow
def test_the_rehearsal_runs_every_phase(tmp_path):
    begin = time.monotonic()
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--rehearse", "--cheap"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    found = results(tmp_path)
    expected = ["build", "facts", "sanitizer", "correctness", "order", "times", "where", "training"]
    expected = dict.fromkeys((*expected, "options launch", "options warps"), "passed")
    assert by_name(found) == {**expected, "ncu": "left out"}, done.stdout
    summary = (tmp_path / "summary.md").read_text()
    # the table comes last, and is kept
    assert done.stdout.rstrip().endswith(f"all of it is in {tmp_path}")
    assert summary in done.stdout
    for phase in ("order", "times", "where", "training"):
        assert all(row[0] in summary for row in found["results"][phase]["rows"])
        assert found["results"][phase]["rows"]
    assert {file.name for file in tmp_path.iterdir()} >= {"log.txt", "junit.xml", "summary.md"}
    assert len(list(tmp_path.iterdir())) <= 8
    print(f"{time.monotonic() - begin:.0f} s")


def test_a_failed_phase_and_a_hanging_one_stop_no_other(tmp_path):
    # it cannot be interrupted, and it has a child
    sleep = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    child = tmp_path / "child"
    hangs = f"""import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {sleep!r}])
open({str(child)!r}, "w").write(str(child.pid))
print("waits", flush=True)
{sleep}
"""
    write = "import json, sys; json.dump({'head': ['what', 'n'], 'rows': [['measured', 3]]}, open(sys.argv[1], 'w'))"
    phases = [
        gpu_run.Phase("fails", 60, program("print('the reason | is this'); raise SystemExit(3)")),
        gpu_run.Phase("is not there", 60, ["/there/is/no/such/program"]),
        gpu_run.Phase("hangs", 3, program(hangs), beside=True),
        gpu_run.Phase("measures", 60, [*program(write), "{json}"]),
        gpu_run.Phase("left", 60, program("1 / 0"), skip="there is no reason"),
    ]
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    gpu_run.GRACE = 1
    assert not gpu_run.perform(phases, out, 5, work)
    expected = {"fails": "failed", "is not there": "failed", "hangs": "timed out", "measures": "passed"}
    assert by_name(results(out)) == {**expected, "left": "left out"}
    summary, log = (out / "summary.md").read_text(), (out / "log.txt").read_text()
    assert "the reason / is this" in summary
    assert "| measured | 3 |" in summary
    assert "waits" in log
    # neither it nor its child is left
    time.sleep(0.2)
    stat = Path(f"/proc/{child.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split(") ")[1][0] == "Z"


def test_what_is_not_needed_may_fail(tmp_path):
    phases = [gpu_run.Phase("one", 60, program("")), gpu_run.Phase("two", 60, program("1 / 0"), needed=False)]
    assert gpu_run.perform(phases, tmp_path / "out", 5, tmp_path)
    assert not gpu_run.perform([phases[1]._replace(needed=True)], tmp_path / "out", 5, tmp_path)


def test_results_of_other_runs_stay(tmp_path):
    (tmp_path / "gpu_another.json").write_text("theirs")
    assert gpu_run.perform([gpu_run.Phase("one", 60, program(""))], tmp_path, 5, tmp_path)
    assert (tmp_path / "gpu_another.json").read_text() == "theirs"


def test_a_python_that_cannot_run_it_is_refused(monkeypatch):
    assert not gpu_run.refusal(rehearse=True)
    monkeypatch.setattr(gpu_run, "output", lambda *command, seconds: "2.11.0 False")
    assert "PyTorch 2.11.0 of .* sees no GPU; make gpu REHEARSE=1" in re.sub(r"of \S+", "of .*", gpu_run.refusal(False))
    monkeypatch.setattr(gpu_run, "output", lambda *command, seconds: "")
    assert "has no PyTorch that imports; name the Python that has" in gpu_run.refusal(rehearse=True)


def test_all_phases_together_have_a_limit(tmp_path):
    gpu_run.GRACE = 1
    phases = [gpu_run.Phase("long", 60, program("import time; time.sleep(60)")), gpu_run.Phase("next", 60, program(""))]
    begin = time.monotonic()
    assert not gpu_run.perform(phases, tmp_path / "out", 4 / 60, tmp_path)
    assert time.monotonic() - begin < 10
    assert by_name(results(tmp_path / "out")) == {"long": "timed out", "next": "timed out"}


def test_a_long_log_keeps_both_ends():
    text = gpu_run.shortened("a" * 10 + "b" * 10**6 + "c" * 10)
    assert text.startswith("aaa")
    assert text.endswith("ccc")
    assert len(text) < 5 * 10**5


def test_counters_of_ncu(tmp_path):
    """A few of its columns, found by their names."""
    assert gpu_run.counters(tmp_path / "ncu.csv") == {}
    text = """==PROF== Connected to process 1
"ID","Kernel Name","launch__registers_per_thread","gpu__time_duration.sum","what.else"
"","","register/thread","us","%"
"0","select","128","11.2","7"
"1","reinit","40","4.1","7"
"""
    (tmp_path / "ncu.csv").write_text(text)
    found = gpu_run.counters(tmp_path / "ncu.csv")
    assert found["head"] == ["kernel", "time us", "registers register/thread"]
    assert found["rows"] == [["select", "11.2", "128"], ["reinit", "4.1", "40"]]


def copy_of_the_checkout(target):
    """Without anything that was built."""
    for part in ("cbp_fast", "csrc", "benchmarks"):
        shutil.copytree(ROOT / part, target / part, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, target / file)


@pytest.mark.slow
@pytest.mark.parametrize("old", [False, True])
def test_the_compiled_module_is_built_where_it_is_missing(old, tmp_path):
    """With setup.py; with the compiler alone where setuptools cannot read pyproject.toml."""
    copy_of_the_checkout(tmp_path)
    if old:
        (tmp_path / "setup.py").write_text("raise SystemExit('invalid pyproject.toml config: `project.license`')\n")
    command = [sys.executable, "benchmarks/gpu_run.py", "--build"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PIP_NO_INDEX": "1"}
    for built_now in (True, False):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("it is built here" in done.stdout) == built_now
        assert ("the compiler alone" in done.stdout) == (old and built_now)
    assert len(list((tmp_path / "cbp_fast").glob("_C.*.so"))) == 1


# one step, compiled for a GPU that is not there
STEP = """
import torch, triton
import gpu_ahead
from cbp_fast import ContinualBackprop

gpu_ahead.install(90)
found = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: found.append(f"{src.name} {cache_hit}")
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
cbp = ContinualBackprop(model, backend="triton")
cbp._engine.record(0, torch.randn(4, 16))
cbp.step()
print(*found, sep=", ")
"""


@pytest.mark.slow
def test_what_is_compiled_ahead_is_found(tmp_path):
    """By the same launch in another process, also where the cache has been carried to."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))

    def step(cache):
        environment["TRITON_CACHE_DIR"] = str(cache)
        done = subprocess.run(program(STEP), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().split(", ")

    first = step(tmp_path / "here")
    assert first
    assert all(line.endswith("False") for line in first)
    again = [line.replace("False", "True") for line in first]
    assert step(tmp_path / "here") == again
    (tmp_path / "here").rename(tmp_path / "there")
    gpu_run.settle(tmp_path / "there")
    assert gpu_run.kernels_in(tmp_path / "there") == len(first)
    assert step(tmp_path / "there") == again
