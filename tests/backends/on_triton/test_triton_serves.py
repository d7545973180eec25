"""Whom the Triton backend serves: devices and versions of Triton."""

import re

import pytest
import torch
import triton
from triton_runs import attach, mlp

from cbp_fast import Rule
from cbp_fast.backends.registry import backend_for

pytestmark = pytest.mark.usefixtures("interpreter")


def test_a_cpu_tensor_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"serves CPU tensors only in Triton's interpreter \(TRITON_INTERPRET=1\)"):
        attach(mlp((4, 5, 2)), "triton")


def test_triton_is_not_installed(monkeypatch):
    monkeypatch.setattr("cbp_fast.backends.registry.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="backend 'triton' needs Triton: pip install triton"):
        attach(mlp((4, 5, 2)), "triton")


def test_the_interpreter_serves_no_gpu():
    device = torch.device("cuda")
    assert backend_for(device, None, Rule.nature()) == "reference"
    with pytest.raises(ValueError, match=r"cannot reach a GPU's memory from Triton's interpreter \(unset TRITON_INT"):
        backend_for(device, "triton", Rule.nature())


@pytest.mark.parametrize("version", ["3.5.1", "2.3.0+git1a2b", "3.2.0.post11"])
def test_an_old_triton_is_refused_before_it_is_used(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr("cbp_fast.backends.registry._module_of", None)
    assert backend_for(torch.device("cuda"), None, Rule.nature()) == "reference"
    with pytest.raises(ValueError, match=rf"must be 3.6 or newer and is {re.escape(version)} \(pip install \"triton>="):
        backend_for(torch.device("cpu"), "triton", Rule.nature())


@pytest.mark.parametrize("version", ["3.6.0+git9844da95", "3.7.1.post25", "3.9.2"])
def test_a_covered_triton_is_used_without_a_word(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    assert backend_for(torch.device("cpu"), "triton", Rule.nature()) == "triton"


@pytest.mark.parametrize("version", ["3.10.0", "4.0.0", "unknown"])
def test_another_triton_is_used_with_one_warning(version, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    with pytest.warns(UserWarning, match=f"Triton {version} is none of those that the tests cover \\(3.6 to 3.9\\)"):
        assert backend_for(torch.device("cpu"), "triton", Rule.nature()) == "triton"
    assert backend_for(torch.device("cpu"), "triton", Rule.nature()) == "triton"
