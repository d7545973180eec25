"""What cannot be written or read is named and stops nothing else; what is held of forwards is counted."""

import ctypes
import mmap
import sys
import warnings

import pytest
import torch
from small_runs import Layers, Run, same
from torch import nn

from cbp_fast import _C, CBPLinear, ContinualBackprop

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
