"""The command `cbp-fast`: `info`, and what holds for every subcommand."""

import subprocess
import sys

import pytest
import torch

import cbp_fast
from cbp_fast.cli import main


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
        monkeypatch.setattr("cbp_fast.ops.find_spec", lambda name: None)
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


def test_an_interrupt_ends_without_a_traceback(monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("cbp_fast.cli.info.run", interrupted)
    assert main(["info"]) == 130


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
