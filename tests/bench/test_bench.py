"""`cbp-fast bench`: what is compared computes the same, and every suite runs, prints and writes what it measured."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cbp_fast
from cbp_fast.bench import baselines, kernels, networks, report, scaling, step, timing, training
from cbp_fast.cli import main

SMALL = {
    "step": (step, "CASES", (step.Case("2 x 8", 2, 8, 4, 5), step.Case("100 x 2", 100, 2, 3, 5, compiled=False))),
    "kernels": (
        kernels,
        "CASES",
        tuple(
            kernels.Case(op, f"2 x {n}", n, kernels.mlp_with_few_inputs, (2, n, batch))
            for op, batch in (("capture_", 256), ("select_", 32), ("reinit_", 1))
            for n in (8, 16)
        ),
    ),
    "scaling": (scaling, "_WEIGHTS", (1e6, 3e6)),
    "training": (training, "CASES", (training.Case("small", networks.mlp, (2, 8, 4), 3),)),
}


def small(name, size=8):
    """A network of the benchmarks' constructors, made small."""
    make, numbers = {
        # so many samples that no unit is zero on all: ties may be broken differently
        "mlp": (networks.mlp, (3, size, 64)),
        "conv_net": (networks.conv_net, (2,)),
        "resnet18": (networks.resnet18, (1,)),
        "gpt": (networks.gpt, (1, 2, 12, 5, 7)),
    }[name]
    return networks.build(make, *numbers)


@pytest.mark.parametrize("name", ["mlp", "conv_net", "resnet18", "gpt"])
def test_networks_train_and_their_groups_resolve(name):
    network = small(name)
    optimizer = torch.optim.Adam(network.model.parameters())
    cbp = cbp_fast.ContinualBackprop(network.model, optimizer, groups=network.groups)
    loss = torch.nn.functional.cross_entropy(network.model(network.x), network.y)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert all((age == 1).all() for age in cbp.age.values())
    assert len(cbp.groups) == {"mlp": 3, "conv_net": 5, "resnet18": 8, "gpt": 2}[name]


def replayed(network, make, steps):
    """Trains with Adam; yields what `make(model, optimizer)` returned after each step."""
    optimizer = torch.optim.Adam(network.model.parameters(), lr=0.01)
    method = make(network.model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network.model(network.x), network.y).backward()
        optimizer.step()
        if isinstance(method, baselines.PerLayer):
            method.step()
        yield method


@pytest.mark.parametrize(
    ("name", "rule", "make"),
    [
        ("mlp", "gnt", baselines.PerLayerGnt),
        ("conv_net", "gnt", baselines.PerLayerGnt),
        ("resnet18", "gnt", baselines.PerLayerGnt),
        ("gpt", "gnt", baselines.PerLayerGnt),
        ("mlp", "clarena", baselines.PerLayerClarena),
    ],
)
def test_what_is_compared_computes_the_same_utilities(name, rule, make):
    networks_ = small(name), small(name)
    rates = {"replacement_rate": 0.0, "maturity_threshold": 2}
    ours = replayed(
        networks_[0],
        lambda m, o: cbp_fast.ContinualBackprop(m, o, rule=rule, groups=networks_[0].groups, **rates),
        3,
    )
    theirs = replayed(networks_[1], lambda m, o: make(m, o, networks_[1].groups, **rates), 3)
    for mine, other in zip(ours, theirs, strict=True):
        for utility, expected in zip(mine.utility.values(), other.utility, strict=True):
            torch.testing.assert_close(utility, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("rule", "make", "rate"), [("gnt", baselines.PerLayerGnt, 0.1), ("clarena", baselines.PerLayerClarena, 0.13)]
)
def test_what_is_compared_replaces_the_same_units(rule, make, rate):
    networks_ = small("mlp", 16), small("mlp", 16)
    rates = {"replacement_rate": rate, "maturity_threshold": 1}
    ours = replayed(
        networks_[0],
        lambda m, o: cbp_fast.ContinualBackprop(m, o, rule=rule, groups=networks_[0].groups, **rates),
        2,
    )
    theirs = replayed(networks_[1], lambda m, o: make(m, o, networks_[1].groups, **rates), 2)
    *_, mine = ours
    *_, other = theirs
    assert sum(mine.num_replaced.values()) == 3
    for age, expected in zip(mine.age.values(), other.age, strict=True):
        assert age.tolist() == expected.tolist()
    for group in networks_[0].groups:
        (unit,) = (mine.age[group.name] == 0).nonzero()[:, 0].tolist()
        # rows that the next group drew anew are not zero
        cleared = [n.model.get_submodule(group.outgoing[0]).weight[:, unit] == 0 for n in networks_]
        assert cleared[0].equal(cleared[1])
        assert cleared[0].any() == (rule == "gnt")
        rows = [n.model.get_submodule(group.incoming[0]).weight[unit] for n in networks_]
        assert not rows[0].isclose(rows[1]).any()


