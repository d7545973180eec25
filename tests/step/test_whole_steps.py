"""A step is whole or nothing, whatever ends it; what cannot be read or written is named and stops nothing else."""

import ctypes
import mmap
import signal
import sys
import time
import warnings

import pytest
import torch
from torch import nn

from cbp_fast import _C, CBPLinear, ContinualBackprop, Rule
from cbp_fast.step.together import step_together

RATES = {"replacement_rate": 0.4, "maturity_threshold": 0, "decay_rate": 0.9}
RULES = {
    "nature": Rule.nature(),
    "transfer": Rule.nature(transfer_bias=True),
    "centred": Rule.gnt("adaptable_contribution", transfer_bias=True),
    "random": Rule.gnt("random", accumulate=False),
}


class Run:
    """A small network, its optimizer and what trains them."""

    def __init__(self, backend, rule="nature", capture="deferred", optimizers=1, steps=3):
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
        parts = [list(self.model.parameters())[i::optimizers] for i in range(optimizers)]
        self.optimizers = [torch.optim.Adam(part, 0.01) for part in parts]
        self.cbp = ContinualBackprop(
            self.model, self.optimizers, rule=RULES[rule], backend=backend, capture=capture, seed=3, **RATES
        )
        self.engines = [self.cbp._engine]
        self.train(range(steps))

    def forward(self, number):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        self.model(x).square().mean().backward()

    def train(self, numbers):
        for number in numbers:
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            self.forward(number)
            for optimizer in self.optimizers:
                optimizer.step()

    def step(self):
        self.cbp.step()

    def tensors(self):
        """All that a step may change."""
        slots = [
            value for o in self.optimizers for kept in o.state.values() for value in kept.values() if value.dim() > 0
        ]
        return [*self.model.parameters(), *slots, *(engine.state.buffer for engine in self.engines)]

    def everything(self):
        return [t.detach().clone() for t in self.tensors()]


class Layers(Run):
    """The same with two layers of our own, whose engines step together."""

    def __init__(self, backend, rule="nature", capture="deferred", optimizers=1, steps=3):
        torch.manual_seed(1)
        a, b, c = nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)
        rates = {**RATES, "decay_rate": 0.5}
        self.layers = [CBPLinear(a, b, **rates), CBPLinear(b, c, **rates)]
        self.model = nn.Sequential(a, nn.Tanh(), self.layers[0], b, nn.Tanh(), self.layers[1], c)
        self.optimizers = [torch.optim.Adam([*a.parameters(), *b.parameters(), *c.parameters()], 0.01)]
        self.engines = [layer._engine for layer in self.layers]
        for i, engine in enumerate(self.engines):
            engine.use(backend)
            engine.state.seed.fill_(i)
        self.train(range(steps))

    def step(self):
        step_together(self.engines, self.optimizers)


class Stopped(BaseException):
    """What no code expects."""


def stopped_at(point, call, events=("line", "return")):
    """Raise at the point-th place of the package's own code; whether there was such a one."""
    seen = 0

    def trace(frame, event, arg):
        nonlocal seen
        if "cbp_fast" not in frame.f_code.co_filename or "tests" in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = "opcode" in events
        if event in events:
            seen += 1
            if seen > point:
                raise Stopped
        return trace

    try:
        sys.settrace(trace)
        call()
    except Stopped:
        return True
    finally:
        sys.settrace(None)
    return False


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


CASES = {
    "cpp": (Run, "cpp", "nature", "deferred", 1),
    "cpp transfer": (Run, "cpp", "transfer", "deferred", 1),
    "cpp inline": (Run, "cpp", "centred", "inline", 1),
    "cpp several optimizers": (Run, "cpp", "nature", "auto", 2),
    "cpp layers": (Layers, "cpp", "nature", "deferred", 1),
    "reference transfer": (Run, "reference", "transfer", "deferred", 1),
    "reference layers": (Layers, "reference", "nature", "deferred", 1),
    "triton": (Run, "triton", "nature", "deferred", 1),
}


