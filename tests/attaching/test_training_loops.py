"""Every optimizer and way of training: what a reset leaves of an optimizer's state, and what a loop may do."""

import threading

import pytest
import torch
from torch import nn

from cbp_fast import ContinualBackprop, UnitGroup

EAGER = {"replacement_rate": 0.1, "maturity_threshold": 2, "decay_rate": 0.9, "seed": 7}
OPTIMIZERS = {
    "SGD": (torch.optim.SGD, {"lr": 0.01}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "SGD fused": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9, "fused": True}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "Rprop": (torch.optim.Rprop, {"lr": 0.01}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.5}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "Adam foreach": (torch.optim.Adam, {"lr": 0.01, "foreach": True}),
    "Adam fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "AdamW fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.01}),
    "Adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
}
# their update depends on nothing but an entry's own state, which starts at zero
FRESH = ("SGD", "SGD momentum", "SGD fused", "Adagrad", "RMSprop", "Adadelta")


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3)]
    return nn.Sequential(*layers)


class Training:
    """A model, its optimizer and continual backprop, on batches that are the same every time."""

    def __init__(self, optimizer="SGD momentum", model=None, **options):
        self.model = network() if model is None else model
        make, arguments = OPTIMIZERS[optimizer]
        self.optimizer = make(self.model.parameters(), **arguments)
        self.cbp = ContinualBackprop(self.model, self.optimizer, **(EAGER | options))
        self.generator = torch.Generator().manual_seed(3)
        self.replaced = []

    def batch(self, size=8):
        return torch.randn(size, 6, generator=self.generator)

    def loss(self, size=8):
        return (self.model(self.batch(size)) - 1).square().mean()

    def note(self):
        self.replaced.append({name: units.tolist() for name, units in self.cbp.last_replaced.items()})

    def train(self, steps):
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
            self.note()
        return self


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_replaced_units_is_zero_and_no_other(name, backend):
    """Every tensor of the parameter's shape in the optimizer's state is zero at the entries of a replaced unit."""
    run = Training(name, backend=backend)
    steps = 0
    while not (run.replaced and run.replaced[-1].get("2")):
        run.train(1)
        steps += 1
        assert steps < 30
    units = run.replaced[-1]["2"]
    others = [j for j in range(16) if j not in units + run.replaced[-1]["0"]]
    slots = 0
    weight, bias, norm, reader = run.model[2].weight, run.model[2].bias, run.model[3].weight, run.model[5].weight
    assert not bias.detach()[units].any()
    assert not reader.detach()[:, units].any()
    for parameter, entries in ((weight, (units,)), (bias, (units,)), (norm, (units,)), (reader, (slice(None), units))):
        for slot in run.optimizer.state[parameter].values():
            if isinstance(slot, torch.Tensor) and slot.shape == parameter.shape:
                slots += 1
                assert not slot[entries].any()
                assert torch.isfinite(slot).all()
    for slot in run.optimizer.state[weight].values():
        if isinstance(slot, torch.Tensor) and slot.shape == weight.shape and slot.any():
            assert slot[others].any()
    assert slots or name in ("SGD", "Adafactor")