def test_every_method_trains_the_shared_parameters():
    case = training.Case("small", networks.mlp, (2, 8, 4), 3)
    timers = training.timers_of(case, "nature", "cpu", compiled=False)
    assert list(timers)[:4] == ["none", "cpp", "eager", "gnt"]
    for whole, part in (times for timed in timers.values() for times in timed(3)):
        assert whole > part >= 0


def test_slope_of_a_line():
    assert scaling.slope([1.0, 2.0, 4.0], [5.0, 8.0, 14.0]) == pytest.approx(3)


def settings():
    """What a worker was started with, as a timer."""
    return {"settings": lambda calls: [(torch.get_num_threads(), os.environ.get("CBP_FAST_TEST"))] * calls}


def test_a_worker_has_its_own_threads_and_environment():
    with timing.Worker(settings, threads=2, CBP_FAST_TEST="tuned") as worker:
        assert worker.timers()["settings"](2) == [(2, "tuned")] * 2
    assert "CBP_FAST_TEST" not in os.environ


def in_the_process(what):
    """Timers of a process that fails."""
    if what == "at once":
        raise ValueError("no memory\nat all")
    return {
        "interrupt": lambda calls: [signal.getsignal(signal.SIGINT) is signal.SIG_IGN] * calls,
        "error": lambda calls: 1 // 0,
        "end": lambda calls: os._exit(7),
    }


