"""What a step on the Triton backend launches, which tables it keeps, and on which device, stream and graph."""

import contextlib
import itertools
import re
import time

import pytest
import torch
from group_cases import RULES
from torch import nn
from triton_runs import attach, engine_of, mlp, train

from cbp_fast import Rule
from cbp_fast.backends.triton import backend as triton_backend
from cbp_fast.backends.triton import launching, sending, tables
from cbp_fast.step import observer

pytestmark = pytest.mark.usefixtures("interpreter")


def test_a_step_takes_two_launches(monkeypatch):
    launched = []
    plain = launching.launch

    def launch(kernel, *args):
        launched.append(kernel.fn.__name__)
        plain(kernel, *args)

    monkeypatch.setattr(launching, "launch", launch)
    train("triton", Rule.nature(), (4, 5, 6, 7, 2), 2, replacement_rate=1.0, maturity_threshold=0)
    assert launched == ["select", "reinit"] * 2


@pytest.mark.parametrize(
    ("rule", "kernels"),
    [
        ("clarena", ["select", "score", "reinit"]),
        ("random", ["score", "reinit"]),
        ("zero_contribution", ["capture", "hat", "capture", "select", "reinit"]),
        ("nature transfer", ["capture", "capture", "select", "transfer", "reinit"]),
    ],
)
def test_launches_of_other_rules(rule, kernels, monkeypatch):
    launched = []
    plain = launching.launch
    monkeypatch.setattr(
        launching, "launch", lambda kernel, *args: launched.append(kernel.fn.__name__) or plain(kernel, *args)
    )
    train("triton", RULES[rule], (6, 6, 6, 2), 1, replacement_rate=1.0, maturity_threshold=0, capture="deferred")
    assert launched == kernels


def test_tables_are_built_once_and_addresses_followed():
    """New activations of the same shape, and a re-assigned weight, take new addresses and no new tables."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.Linear(6, 3)]
    cbp = engine_of([([layers[0]], [layers[1]])], backend="triton", replacement_rate=0.0, decay_rate=0.0)
    expected = []
    for _ in range(3):
        h = torch.randint(-3, 4, (5, 6)).float()
        layers[1].weight = nn.Parameter(torch.randint(-3, 4, (3, 6)).float())
        cbp._engine.record(0, h)
        cbp.step()
        expected.append(h.abs().mean(0) * layers[1].weight.abs().sum(0))
        torch.testing.assert_close(cbp.utility["g0"], expected[-1], rtol=1e-6, atol=0)
    (plan,) = tables.tables_of(cbp._engine.state).steps.values()
    assert plan.programs == 2


def count_tables(monkeypatch):
    made = []
    plain = sending.upload
    monkeypatch.setattr(sending, "upload", lambda *args: made.append(1) or plain(*args))
    return made


@pytest.mark.parametrize("readers", [3, 24])
def test_tables_of_readers_that_are_captured_inline_are_kept(readers, monkeypatch):
    """However many there are, with the shapes of a few batches in turn."""
    layers = [nn.Linear(2, 2) for _ in range(readers + 1)]
    groups = [([a], [b]) for a, b in itertools.pairwise(layers)]
    cbp = engine_of(groups, backend="triton", capture="inline", replacement_rate=0.0)

    def forward(samples):
        for i in range(readers):
            cbp._engine.record(i, torch.ones(samples, 2))

    for samples in (1, 2, 3):
        forward(samples)
    made = count_tables(monkeypatch)
    for samples in (3, 1, 2, 1):
        forward(samples)
    assert not made
    forward(4)
    assert made


def test_tables_that_were_not_used_for_long_are_forgotten(monkeypatch):
    cbp = engine_of([([nn.Linear(2, 2)], [nn.Linear(2, 2)])], backend="triton", capture="inline")
    for samples in range(1, tables._KEPT + 3):
        cbp._engine.record(0, torch.ones(samples, 2))
        cbp._engine.record(0, torch.ones(1, 2))
    made = count_tables(monkeypatch)
    cbp._engine.record(0, torch.ones(1, 2))
    cbp._engine.record(0, torch.ones(tables._KEPT + 2, 2))
    assert not made
    cbp._engine.record(0, torch.ones(2, 2))
    assert made


def test_addresses_are_sent_on_the_device_of_the_launch(monkeypatch):
    """Events and copies are of the current device, as launches are."""
    inside = []

    class Device:
        def __enter__(self):
            inside.append(1)

        def __exit__(self, *error):
            inside.pop()

    sent, launched = [], []
    send, launch = sending.Sender.send, launching.launch
    monkeypatch.setattr(tables.Tables, "on_device", lambda self: Device())
    monkeypatch.setattr(sending.Sender, "send", lambda *args: sent.append(bool(inside)) or send(*args))
    monkeypatch.setattr(launching, "launch", lambda *args: launched.append(bool(inside)) or launch(*args))
    for rule, capture in (("nature", "deferred"), ("mean transfer", "inline")):
        rule = RULES.get(rule, Rule.gnt("zero_contribution", transfer_bias=True))
        train("triton", rule, (4, 5, 6, 2), 2, replacement_rate=1.0, maturity_threshold=0, capture=capture)
    assert sent
    assert launched
    assert all(sent + launched)


@pytest.fixture
def with_stream(monkeypatch):
    """A group whose activations were seen on one stream; call it with that and the step's."""

    def step(seen, here):
        cbp = engine_of([([nn.Linear(2, 4)], [nn.Linear(4, 2)])], backend="triton")
        cbp._engine.record(0, torch.ones(3, 4))
        cbp._engine._streams = {observer.Stream(*seen)}
        monkeypatch.setattr(observer, "stream_of", lambda device: observer.Stream(*here))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
        kept = []
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda h, stream: kept.append(stream))
        cbp.step()
        assert cbp.age["g0"].sum() <= 4
        return kept

    return step


