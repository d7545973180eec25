"""The command `cbp-fast`: `info`, and what holds for every subcommand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cbp_fast
from cbp_fast.cli import main
from cbp_fast.cli.arguments import unwritable


def test_info_says_what_runs_here(capsys):
    assert main(["info"]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:3])
    assert facts["cbp_fast"] == cbp_fast.__version__
    assert facts["torch"] == torch.__version__


def test_info_names_instruction_sets_backends_and_threads(capsys):
    main(["info"])
    out = capsys.readouterr().out
    assert f"{cbp_fast._C.get_isa()} in use; this CPU runs baseline" in out
    assert f"{torch.get_num_threads()} threads in use" in out
    for backend in ("cpp", "reference", "triton"):
        assert f"backend {backend}" in out


@pytest.mark.parametrize(
    ("version", "line"),
    [
        ("3.7.1", "available, with Triton 3.7.1 (3.6 to 3.9 are tested)"),
        ("4.0.0", "available, with Triton 4.0.0 (not tested; 3.6 to 3.9 are)"),
        ("3.5.1", "not available: Triton 3.5.1 (not tested; 3.6 to 3.9 are) must be 3.6 or newer and is 3.5.1 (pip"),
        (None, "not available: Triton is not installed"),
    ],
)
def test_info_says_which_triton_and_whether_it_is_tested(version, line, monkeypatch, capsys):
    if version:
        monkeypatch.setattr("triton.__version__", version)
    else:
        monkeypatch.setattr("cbp_fast.backends.registry.find_spec", lambda name: None)
    main(["info"])
    assert f"backend triton     {line}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "required: command"), (["train"], "invalid choice: 'train'"), (["info", "-x"], "unrecognized arguments: -x")],
    ids=" ".join,
)
def test_a_wrong_command_says_what_would_be_right(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("info", "demo", "bench"))


def test_an_interrupt_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("cbp_fast.cli.info.run", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "cbp-fast: interrupted\n"


@pytest.mark.parametrize("argv", [["--version"], ["--version", "info"]], ids=" ".join)
def test_version(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"cbp_fast {cbp_fast.__version__}\n"


def test_the_namespace_is_what_users_need_and_metrics_come_when_they_are_asked_for():
    program = """
import sys, cbp_fast
shown = {name for name in dir(cbp_fast) if not name.startswith("__")}
assert shown == set(cbp_fast.__all__), shown
assert "cbp_fast.metrics" not in sys.modules
assert cbp_fast.metrics.Monitor.__module__ == "cbp_fast.metrics"
assert sys.modules["cbp_fast.metrics"] is cbp_fast.metrics
names = {}
exec("from cbp_fast import *", names)
assert set(cbp_fast.__all__) <= set(names)
assert not hasattr(cbp_fast, "metric")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def folder(path):
    path.mkdir()
    return path


def inside_a_file(path):
    path.write_text("")
    return path / "inside"


def dangling_link_to_nowhere(path):
    path.symlink_to(path.parent / "nowhere" / "file")
    return path


WRONG = {
    "folder": (folder, "is a folder"),
    "no parent": (lambda path: path / "file", "there is no folder"),
    "inside a file": (inside_a_file, "cannot be written"),
    "link": (dangling_link_to_nowhere, "there is no folder"),
    "long name": (lambda path: path.parent / ("x" * 300), "cannot be written"),
    # of a system where not even root may write
    "system": (lambda path: Path("/proc/cbp_fast.json"), "cannot be written"),
}


def tree(path):
    return {p: None if p.is_dir() else p.read_bytes() for p in path.rglob("*") if p.exists()}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("option", [("bench", "--json"), ("bench", "--csv"), ("demo", "--json")], ids=" ".join)