def check_every_place(case, steps, events, stride):
    kind, *arguments = case

    def prepared():
        run = kind(*arguments, steps=steps)
        run.forward(100)
        return run

    whole = prepared()
    # one run is put back for every place
    run = prepared()
    before = run.everything()
    whole.step()
    after = whole.everything()
    assert not same(before, after)
    # which replaces nothing, and says so
    whole.step()
    idle = whole.everything()
    forwards = [(engine._forwards, set(engine._storages)) for engine in run.engines]
    points = taken_back = 0
    while stopped_at(points, run.step, events):
        # without asking the package for anything
        now = [t.detach().clone() for t in run.tensors()]
        is_before = same(now, before)
        assert is_before or same(now, after), f"half a step at place {points}"
        taken_back += is_before
        # the step that follows: the same one, or one without a forward
        run.step()
        assert same(run.everything(), after if is_before else idle), f"another step after place {points}"
        assert not any(engine._forwards or engine._journal for engine in run.engines)
        with torch.no_grad():
            for t, old in zip(run.tensors(), before, strict=True):
                t.copy_(old)
        for engine, (held, storages) in zip(run.engines, forwards, strict=True):
            engine._forwards, engine._storages, engine._captured = held, storages, arguments[2] == "inline"
        points += stride
    assert points > stride
    assert taken_back > 0
    return points


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_step_that_is_stopped_at_any_line_is_whole_or_nothing(case):
    check_every_place(case, 3, ("line", "return"), {"cpp": 1, "reference": 7, "triton": 301}[case[1]])


def test_the_first_step_that_is_stopped_at_any_line_is_whole_or_nothing():
    check_every_place(CASES["cpp"], 0, ("line", "return"), 1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_step_that_is_stopped_anywhere_is_whole_or_nothing(case):
    check_every_place(
        case, 3, ("opcode", "line", "return", "call"), {"cpp": 3, "reference": 29, "triton": 997}[case[1]]
    )


@pytest.mark.parametrize("rule", ["nature", "centred"])
@pytest.mark.parametrize("capture", ["deferred", "inline"])
def test_a_forward_that_is_stopped_anywhere_leaves_what_can_be_stepped(backend, rule, capture):
    points = 0
    while True:
        run = Run(backend, rule, capture, steps=1)
        twin = Run(backend, rule, capture, steps=1)
        if not stopped_at(points, lambda run=run: run.forward(100)):
            break
        counts = [int(n) for n in run.cbp._engine.state.count]
        assert all(n in (0, 4) for n in counts)
        # nothing of a forward that another one follows is counted twice or by half
        run.cbp._engine.forget_forwards()
        for each in (run, twin):
            each.train(range(5, 7))
        assert same(run.everything(), twin.everything()), f"after place {points}"
        points += 2 if backend == "cpp" else 17
    assert points > 20


def test_an_exception_while_a_step_is_taken_back_is_made_good_by_the_next_use(monkeypatch):
    run = Run("cpp", "transfer")
    run.forward(100)
    before = run.everything()
    engine = run.cbp._engine
    with monkeypatch.context() as patch:
        patch.setattr(engine, "collect", lambda optimizers: 1 / 0)
        restore = engine.restore
        patch.setattr(engine, "restore", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.step()
        patch.setattr(engine, "restore", restore)
        assert same(run.everything(), before)
    run.step()
    assert engine._journal is None
    assert sum(map(len, run.cbp.last_replaced.values())) > 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
@pytest.mark.parametrize("kind", [Run, Layers])
def test_signals_leave_whole_steps(kind):
    run, generator = kind("cpp"), torch.Generator().manual_seed(0)

    def handler(*_):
        raise Stopped

    previous, interrupted = signal.signal(signal.SIGALRM, handler), 0
    try:
        start = time.perf_counter()
        run.forward(0)
        run.step()
        once = time.perf_counter() - start
        for number in range(300):
            run.forward(number)
            before = run.everything()
            delay = float(torch.rand((), generator=generator)) * once + 1e-6
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                run.step()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Stopped:
                interrupted += 1
                held = [bool(engine._forwards) for engine in run.engines]
                assert all(held) == any(held) == same(run.everything(), before)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert interrupted


# what cannot be written


class Wrapped(torch.Tensor):
    """A tensor that shows shape and type, and keeps its numbers elsewhere."""

    @staticmethod
    def __new__(cls, inner):
        new = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        new.inner = inner
        return new

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*(a.inner if isinstance(a, cls) else a for a in args), **(kwargs or {}))


def read_only(like):
    """A tensor of this shape in memory where a write ends the process."""
    size = max(like.numel() * 4, 1)
    memory = mmap.mmap(-1, size)
    tensor = torch.frombuffer(memory, dtype=torch.float32, count=like.numel()).view(like.shape)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(tensor.data_ptr())
    assert libc.mprotect(address, ctypes.c_size_t(size), 1) == 0
    return tensor


def freed(like):
    tensor = torch.zeros(like.shape)
    tensor.untyped_storage().resize_(0)
    return tensor


def half_freed(like):
    tensor = torch.zeros(like.shape)
    tensor.untyped_storage().resize_(8)
    return tensor


UNWRITABLE = {
    "wrapped": lambda like: Wrapped(torch.zeros(like.shape)),
    "freed": freed,
    "half freed": half_freed,
    "expanded": lambda like: torch.zeros(()).expand(like.shape),
    "overlapping": lambda like: torch.zeros(100).as_strided(like.shape, (1,) * like.dim()),
    "on another device": lambda like: torch.zeros(like.shape, device="meta"),
    "sparse": lambda like: torch.zeros(like.shape).to_sparse(),
    "of eight bits": lambda like: torch.zeros(like.shape).to(torch.float8_e5m2),
}
if sys.platform == "linux":
    UNWRITABLE["read-only"] = read_only


@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("engines", [Run, Layers])
def test_a_slot_that_cannot_be_written_is_named_and_nothing_changes(backend, engines, kind):
    run = engines(backend)
    run.forward(9)
    name = "4.weight" if engines is Run else "out_layer.weight"
    weight = run.model[-1].weight
    run.optimizers[0].state[weight]["first_moment"] = UNWRITABLE[kind](weight)
    kept = run.optimizers[0].state[weight].pop("first_moment")
    before = run.everything()
    run.optimizers[0].state[weight]["first_moment"] = kept
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"first_moment of '{name}'"):
            run.step()
    del run.optimizers[0].state[weight]["first_moment"]
    assert same(run.everything(), before)
    run.step()
    assert not same(run.everything(), before)


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
def test_a_weight_in_read_only_memory_is_named(backend):
    run = Run(backend)
    run.forward(9)
    weight = run.model[4].weight
    run.model[4].weight.data = read_only(weight)
    before = run.everything()
    with pytest.raises(RuntimeError, match=r"'4.weight' lies in memory that is read-only"):
        run.step()
    assert same(run.everything(), before)