def test_activations_of_another_stream_are_kept_for_this_one(with_stream):
    assert with_stream((1, False), (2, False)) == [(2, False)]
    assert with_stream((1, False), (1, False)) == []
    # the whole step is captured
    assert with_stream((1, True), (1, True)) == []


def test_a_graph_of_the_forward_alone_is_an_error(with_stream):
    with pytest.raises(RuntimeError, match=r"captured in a CUDA graph, and the step .* was not.*capture='inline'"):
        with_stream((1, True), (1, False))


@pytest.mark.parametrize("capture", ["deferred", "inline"])
def test_a_graph_is_captured_before_the_first_step(capture, monkeypatch):
    cbp = engine_of([([nn.Linear(2, 4)], [nn.Linear(4, 2)])], backend="triton", capture=capture)

    def step():
        cbp._engine.record(0, torch.ones(3, 4))
        cbp.step()

    with monkeypatch.context() as patch:
        patch.setattr(sending, "is_capturing", lambda device: True)
        with pytest.raises(
            RuntimeError, match="run a step with inputs of the same shape before each capture of a CUDA"
        ):
            step()
    step()
    assert cbp.age["g0"].tolist().count(1) == 2


def test_kernels_are_compiled_when_attaching_and_once(monkeypatch, caplog):
    compiled = []

    def compile_(kernel, device, meta):
        compiled.append(kernel.fn.__name__)
        time.sleep(0.02)

    monkeypatch.setattr(launching, "compile_ahead", compile_)
    monkeypatch.setattr(triton_backend, "is_interpreted", lambda: False)
    monkeypatch.setattr("cbp_fast.backends.registry.why_not_triton", lambda *args: None)
    monkeypatch.setattr(triton_backend, "_QUICK", 0.01)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    mlp_cbp = attach(mlp((4, 5, 2)), "triton", capture="deferred")
    assert compiled == ["select", "reinit"]
    (message,) = caplog.messages
    assert re.fullmatch(r"compiling select, reinit for cpu, once; they are kept in .*", message)
    assert mlp_cbp.backend == "triton"
    caplog.clear()
    monkeypatch.setattr(triton_backend, "_QUICK", 60)
    attach(mlp((4, 5, 2)), "triton", rule=RULES["centred transfer"], replacement_rate=0.0)
    assert set(compiled) == {"select", "reinit", "capture", "hat", "transfer"}
    assert not caplog.messages


def test_a_compiled_kernel_is_launched_again_without_triton(monkeypatch):
    """By what it was compiled for and the device; the interpreter compiles nothing."""
    launches = []

    class Compiled:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args: launches.append((self.name, grid, args))

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **meta: launches.append(("first", grid, args)) or Compiled(meta["A"])

    monkeypatch.setattr(launching, "_compiled", {})
    kernel, x = Kernel(), torch.zeros(1, dtype=torch.int64)
    for a in (1, 1, 2, 1):
        launching.launch(kernel, (7,), (x,), {"A": a, "B": 5})
    assert launches == [
        ("first", (7,), (x,)),
        (1, (7, 1, 1), (x, 1, 5)),
        ("first", (7,), (x,)),
        (1, (7, 1, 1), (x, 1, 5)),
    ]