def test_what_cannot_be_written_ends_it_at_once_and_nothing_is_left(option, kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make, message = WRONG[kind]
    path = make(tmp_path / "there")
    before = tree(tmp_path)
    assert main([*option, str(path)]) == 2
    err = capsys.readouterr().err
    assert f"cbp-fast {option[0]}: error: {option[1]}: {path}" in err
    assert message in err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "--json=a", "--csv=a"], "--json and --csv are both a"),
        (["bench", "--json=a", "--csv=sub/../a"], "--json and --csv are both sub/../a"),
        (["bench", "--json=full", "--csv=link"], "--json and --csv are both link"),
        (["bench", "--json=pictures/scaling.png", "--plot=pictures"], "--json and --plot are both"),
        (["bench", "--plot=full"], "--plot: full/time_against_width.png cannot be written"),
        (["bench", "--plot=taken"], "--plot: taken/scaling.png is a folder"),
        (["bench", "--plot=new.pdf"], "--plot: new.pdf must be a folder"),
        (["demo", "--json=x.png", "--out=x.png"], "--json and --out are both x.png"),
        (["demo", "--out=full/new"], "--out: full/new/demo_digits.png cannot be written"),
        (["demo", "--out=taken.png"], "--out: taken.png/demo_digits.png is a folder"),
        (["demo", "--out=x.bmp"], "--out: x.bmp must be a folder, whose name may end with a /, or .png, .pdf, .svg"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_outputs_that_get_in_each_others_way_or_have_no_format(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("sub", "pictures", "taken/scaling.png", "taken.png/demo_digits.png"):
        Path(name).mkdir(parents=True)
    Path("full").write_text("kept")
    Path("link").symlink_to("full")
    before = tree(tmp_path)
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_what_can_be_written_is_as_before(tmp_path):
    (tmp_path / "old").write_text("kept")
    files = [("--a", tmp_path / "old"), ("--b", tmp_path / "new"), ("--c", Path(os.devnull)), ("--d", Path(os.devnull))]
    assert (
        unwritable(files, [("--e", tmp_path / "deep" / "er" / "x.png"), ("--f", tmp_path / "deep" / "y.png")]) is None
    )
    assert tree(tmp_path) == {tmp_path / "old": b"kept"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--threads", "0"], "argument --threads: '0' must be a whole number, at least 1"),
        (["--threads", "-1"], "argument --threads"),
        (["--threads", "1000000000000"], "at most 1024"),
        (["--threads", "1.5"], "argument --threads: '1.5' must be"),
        (["--seconds", "0"], "argument --seconds: '0' must be a number above 0"),
        (["--seconds", "-3"], "argument --seconds"),
        (["--seconds", "nan"], "argument --seconds: 'nan' must be"),
        (["--seconds", "soon"], "argument --seconds: 'soon' must be"),
        (["--device", "cuda:99"], "CUDA devices; use cpu"),
        (["--device", "cpu:0"], "'cpu:0' must be cpu or cuda"),
        (["--json", ""], "'' must be the name of a file"),
        (["--csv", "results/"], "'results/' must be the name of a file"),
        (["--cases"], "expected at least one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_numbers_and_names_are_checked_by_bench(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *argv])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_cases_that_the_rule_leaves_out_are_not_passed_over_in_silence(capsys):
    assert main(["bench", "--suite=training", "--rule=clarena", "--cases", "ResNet-18, batch 8"]) == 2
    assert "rule clarena takes linear layers only" in capsys.readouterr().err


def test_a_reader_that_goes_away_ends_it_without_a_traceback():
    command = f"{sys.executable} -m cbp_fast info | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout in ("0\n", "1\n")
    assert done.stderr == ""


def test_module_runs_as_a_program_and_imports_only_what_it_needs():
    program = """
import runpy, sys, torch
before = set(sys.modules)
sys.argv = ["cbp_fast", "info"]
try:
    runpy.run_module("cbp_fast", run_name="__main__")
except SystemExit as stopped:
    assert stopped.code == 0, stopped.code
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not new & {"numpy", "sklearn", "matplotlib", "tqdm", "scipy"}, new
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cbp_fast")
