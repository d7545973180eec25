"""Copies and pickles of a model, traces, exports and other models that are made of it: nothing of ours goes along."""

import copy
import io
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from stream import momentum, same
from torch import nn
from two_groups import Net, attach, hooks_of, mlp

import cbp_fast
from cbp_fast import ContinualBackprop


def test_a_copied_model_carries_nothing_of_it(attached, everything):
    model, _, cbp, _ = attached
    other = copy.deepcopy(model)
    before = everything(cbp)
    F.mse_loss(other(torch.randn(4, 6)), torch.zeros(4, 3)).backward()
    assert everything(cbp) == before
    same(other.state_dict()["0.weight"], model.state_dict()["0.weight"])
    mine = ContinualBackprop(other, momentum(other))
    mine.remove()


def test_an_averaged_model_carries_nothing_of_it(attached, everything):
    model, _, cbp, _stream = attached
    averaged = torch.optim.swa_utils.AveragedModel(model)
    before = everything(cbp)
    averaged(torch.randn(4, 6))
    averaged.update_parameters(model)
    assert everything(cbp) == before


def test_a_pickled_model_carries_nothing_of_it(attached, everything):
    model, _, cbp, _ = attached
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    before = everything(cbp)
    other(torch.randn(4, 6))
    assert everything(cbp) == before
    ContinualBackprop(other)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "protocol 2": lambda model: pickle.loads(pickle.dumps(model, 2)),
    "python": lambda model: pickle._loads(pickle._dumps(model)),
    "averaged": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("take", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("lazy", [False, True])
def test_copies_carry_hooks_of_the_user_and_none_of_ours(take, lazy):
    model = Net() if lazy else mlp()
    theirs = [
        model.register_forward_pre_hook(print),
        model.register_forward_hook(print),
        next(model.children()).register_forward_pre_hook(print, with_kwargs=True),
    ]
    before = hooks_of(model)
    cbp = ContinualBackprop(model)
    assert hooks_of(take(model)) == before
    more = model.register_forward_pre_hook(id)
    cbp.remove()
    more.remove()
    # the dicts are those that the handles know
    assert hooks_of(model) == before
    for handle in theirs:
        handle.remove()
    assert not any(hooks[0] for owner in hooks_of(model) for hooks in owner.values())


def test_a_pickle_needs_no_cbp_fast(tmp_path):
    # the second waits for a forward
    now, later = attach()[0], nn.Bilinear(2, 3, 4)
    ContinualBackprop(later)
    # a dict that was copied by itself has the hooks still
    strays = []
    for owner in (now[2], later):
        stray = nn.Linear(2, 2)
        stray._forward_pre_hooks = owner._forward_pre_hooks.copy()
        stray._forward_pre_hooks_with_kwargs = owner._forward_pre_hooks_with_kwargs.copy()
        strays.append(stray)
    torch.save([now, later, *strays], tmp_path / "models")
    code = (
        "import sys, torch; sys.modules['cbp_fast'] = None\n"
        f"now, later, *strays = torch.load({str(tmp_path / 'models')!r}, weights_only=False)\n"
        "assert not any(m._forward_pre_hooks for model in (now, later) for m in model.modules())\n"
        "assert all(stray._forward_pre_hooks for stray in strays)\n"
        "[stray(torch.zeros(1, 2)).sum().backward() for stray in strays]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_asks_for_a_copy_or_for_remove():
    model, _, cbp = attach()
    for whole in (model, nn.Sequential(model)):
        with pytest.raises(AttributeError, match=r"TorchScript cannot compile its hooks; call its remove\(\) first"):
            torch.jit.script(whole)
    torch.jit.script(copy.deepcopy(model))
    cbp.remove()
    torch.jit.script(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_of_a_model_is_no_forward_and_has_nothing_of_ours():
    model, _, cbp = attach(capture="inline", backend="reference")
    traced = torch.jit.trace(model, torch.randn(2, 6))
    assert not cbp._engine.has_data
    plain = torch.jit.trace(copy.deepcopy(model), torch.randn(2, 6))
    one, other = (re.sub(r"\.___torch_mangle_\d+", "", str(graph)) for graph in (traced.graph, plain.graph))
    assert one == other


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_exported_in_training_mode_has_nothing_of_ours(strict):
    x = torch.randn(2, 6)
    model, _, cbp = attach()
    model.insert(4, cbp_fast.CBPLinear(nn.Linear(8, 8), nn.Linear(8, 8)))
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        programs = [torch.export.export(m, (x,), strict=strict) for m in (model, plain)]
    names = [[node.name for node in program.graph.nodes] for program in programs]
    assert names[0] == names[1]
    assert programs[0].constants == programs[1].constants == {}
    assert list(programs[0].state_dict) == list(programs[1].state_dict)
    assert not cbp._engine.has_data


def test_modules_that_take_over_its_hooks_are_named_and_cleaned():
    quantization = pytest.importorskip("torch.ao.quantization")
    model, optimizer, cbp = attach()
    prepared = nn.Sequential(quantization.QuantStub(), model, quantization.DeQuantStub()).train()
    prepared.qconfig = quantization.get_default_qat_qconfig("x86")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied = quantization.prepare_qat(prepared)
        assert not any(module._forward_pre_hooks for module in copied.modules())
        copied(torch.randn(4, 6)).sum().backward()
        quantization.prepare_qat(prepared, inplace=True)
    prepared(torch.randn(4, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"'0' was replaced after attaching; call refresh\(\)"):
        optimizer.step()
    cbp.remove()
    assert not any(module._forward_pre_hooks for module in prepared.modules())
    optimizer.step()