CHANGES = {
    "frozen": (lambda model, optimizer: model[2].weight.requires_grad_(False), "2.weight was frozen"),
    "shape": (lambda model, optimizer: setattr(model[2].weight, "data", torch.zeros(6, 4)), "2.weight has shape"),
    "dtype": (lambda model, optimizer: setattr(model[0].bias, "data", model[0].bias.data.double()), "0.bias has dtype"),
    "gone": (lambda model, optimizer: setattr(model[0], "bias", None), "0.bias is no longer there"),
    "state": (
        lambda model, optimizer: optimizer.state[model[2].weight].update(exp_avg=torch.zeros(6, 5).to_sparse()),
        "keeps exp_avg of '2.weight' as a torch.sparse_coo",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_many_steps_is_noticed(change, everything):
    """All is looked at again once something is another object, has another layout, or is not trained."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.Adam(model.parameters())
    cbp = attach(model, "triton", optimizer=optimizer, capture="deferred")
    for _ in range(3):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
    assert cbp._engine._known.still([optimizer])
    model(torch.randn(3, 4))
    CHANGES[change][0](model, optimizer)
    before = everything(cbp)
    with pytest.raises(RuntimeError, match=CHANGES[change][1]):
        cbp.step()
    assert everything(cbp) == before


def test_state_of_the_optimizer_is_followed():
    """Loaded, cleared, or given anew for one parameter: what it is then is reset."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    optimizer = torch.optim.Adam(model.parameters())
    attach(model, "triton", optimizer=optimizer, replacement_rate=1.0, maturity_threshold=0)

    def new_entry():
        state = optimizer.state[model[0].weight]
        optimizer.state[model[0].weight] = {key: value.clone() for key, value in state.items()}

    def another_memory():
        optimizer.state[model[0].weight]["exp_avg"].data = torch.zeros(5, 4)

    changes = [lambda: None, lambda: optimizer.load_state_dict(optimizer.state_dict()), new_entry, another_memory]
    changes += [optimizer.state.clear, lambda: setattr(model[0].weight, "data", model[0].weight.data.clone())]
    for change in changes:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
            assert not optimizer.state[model[0].weight]["exp_avg"].any()
            assert not optimizer.state[model[2].weight]["exp_avg_sq"].any()
        change()


def test_transfers_in_a_circle_of_layers(monkeypatch):
    """What the first group drew anew is what the second one's replaced units gave: three launches, and two more."""
    results, launched = [], []
    launch = launching.launch
    monkeypatch.setattr(
        launching, "launch", lambda kernel, *args: launched.append(kernel.fn.__name__) or launch(kernel, *args)
    )
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        there, back = nn.Linear(4, 8), nn.Linear(8, 4)
        for layer in (there, back):
            layer.weight.data.copy_(torch.randint(-3, 4, layer.weight.shape))
        groups = [([there], [back]), ([back], [there])]
        cbp = engine_of(groups, Rule.nature(transfer_bias=True), backend=backend, decay_rate=0.5)
        for step in range(2):
            for slot, units in enumerate((8, 4)):
                cbp._engine.record(slot, torch.randint(-3, 4, (4, units)).float())
            cbp.step()
            assert len(cbp.last_replaced["g0"]) == 4, step
        results.append([p.detach() for layer in (there, back) for p in layer.parameters()])
    assert launched == ["capture", "capture", "select", "transfer", "reinit", "transfer", "reinit"] * 2
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_forward_that_sums_what_another_stream_held_keeps_it(monkeypatch):
    cbp = engine_of([([nn.Linear(2, 4)], [nn.Linear(4, 2)])], backend="triton")
    cbp._engine.record(0, torch.ones(3, 4))
    cbp._engine._streams = {observer.Stream(1, False)}
    cbp._engine._inline[0] = True
    kept = []
    monkeypatch.setattr(observer, "stream_of", lambda device: observer.Stream(2, False))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: 2)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda h, stream: kept.append(stream))
    cbp._engine.record(0, torch.ones(3, 4))
    assert kept == [2]
    assert cbp._engine.state.count.tolist() == [6]
