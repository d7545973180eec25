"""Under torch.compile: models compiled before and after attaching, and compiled steps of an optimizer."""

import warnings

import pytest
import torch
import two_groups
from stream import EAGER, Stream, mlp, momentum
from torch import nn

from cbp_fast import ContinualBackprop


def _compiled_in_place(model):
    model.compile(backend="eager")
    return model


def _with_a_compiled_part(model):
    model[2].compile(backend="eager")
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("called", [False, True], ids=["never called", "called"])
@pytest.mark.parametrize(
    "compiled",
    [lambda model: torch.compile(model, backend="eager"), _compiled_in_place, _with_a_compiled_part],
    ids=["wrapped", "in place", "a part"],
)
def test_a_model_may_be_compiled_already(compiled, called):
    results = []
    for how in (lambda model: model, compiled):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = how(mlp())
        optimizer = momentum(model)
        stream = Stream(model, optimizer)
        if called:
            stream.train(3)
        cbp = ContinualBackprop(model, optimizer, maturity_threshold=2, replacement_rate=0.2, seed=0)
        stream.train(10)
        assert sum(cbp.num_replaced.values()) > 0
        results.append([*cbp.age.values(), *cbp.last_replaced.values(), *(p.detach() for p in model.parameters())])
        # what is compiled holds it
        cbp.remove()
    assert all(map(torch.equal, *results))


def test_a_compiled_model_is_observed_in_one_graph(everything):
    import torch._dynamo.testing  # takes a second

    results = []
    for compiled in (False, True):
        model = mlp()
        optimizer = momentum(model)
        cbp = ContinualBackprop(model, optimizer, **EAGER)
        counter = torch._dynamo.testing.CompileCounter()
        stream = Stream(torch.compile(model, backend=counter) if compiled else model, optimizer)
        stream.train(20)
        results.append(everything(model, optimizer, cbp))
    assert sum(cbp.num_replaced.values()) > 10
    assert results[0] == results[1]
    assert counter.frame_count == 1


def test_a_compiled_model_may_see_batches_of_any_size(everything):
    results = []
    for compiled in (False, True):
        model = mlp()
        optimizer = momentum(model)
        cbp = ContinualBackprop(model, optimizer, **EAGER)
        stream = Stream(torch.compile(model, backend="eager") if compiled else model, optimizer)
        for size in (8, 4, 5, 6, 8, 3) * 3:
            optimizer.zero_grad()
            stream.loss(size).backward()
            optimizer.step()
        results.append(everything(model, optimizer, cbp))
    assert sum(cbp.num_replaced.values()) > 8
    assert results[0] == results[1]


def test_a_compiled_step_of_the_optimizer_is_followed(everything):
    results = []
    for compiled in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        cbp = ContinualBackprop(model, optimizer, **EAGER)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        stream = Stream(model, optimizer)
        with warnings.catch_warnings():
            # no complaint of functions that torch.compile does not know
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "Dynamo")
            for _ in range(12):
                optimizer.zero_grad()
                stream.loss().backward()
                step()
        results.append(everything(model, cbp))
    assert sum(cbp.num_replaced.values()) > 4
    assert results[0] == results[1]


@pytest.mark.parametrize("compiled", ["module", "function"])
def test_a_model_that_was_compiled_before_is_compiled_anew(compiled):
    model = two_groups.mlp()
    optimizer = two_groups.sgd(model)
    run = torch.compile(model if compiled == "module" else lambda x: model(x), backend="eager")
    two_groups.train(run, optimizer, 2)
    cbp = ContinualBackprop(model, optimizer, **EAGER)
    two_groups.train(run, optimizer, 3)
    assert int(cbp.age["0"].max()) == 3
    # a reader that had no hook when it was compiled
    model[4] = nn.Linear(8, 3)
    optimizer.add_param_group({"params": model[4].parameters()})
    run(torch.randn(4, 6))
    cbp.refresh()
    two_groups.train(run, optimizer, 2)
    assert {int(age.max()) for age in cbp.age.values()} == {5}