def test_what_can_be_written_keeps_its_numbers():
    tensors = [torch.randn(3, 4).t(), torch.randn(5, 6)[1:, ::2], torch.empty(0), torch.randn(1).expand(1, 1)]
    before = [t.clone() for t in tensors]
    assert _C.unwritable(tensors, [t.untyped_storage().nbytes() for t in tensors]) is None
    assert same(tensors, before)
    many = [torch.randn(2) for _ in range(700)]
    assert _C.unwritable(many, [8] * 700) is None


# what cannot be read


def two_layers(backend, spatial=False, **options):
    if spatial:
        layers = [nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)]
    else:
        layers = [nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)]
    model = nn.Sequential(*layers)
    return model, ContinualBackprop(model, backend=backend, **options)


@pytest.mark.parametrize("capture", ["deferred", "inline"])
def test_any_number_of_axes_is_read(backend, capture):
    state = []
    for shape in ((12, 5), (1, 2, 1, 1, 3, 1, 1, 1, 2, 1, 5)):
        torch.manual_seed(0)
        model, cbp = two_layers(backend, capture=capture)
        model(torch.arange(60.0).view(shape))
        cbp.step()
        state.append(cbp.utility["0"].clone())
    torch.testing.assert_close(*state)


BAD = {
    "freed": freed,
    "half freed": half_freed,
    "sparse": lambda h: h.detach().to_sparse(),
    "too wide": lambda h: torch.zeros(3, 9),
    "integers": lambda h: torch.zeros(h.shape, dtype=torch.int64),
    "complex": lambda h: torch.zeros(h.shape, dtype=torch.complex64),
    "a scalar": lambda h: torch.zeros(()),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("capture", ["deferred", "inline"])
def test_a_forward_that_cannot_be_read_is_left_out_once(backend, capture, kind):
    _, cbp = two_layers(backend, capture=capture)
    good = torch.randn(3, 6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            bad = BAD[kind](good)
            cbp._engine.record(0, good)
            cbp._engine.record(0, bad)
            cbp.step()
    if backend == "cpp" or said:
        assert ["that 2 read" in str(w.message) for w in said] == [True]
    assert cbp.age["0"].tolist() == [3] * 6


def test_an_activation_that_is_freed_before_the_step_is_left_out(backend):
    _, cbp = two_layers(backend, capture="deferred")
    for i in range(3):
        h = torch.randn(3, 6)
        cbp._engine.record(0, h)
        cbp._engine.record(0, torch.ones(3, 6))
        h.untyped_storage().resize_(0)
        if i == 0:
            with pytest.warns(UserWarning, match="that 2 read in a forward were freed"):
                cbp.step()
        else:
            cbp.step()
    assert cbp.age["0"].tolist() == [3] * 6


# what is held


def test_a_view_counts_as_its_storage(backend):
    _, cbp = two_layers(backend)
    large = torch.randn(1000, 50, 6)
    cbp._engine.record(0, large[:, 0])
    assert cbp._engine.held_bytes == large.nbytes
    # once, however many views
    cbp._engine.record(0, large[:, 1])
    assert cbp._engine.held_bytes == large.nbytes
    # beyond 4 MiB, so that it is summed at once, after what was held
    huge = torch.randn(1000, 200, 6)
    cbp._engine.record(0, huge[:, 0])
    assert cbp._engine.held_bytes == 0
    assert int(cbp._engine.state.count) == 3000


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["object", "layer"])
def test_forwards_of_a_skipped_step_are_forgotten(kind, fused):
    torch.manual_seed(0)
    first, last = nn.Linear(5, 7), nn.Linear(7, 3)
    layer = CBPLinear(first, last, maturity_threshold=100) if kind == "layer" else nn.Identity()
    model = nn.Sequential(first, nn.ReLU(), layer, last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, fused=fused)
    owner = ContinualBackprop(model, optimizer) if kind == "object" else layer
    scaler, ages = torch.amp.GradScaler("cpu", init_scale=2.0**10), []
    for step in range(5):
        x = torch.randn(4, 5) * (float("inf") if step in (2, 3) else 1)
        optimizer.zero_grad()
        scaler.scale(model(x).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        ages.append(int(owner.age["0"][0] if kind == "object" else owner.age[0]))
    assert ages == [1, 2, 2, 2, 3]


def test_a_removed_object_leaves_the_scaler_as_it_was():
    before = torch.amp.GradScaler._maybe_opt_step
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    cbp = ContinualBackprop(model, torch.optim.SGD(model.parameters(), 0.01))
    cbp.remove()
    assert torch.amp.GradScaler._maybe_opt_step is before or "watched" in before.__name__


# the ends of integers, and where the state is


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("rule", ["nature", "centred", "random"])
def test_counters_stay_at_their_ends(backend, rule):
    run = Run(backend, rule)
    cbp = run.cbp
    cbp.replacement_rate = 0.0
    saved = cbp.state_dict()
    saved["step"] = 2**63 - 2
    for group in saved["groups"].values():
        group["age"].fill_(2**31 - 2)
        group["num_replaced"] = 2**63 - 3
    cbp.load_state_dict(saved)
    for number in range(3):
        run.train([number])
    assert all(ages.tolist() == [2**31 - 1] * len(ages) for ages in cbp.age.values())
    cbp.load_state_dict(cbp.state_dict())
    cbp.maturity_threshold = 2**31 - 2
    cbp.replacement_rate = 1.0
    run.train([7])
    assert cbp.num_replaced == {"0": 2**63 - 1, "2": 2**63 - 1}
    assert cbp.state_dict()["step"] == 2**63 - 1
    assert {name: len(units) for name, units in cbp.last_replaced.items()} == {"0": 7, "2": 6}


def test_the_high_bits_of_a_step_draw_anew_and_alike(philox):
    seed, stream = 12345678901234567890, 77
    drawn = []
    for step in (5, 2**32 + 5, 2**40 + 5, 2**48 - 1):
        mine = _C.philox_uniform(seed, step, stream, 0, 16)
        words = [
            philox.words((e // 4, ((step >> 32) << 16) % 2**32, step % 2**32, stream), (seed % 2**32, seed >> 32))
            for e in range(16)
        ]
        assert mine == [(words[e][e % 4] >> 8) * 2.0**-24 for e in range(16)]
        drawn.append(tuple(mine))
    assert len(set(drawn)) == 4


def test_backends_draw_alike_past_the_32nd_bit_of_a_step():
    weights = []
    for backend in ("reference", "cpp", "triton"):
        run = Run(backend, steps=0)
        saved = run.cbp.state_dict()
        saved["step"] = 2**40 + 3
        run.cbp.load_state_dict(saved)
        run.train(range(3))
        assert sum(run.cbp.num_replaced.values()) > 3
        weights.append([p.detach().clone() for p in run.model.parameters()])
    assert same(weights[0], weights[1])
    assert same(weights[0], weights[2])


def test_the_state_is_where_the_model_is_whatever_the_caller_is_in(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    expected = Run(backend).everything()

    def made(context):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
        groups = ContinualBackprop(model, backend=backend).groups
        torch.manual_seed(1)
        run = Run.__new__(Run)
        run.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
        run.optimizers = [torch.optim.Adam(run.model.parameters(), 0.01)]
        with context:
            run.cbp = ContinualBackprop(
                run.model, run.optimizers, groups=groups, backend=backend, capture="deferred", seed=3, **RATES
            )
        run.engines = [run.cbp._engine]
        run.train(range(3))
        return run

    for context in (torch.device("meta"), torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True)):
        assert same(made(context).everything(), expected), context
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).float()
        cbp = ContinualBackprop(model, backend=backend)
    finally:
        torch.set_default_dtype(default)
    assert (cbp._engine.state.hyper.dtype, cbp.utility["0"].dtype) == (torch.float64, torch.float32)