def test_an_error_in_a_worker_is_an_error_here():
    with (
        timing.Worker(in_the_process, "at once", threads=1) as worker,
        pytest.raises(RuntimeError, match="ValueError: no memory"),
    ):
        worker.timers()
    for name, message in (("error", "ZeroDivisionError"), ("end", "a process that was timed has ended with 7")):
        with timing.Worker(in_the_process, "later", threads=1) as worker:
            timers = worker.timers()
            # from its first moment on, as Ctrl-C goes to every process of a terminal
            assert timers["interrupt"](1) == [True]
            with pytest.raises(RuntimeError, match=message):
                timers[name](1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_worker_that_is_busy_is_not_waited_for():
    worker = timing.Worker(forever, threads=1)
    worker.timers()
    worker._pipe.send(("wait", 1))
    worker.__exit__(KeyboardInterrupt)
    assert worker._process.exitcode == -signal.SIGTERM


def forever():
    """A timer that takes an hour."""
    return {"wait": lambda calls: [time.sleep(3600)]}


def test_turns_are_cut_short_after_their_time_and_every_round_is_ticked():
    ticks = []
    options = timing.Options(seconds=0, tick=ticks.append)
    calls = []

    def slow(n):
        time.sleep(0.01 * n)
        calls.append(n)
        return [1.0] * n

    def quick(n):
        return list(range(n))

    times = timing.in_turns({"slow": slow, "quick": quick}, 10, options)
    assert times["slow"] == [1.0] * 3
    assert calls[-3:] == [1] * 3
    # the first of each turn is left out
    assert times["quick"] == [*range(1, 51)] * 3
    assert sum(ticks) == 10


def test_rows_hold_percentiles_in_microseconds():
    found = timing.row("step", "case", "op", "cpp", [i * 1e-6 for i in range(1, 100)])
    assert (found.rounds, found.low, found.median, found.high) == pytest.approx((99, 10, 50, 90))


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs one suite on small cases in three rounds each: the table and the rows of the JSON file."""

    def run(suite, *options):
        monkeypatch.setattr(*SMALL[suite])
        files = [f"--{kind}={tmp_path / kind}" for kind in ("json", "csv", "plot")]
        assert main(["bench", "--suite", suite, "--seconds", "1e-9", "--no-compile", *files, *options]) == 0
        rows = json.loads((tmp_path / "json").read_text())["microseconds"]
        with (tmp_path / "csv").open() as file:
            lines = list(csv.DictReader(file))
        assert [line["case"] for line in lines] == [r["case"] for r in rows]
        assert all(float(line["median"]) > 0 and line["torch"] == torch.__version__ for line in lines)
        return rows, sorted(path.name for path in (tmp_path / "plot").glob("*.png"))

    return run


def test_suite_step(bench, capsys):
    rows, pictures = bench("step")
    assert {r["method"] for r in rows} == {"read", "cpp", "eager", "eager tuned"}
    assert "a layer:" in capsys.readouterr().out
    assert pictures == []


def test_suite_kernels(bench, capsys):
    rows, pictures = bench("kernels")
    assert {(r["op"], r["method"]) for r in rows} == {
        (op, method) for op in ("capture_", "select_", "reinit_") for method in ("cpp", "reference", "read")
    }
    # the held activations and the readers' weights
    (stated,) = {r["bytes"] for r in rows if r["op"] == "select_" and r["x"] == 8}
    assert stated == 4 * (2 * 32 * 8 + 8 * 8 + 10 * 8)
    # 16 units: row, bias, column, and Adam's two moments of each; the head's 10 rows are read by the last group
    (stated,) = {r["bytes"] for r in rows if r["op"] == "reinit_" and r["x"] == 8}
    assert stated == 4 * 3 * ((64 + 1 + 8) + (8 + 1 + 10))
    assert "of read" in capsys.readouterr().out
    assert pictures == ["time_against_width.png"]


def test_suite_scaling(bench, capsys):
    rows, pictures = bench("scaling", "--cases", "weights", "depth")
    assert [r["x"] for r in rows if r["method"] == "cpp" and r["op"] == "weights"] == [1e6, 3e6]
    out = capsys.readouterr().out
    assert "to the power" in out
    assert "each layer more costs" in out
    assert pictures == ["scaling.png"]


BROKEN = {"step": "_measure", "kernels": "operations", "training": "in_turns", "scaling": "timers_of"}


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()], ids=["an error", "Ctrl-C"])
@pytest.mark.parametrize("suite", ["kernels", "scaling"])
def test_what_was_timed_is_kept_when_a_case_fails_or_is_interrupted(suite, error, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(*SMALL[suite])
    module, calls = SMALL[suite][0], []
    function = getattr(module, BROKEN[suite])

    def sometimes(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return function(*args)

    monkeypatch.setattr(module, BROKEN[suite], sometimes)
    files = [f"--{kind}={tmp_path / kind}" for kind in ("json", "csv", "plot")]
    cases = ["--cases", "weights", "depth"] if suite == "scaling" else []
    status = main(["bench", "--suite", suite, "--seconds", "1e-9", "--no-compile", *files, *cases])
    written = json.loads((tmp_path / "json").read_text())
    interrupted = isinstance(error, KeyboardInterrupt)
    times = {(r["op"], r["case"]) for r in written["microseconds"]}
    # a case a call, less the one that failed
    assert len(times) == len(calls) - 1 > 0
    assert (
        len(calls) == (2 if interrupted else len(calls)) == (2 if interrupted else {"kernels": 6, "scaling": 9}[suite])
    )
    assert len((tmp_path / "csv").read_text().splitlines()) == len(written["microseconds"]) + 1
    err = capsys.readouterr().err
    if interrupted:
        assert status == 130
        assert written["about"]["interrupted"] is True
        assert f"interrupted; there are {len(written['microseconds'])} times, in {tmp_path / 'csv'}" in err
    else:
        assert status == 1
        (failed,) = written["about"]["failed"].items()
        assert failed[0].startswith(f"{suite}, ")
        assert failed[1] == "MemoryError: no room"
        assert f"error: {failed[0]}: {failed[1]}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("suite", ["step", "training"])
def test_a_case_that_fails_does_not_stop_the_suite(suite, monkeypatch):
    module, _, cases = SMALL[suite]
    monkeypatch.setattr(*SMALL[suite])

    def fails(*args, **options):
        raise RuntimeError("first line\nsecond")

    monkeypatch.setattr(module, "_measure" if suite == "step" else "Worker", fails)
    options = timing.Options(compiled=False)
    lines = list(module.run(options))
    assert [rows for _, rows in lines] == [[]]
    assert options.failed == {case.name: "RuntimeError: first line" for case in cases}


def test_an_interrupt_before_the_first_time_writes_nothing(monkeypatch, tmp_path, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "_measure", interrupted)
    files = [f"--{kind}={tmp_path / kind}" for kind in ("json", "csv", "plot")]
    assert main(["bench", "--no-compile", *files]) == 130
    assert list(tmp_path.iterdir()) == []
    assert "interrupted; there are 0 times\n" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_in_the_end_costs_that_file_alone(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(*SMALL["kernels"])
    (tmp_path / "sub").mkdir()
    run = kernels.run

    def remove_the_folder(options):
        (tmp_path / "sub").rmdir()
        yield from run(options)

    monkeypatch.setattr(kernels, "run", remove_the_folder)
    files = [f"--json={tmp_path / 'json'}", f"--csv={tmp_path / 'sub' / 'csv'}"]
    assert main(["bench", "--suite=kernels", "--seconds=1e-9", *files]) == 1
    assert json.loads((tmp_path / "json").read_text())["microseconds"]
    assert str(tmp_path / "sub" / "csv") in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["bench", "demo"])
def test_ctrl_c_of_a_terminal_leaves_no_traceback(command, tmp_path):
    options = ["--suite=training", "--no-compile"] if command == "bench" else []
    argv = [sys.executable, "-m", "cbp_fast", command, *options, "--json=results"]
    process = subprocess.Popen(argv, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    # until the processes that train have begun to start
    while not list(Path(f"/proc/{process.pid}/task").glob("*/children")) or not any(
        path.read_text().split()[1:] for path in Path(f"/proc/{process.pid}/task").glob("*/children")
    ):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["step", "training", "scaling"])
def test_suites_with_processes_and_wide_layers(suite, bench, capsys):
    options = ["--threads", "2"] if suite == "step" else []
    rows, pictures = bench(suite, *options)
    out = capsys.readouterr().out
    if suite == "step":
        assert "2 threads over one, two processes in turns" in out
    elif suite == "training":
        assert {r["op"] for r in rows} == {f"{part}, {name}" for part in ("step", "CBP") for name in ("stock", "tuned")}
        shares = [r["share"] for r in rows if r["op"].startswith("CBP") and r["method"] in ("cpp", "gnt")]
        assert all(0 < share < 1 for share in shares)
        assert pictures == ["share_of_training.png"]
    else:
        assert "41 of 4096" in {r["case"] for r in rows}


@pytest.mark.slow
def test_every_benchmark_runs_once():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "9 x 9"], "there is no case 9 x 9; there are: 3 x 4096"),
        (["--json", "nowhere/file"], "there is no folder nowhere"),
        (["--csv", "nowhere/file"], "there is no folder nowhere"),
    ],
    ids=" ".join,
)
def test_bench_says_what_is_wrong(options, message, capsys):
    assert main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_picture_of_shares_takes_the_best_allocator(tmp_path):
    rows = [
        timing.row("training", "net", f"CBP, {allocator}", "cpp", [1e-3], share=share)
        for allocator, share in (("stock", 0.5), ("tuned", 0.25))
    ]
    about = {"cpu": "a CPU", "device": "cpu", "threads": 1, "torch": "2"}
    (path,) = report.plot(tmp_path, about, rows)
    assert path.name == "share_of_training.png"


@pytest.mark.slow
# the compiler's own import
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_what_the_benchmark_for_gpus_compares_runs(monkeypatch):
    """In Triton's interpreter, with the clock taken out: a GPU is not there, and what nobody runs would rot."""
    path = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    gpu = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu)
    monkeypatch.setattr(gpu, "seconds", lambda step: step() or step() or 1.0)
    found = gpu.measure(gpu.Net(2, 16, 0, 4, torch.float32))
    assert found == {"triton": 1.0, "reference": 1.0, "compiled reference": 1.0, "bytes": 2 * 4 * (16 * 16 + 4 * 16)}