@pytest.mark.parametrize("name", FRESH)
def test_the_next_update_of_a_replaced_unit_is_a_fresh_optimizers(name):
    """Where no step of the whole tensor is counted, new weights are updated as on the first day."""
    run = Training(name)
    while not (run.replaced and run.replaced[-1].get("2")):
        run.train(1)
    units = run.replaced[-1]["2"]
    before = [p.detach().clone() for p in run.model.parameters()]
    loss = run.loss()
    run.optimizer.zero_grad()
    loss.backward()
    gradients = [p.grad.clone() for p in run.model.parameters()]
    run.cbp.remove()
    run.optimizer.step()
    fresh = [p.clone().requires_grad_() for p in before]
    make, arguments = OPTIMIZERS[name]
    optimizer = make(fresh, **arguments)
    for p, gradient in zip(fresh, gradients, strict=True):
        p.grad = gradient
    optimizer.step()
    names = [n for n, _ in run.model.named_parameters()]
    for n, p, q in zip(names, run.model.parameters(), fresh, strict=True):
        entries = {"2.weight": (units,), "2.bias": (units,), "3.weight": (units,), "3.bias": (units,)}.get(n)
        entries = (slice(None), units) if n == "5.weight" else entries
        if entries is not None:
            torch.testing.assert_close(p[entries], q[entries], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Adam", "Adam fused", "AdamW"])
def test_adam_corrects_new_weights_by_the_steps_of_the_whole_tensor(name):
    """The documented difference: moments start at zero, the correction of their bias is that of step t."""
    run = Training(name)
    run.train(20)
    while not run.replaced[-1].get("2"):
        run.train(1)
    units = run.replaced[-1]["2"]
    weight = run.model[2].weight
    before, t = weight.detach().clone(), int(run.optimizer.state[weight]["step"]) + 1
    run.optimizer.zero_grad()
    run.loss().backward()
    run.cbp.remove()
    run.optimizer.step()
    first = (1 - 0.9) / (1 - 0.9**t) * weight.grad.double()
    second = (1 - 0.999) / (1 - 0.999**t) * weight.grad.double().square()
    decay = 0.01 * 0.01 if name == "AdamW" else 0.0
    expected = before.double() * (1 - decay) - 0.01 * first / (second.sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach().double()[units], expected[units], rtol=1e-5, atol=1e-6)


def test_factored_state_is_left_alone():
    run = Training("Adafactor").train(12)
    state = run.optimizer.state[run.model[2].weight]
    assert {key for key, value in state.items() if value.shape != run.model[2].weight.shape} >= {"row_var", "col_var"}
    assert sum(run.cbp.num_replaced.values()) > 0
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_parameter_groups_of_an_optimizer():
    one, other = Training(), Training()
    other.cbp.remove()
    other.optimizer = torch.optim.SGD(
        [{"params": layer.parameters()} for layer in other.model], lr=0.01, momentum=0.9, nesterov=True
    )
    other.cbp = ContinualBackprop(other.model, other.optimizer, **EAGER)
    assert one.train(15).replaced == other.train(15).replaced


def test_a_closure_that_runs_the_model_several_times(backend):
    """LBFGS runs forward and backward as often as it likes; a step of continual backprop follows its step."""
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    cbp = ContinualBackprop(model, optimizer, backend=backend, **EAGER)
    x = torch.randn(16, 6)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(8):
        optimizer.step(closure)
    assert cbp.state_dict()["step"] == 8
    assert cbp.age["0"].max() <= 8
    assert sum(cbp.num_replaced.values()) > 0


def test_accumulated_gradients_clipped(backend):
    """Four batches of two are one batch of eight: the same means and, with what is exact, the same choice."""
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    whole = Training(model=model, backend=backend)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(10):
        whole.optimizer.zero_grad()
        whole.loss().backward()
        nn.utils.clip_grad_norm_(whole.model.parameters(), 0.1)
        whole.optimizer.step()
        whole.note()
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    model.load_state_dict(state)
    parts = Training(model=model, backend=backend)
    for _ in range(10):
        parts.optimizer.zero_grad()
        for x in parts.batch().split(2):
            ((model(x) - 1).square().mean() / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        parts.optimizer.step()
        parts.note()
    assert parts.replaced == whole.replaced
    assert any(any(units.values()) for units in whole.replaced)
    torch.testing.assert_close(parts.cbp.utility, whole.cbp.utility, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, dtype):
    run = Training("Adam", backend=backend)
    for _ in range(12):
        run.optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = run.loss()
        loss.backward()
        run.optimizer.step()
    assert sum(run.cbp.num_replaced.values()) > 0
    assert all(u.dtype == torch.float32 and torch.isfinite(u).all() for u in run.cbp.utility.values())


@pytest.mark.parametrize("name", ["Adam", "Adam fused"])
def test_a_grad_scaler_that_overflows(backend, everything, name):
    """An update that is skipped ages nothing; training goes on."""
    run = Training(name, backend=backend).train(4)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, float("inf"), 1.0, 1.0):
        run.optimizer.zero_grad()
        before, step = everything(run.model), run.cbp.state_dict()["step"]
        loss = run.loss()
        scaler.scale(loss * factor).backward()
        scaler.step(run.optimizer)
        scaler.update()
        if factor == 1.0:
            assert run.cbp.state_dict()["step"] == step + 1
        else:
            assert run.cbp.state_dict()["step"] == step
            weights = {k: v for k, v in everything(run.model).items() if "weight" in k or "bias" in k}
            assert weights == {k: before[k] for k in weights}


def test_a_forward_that_raises_leaves_training_able_to_go_on(backend):
    class Sometimes(nn.Module):
        fails = False

        def forward(self, x):
            if self.fails:
                raise RuntimeError("no")
            return x

    model = network()
    model.insert(5, Sometimes())
    run = Training(model=model, backend=backend).train(2)
    model[5].fails = True
    with pytest.raises(RuntimeError, match="no"):
        run.loss()
    model[5].fails = False
    run.train(8)
    assert sum(run.cbp.num_replaced.values()) > 0


def test_functional_call_is_observed_like_a_forward(backend):
    run = Training(backend=backend)
    x = run.batch()
    torch.func.functional_call(run.model, dict(run.model.named_parameters()), (x,)).sum().backward()
    run.optimizer.step()
    assert run.cbp.age["0"].tolist() == [1] * 16


def test_two_models_in_two_threads(backend):
    """What each of two threads trains is what one alone would."""
    alone = [Training(backend=backend, seed=seed).train(25) for seed in (1, 2)]
    together = [Training(backend=backend, seed=seed) for seed in (1, 2)]
    threads = [threading.Thread(target=run.train, args=(25,)) for run in together]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert one.replaced == other.replaced
        for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(p, q)
    assert alone[0].cbp.num_replaced["0"] > 0


def test_a_frozen_layer_is_named():
    model = network()
    model[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'2\.weight' is frozen"):
        ContinualBackprop(model, groups=UnitGroup("2", "2", "5", "3"))
