"""A model that changed under it: an error with the name, and nothing happened."""

import pytest
import torch
from stream import EAGER, Stream, mlp, momentum, observed
from torch import nn
from torch.nn.utils import prune

from cbp_fast import ContinualBackprop, Rule


def failing_step(cbp, message):
    with pytest.raises(RuntimeError, match=message):
        cbp.step()


def replaced_parameter(module, key, change):
    def apply(model):
        owner = model[module]
        setattr(owner, key, nn.Parameter(change(getattr(owner, key).detach())))

    return apply


CHANGES = {
    "weight wider": (replaced_parameter(2, "weight", lambda w: w.repeat(1, 2)), r"2\.weight has shape \(16, 32\)"),
    "weight shorter": (replaced_parameter(5, "weight", lambda w: w[:2]), r"5\.weight has shape \(2, 16\)"),
    "weight flat": (replaced_parameter(0, "weight", lambda w: w.flatten()), r"0\.weight has shape \(96,\)"),
    "weight double": (replaced_parameter(2, "weight", lambda w: w.double()), r"2\.weight has dtype torch\.float64"),
    "bias shorter": (replaced_parameter(0, "bias", lambda b: b[:-1]), r"0\.bias has shape \(15,\)"),
    "bias half": (replaced_parameter(2, "bias", lambda b: b.half()), r"2\.bias has dtype torch\.float16"),
    "bias gone": (lambda model: setattr(model[2], "bias", None), r"2\.bias is no longer there"),
    "norm wider": (replaced_parameter(3, "weight", lambda w: w.repeat(2)), r"3\.weight has shape \(32,\)"),
    "statistics double": (
        lambda model: setattr(model[3], "running_var", model[3].running_var.double()),
        r"3\.running_var has dtype torch\.float64",
    ),
    "weight on another device": (
        replaced_parameter(5, "weight", lambda w: w.to("meta")),
        r"5\.weight is on meta but .* cpu; call cbp\.to\('meta'\)",
    ),
    "bias on another device": (
        replaced_parameter(0, "bias", lambda b: b.to("meta")),
        r"0\.bias is on meta but .* cpu; call cbp\.to\('meta'\)",
    ),
    "weight pruned": (lambda model: prune.l1_unstructured(model[2], "weight", 0.5), r"2\.weight is no longer there"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize(
    "rule", ["nature", Rule.gnt("adaptable_contribution", transfer_bias=True)], ids=["nature", "gnt"]
)
@pytest.mark.parametrize("capture", ["inline", "deferred"])
def test_a_changed_parameter_is_named_and_nothing_happens(backend, everything, capture, rule, change, message):
    model = mlp()
    optimizer = momentum(model)
    cbp = ContinualBackprop(model, rule=rule, capture=capture, backend=backend, **EAGER)
    cbp._optimizers = [optimizer]
    stream = Stream(model, optimizer)
    for _ in range(4):
        stream.train()
        cbp.step()
    stream.train()
    cbp.replacement_rate = 1
    originals = [(owner, key, owner[key]) for m in model for owner in (m._parameters, m._buffers) for key in owner]
    change(model)
    before = everything(*model, cbp), everything(optimizer)
    for _ in range(2):
        failing_step(cbp, message)
        assert (everything(*model, cbp), everything(optimizer)) == before

    # made good again, the step takes place with what was observed
    for owner, key, tensor in originals:
        owner[key] = tensor
    cbp.step()
    assert cbp.state_dict()["step"] == 5
    assert len(cbp.last_replaced["0"]) > 0


def test_a_model_that_moved_asks_for_to(backend):
    model = mlp()
    cbp = ContinualBackprop(model, backend=backend)
    model(torch.randn(2, 6))
    model.to("meta")
    failing_step(cbp, r"cbp\.to\('meta'\)")
    model(torch.randn(2, 6, device="meta"))
    failing_step(cbp, r"cbp\.to\('meta'\)")


def test_forwards_on_another_device_do_not_stop_a_model_that_came_back(backend):
    model = mlp()
    cbp = ContinualBackprop(model, backend=backend)
    parameters = {key: value.clone() for key, value in model.state_dict().items()}
    model.to("meta")
    model(torch.randn(2, 6, device="meta"))
    model.to_empty(device="cpu").load_state_dict(parameters)
    model(torch.randn(2, 6))
    assert observed(cbp)


def test_a_model_cast_to_another_type_is_named(backend):
    model = mlp()
    cbp = ContinualBackprop(model, backend=backend)
    model(torch.randn(2, 6))
    model.bfloat16()
    failing_step(cbp, r"weight has dtype torch\.bfloat16 but had torch\.float32")


def test_a_weight_set_anew_is_followed(backend):
    model = mlp()
    cbp = ContinualBackprop(model, replacement_rate=1, maturity_threshold=0, backend=backend)
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)
    model(torch.randn(4, 6))
    cbp.step()
    assert (model[5].weight == 0).all()


@pytest.mark.parametrize(
    "slot",
    [
        lambda p: torch.ones(p.shape, device="meta"),
        lambda p: torch.ones(p.shape).to_sparse(),
        lambda p: torch.ones(p.shape).to(torch.float8_e4m3fn),
    ],
    ids=["another device", "sparse", "float8"],
)
def test_an_optimizer_state_that_cannot_be_zeroed_stops_the_step_before_it_began(backend, everything, slot):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    cbp = ContinualBackprop(model, optimizer, backend=backend, **{**EAGER, "replacement_rate": 0.0})
    stream = Stream(model, optimizer)
    stream.train(4)
    optimizer.state[model[5].weight]["slot"] = slot(model[5].weight)
    cbp.replacement_rate = 1
    loss = stream.loss()
    before = everything(model, cbp)
    with pytest.raises((RuntimeError, NotImplementedError)):
        cbp.step()
    assert everything(model, cbp) == before
    loss.backward()
