"""Looking at a model changes nothing of it, of its inputs, and of the random states."""

from __future__ import annotations

import array
import collections
import copy
import dataclasses
import functools
import random
import weakref

import numpy as np
import pytest
import torch
from known_networks import as_rows
from looked_at import Loud, X, names
from networks import Net
from torch import nn
from torch.nn.utils import parametrizations, prune

from cbp_fast.discovery import find_unit_groups
from cbp_fast.discovery.running import snapshot


class Frozen(collections.OrderedDict):
    """A dictionary that refuses to be changed, as configurations do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.frozen = True

    def _refuse(self, *args, **kwargs):
        raise RuntimeError("frozen")

    clear = pop = setdefault = _refuse

    def update(self, *args, **kwargs):
        if hasattr(self, "frozen"):
            self._refuse()
        super().update(*args, **kwargs)

    def __setitem__(self, key, value):
        if hasattr(self, "frozen"):
            self._refuse()
        super().__setitem__(key, value)


class Slotted:
    __slots__ = ("__dict__", "__hidden", "count", "empty")

    def __init__(self):
        self.count, self.__hidden, self.other = 0, [1], {}

    def change(self):
        self.count += 1
        self.__hidden.append(2)
        self.empty = [3]
        self.other["new"] = 4
        self.attribute = 5


@dataclasses.dataclass(frozen=True)
class Constant:
    inner: list


class Base:
    pass


class Derived(Base):
    pass


def changer(change, **attributes):
    """A model whose forward changes its attributes, in a module below it."""

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 8)
            for key, value in attributes.items():
                setattr(self, key, copy.deepcopy(value) if not callable(value) else value())

        def forward(self, x):
            change(self)
            return self.fc(x).relu()

    return nn.Sequential(Body(), nn.Linear(8, 3))


def counter():
    calls = []
    total = 0

    def count():
        nonlocal total
        total += 1
        calls.append(total)

    return lambda: count


def swap(m):
    m.fc2 = nn.Linear(6, 8)
    m._modules["fc"] = m._modules.pop("fc")
    m.fc.weight = nn.Parameter(m.fc.weight.detach() * 2)
    m.register_buffer("table", torch.ones(3))
    del m.old


def retype(m):
    m.thing.__class__ = Base
    m.thing.__dict__ = {"x": 2}


def write(m):
    m.numbers += 1
    m.whole[()] = 7
    m.bytes[:] = b"xyz"
    m.bytes.extend(b"more")
    m.array.append(3)


def draw(m):
    m.python.random()
    m.numpy.random()
    m.old_numpy.rand()
    torch.rand((), generator=m.torch)
    np.random.rand()
    random.random()


def meta(m):
    m.buf.resize_(2)
    m.other.data = torch.ones(5)
    m.third.t_()
    m.third.note = [1]
    m.fc.weight.requires_grad_(False)
    m.fc.bias.grad = torch.ones(8)
    m.fourth.add_(m.fc.weight.sum())
    m.fifth[1:].mul_(m.fc.bias.sum())


def hook(m):
    m.register_forward_hook(lambda *a: None)
    m.fc._forward_hooks.clear()
    m.requires_grad_(False)
    m.eval()


def hooked():
    layer = nn.Linear(6, 8)
    seen = []
    layer.register_forward_hook(lambda m, a, out: seen.append(out.shape))
    return layer


class Weak:
    def __init__(self):
        self.key = Base()
        self.map = weakref.WeakKeyDictionary({self.key: [1]})
        self.all = weakref.WeakSet([self.key])

    def change(self):
        self.map[self.key].append(2)
        self.other = Base()
        self.map[self.other] = 3
        self.all.add(self.other)


class Users(collections.UserDict):
    def __setitem__(self, key, value):
        self.data[key] = [value]


HOSTILE = {
    "frozen dict, changed": changer(
        lambda m: collections.OrderedDict.__setitem__(m.config, "new", 3), config=lambda: Frozen(b=1, a=2)
    ),
    "order": changer(lambda m: m.od.move_to_end("a"), od=collections.OrderedDict(a=1, b=2)),
    "order of a dict": changer(lambda m: m.d.update(a=m.d.pop("a")), d={"a": 1, "b": 2}),
    "list of its own": changer(lambda m: m.loud.append(2), loud=lambda: Loud([1])),
    "deque": changer(lambda m: m.deque.extend([4, 5]), deque=collections.deque([1, 2, 3], maxlen=3)),
    "counter": changer(lambda m: m.counter.update("abc"), counter=collections.Counter("a")),
    "defaultdict": changer(lambda m: m.d[3].append(1), d=functools.partial(collections.defaultdict, list)),
    "set": changer(lambda m: (m.s.add(3), m.s.discard(1)), s={1, 2}),
    "user's dict": changer(lambda m: m.u.update(x=1), u=Users),
    "nested": changer(
        lambda m: (m.store[0]["x"].append(1), m.store[1][0].add(2), m.store[2][1].clear()),
        store=lambda: [{"x": [{}]}, ({1},), Loud([0, [1, {}]])],
    ),
    "deeper": changer(lambda m: m.store[0][0][0][0][0].append(1), store=[[[[[[]]]]]]),
    "slots": changer(lambda m: m.thing.change(), thing=Slotted),
    "frozen dataclass": changer(lambda m: m.thing.inner.append(1), thing=Constant([])),
    "class and dict of an object": changer(retype, thing=Derived),
    "closure": changer(lambda m: m.count(), count=counter()),
    "partial": changer(lambda m: m.f.args[0].append(1), f=lambda: functools.partial(len, [])),
    "bound method": changer(lambda m: m.f(), f=lambda: Slotted().change),
    "arrays": changer(
        write, numbers=np.zeros(3), whole=np.array(1.0), bytes=bytearray(b"abcd"), array=array.array("i", [1])
    ),
    "generators": changer(
        draw,
        python=lambda: random.Random(0),
        numpy=lambda: np.random.default_rng(0),
        old_numpy=lambda: np.random.RandomState(0),
        torch=lambda: torch.Generator().manual_seed(0),
    ),
    "modules": changer(swap, old=[1]),
    "tensors": changer(
        meta,
        buf=torch.ones(6),
        other=torch.zeros(3),
        third=torch.ones(2, 3),
        fourth=torch.ones(()),
        fifth=torch.ones(4),
    ),
    "hooks and modes": changer(hook),
    "hook that keeps": changer(lambda m: m.more(torch.ones(1, 6)), more=hooked),
    "weak": changer(lambda m: m.weak.change(), weak=Weak),
    "another __dict__": changer(lambda m: object.__setattr__(m.thing, "__dict__", {}), thing=Derived),
    "default dtype": changer(lambda m: torch.set_default_dtype(torch.float64)),
    "gradients off": changer(lambda m: torch.set_grad_enabled(False)),
}


def picture(value, seen=None):
    """All that is reachable, in plain values: to be compared."""
    seen = {} if seen is None else seen
    if isinstance(value, (int, float, str, bytes, bool, type(None), type, torch.dtype, torch.device)):
        return value
    if id(value) in seen:
        return ("again", seen[id(value)][0])
    seen[id(value)] = (len(seen), value)
    kind = [type(value).__name__, id(value)]
    if isinstance(value, torch.Tensor):
        kind += [value.tolist(), value.shape, value.stride(), value._version, value.requires_grad, value.is_leaf]
        kind += [value.data_ptr(), picture(value.grad, seen) if value.is_leaf else None]
    elif isinstance(value, np.ndarray):
        return (*kind, value.tolist())
    elif isinstance(value, (np.random.Generator, np.random.RandomState)):
        return (
            *kind,
            str(getattr(value, "bit_generator", value).state if hasattr(value, "bit_generator") else value.get_state()),
        )
    elif isinstance(value, torch.Generator):
        return (*kind, value.get_state().tolist())
    elif isinstance(value, random.Random):
        return (*kind, value.getstate())
    elif isinstance(value, dict):
        kind += [(picture(k, seen), picture(value[k], seen)) for k in value]
    elif isinstance(value, (list, tuple, collections.deque, array.array, bytearray)):
        kind += [picture(v, seen) for v in value]
    elif isinstance(value, set):
        kind += [sorted(map(str, (picture(v, seen) for v in value)))]
    elif isinstance(value, functools.partial):
        kind += [picture(v, seen) for v in (value.args, value.keywords)]
    elif callable(value) and hasattr(value, "__closure__"):
        kind += [picture(c.cell_contents, seen) for c in value.__closure__ or ()]
    elif callable(value) and hasattr(value, "__self__"):
        kind += [picture(value.__self__, seen)]
    elif isinstance(value, weakref.ref):
        return (*kind, value() is not None)
    for cls in type(value).__mro__:
        if cls.__module__ in (__name__, "looked_at", "networks"):
            for name in cls.__dict__.get("__slots__", ()):
                name = f"_{cls.__name__}{name}" if name.startswith("__") and not name.endswith("__") else name
                kind += [(name, picture(getattr(value, name, "none"), seen))] if name != "__dict__" else []
    kind += [(k, picture(v, seen)) for k, v in vars(value).items()] if hasattr(value, "__dict__") else []
    return tuple(kind)


def globals_():
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()
    return states, torch.get_default_dtype(), torch.is_grad_enabled()


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_all_that_a_model_holds_is_as_before(name, verify):
    model = HOSTILE[name]
    before, around = picture(model), globals_()
    found = names(model, X, verify=verify)
    assert picture(model) == before
    assert globals_() == around
    assert found == ["0.fc"] or name in ("modules", "tensors", "hooks and modes", "default dtype", "gradients off")


def test_inputs_are_as_before():
    def forward(m, x, *, options, more, rng):
        options.pop("scale")
        more[0].append(x)
        more[1].add_(1)
        x.t_().t_()
        x.requires_grad_()
        rng.random()
        return m.c(m.a(x).relu()), x.data.mul_(2)

    model = Net(forward, a=nn.Linear(6, 8), c=nn.Linear(8, 3))
    inputs = {"x": X.clone(), "options": {"scale": 2}, "more": ([], torch.zeros(3)), "rng": random.Random(0)}
    before = picture(inputs)
    model.forward = functools.partial(lambda f, **k: f(k.pop("x"), **k), model.forward)
    for given in (inputs, lambda m: m(**inputs)):
        assert names(model, given) == ["a"]
        assert picture(inputs) == before


def test_only_what_changed_is_written(monkeypatch):
    written = []
    refill = snapshot._refill
    monkeypatch.setattr(snapshot, "_refill", lambda *args: (written.append(args[0]), refill(*args)))
    model = changer(lambda m: m.two.append(1), one=[1], two=[2])
    names(model)
    assert written
    assert all(container is model[0].two for container in written)


@pytest.mark.parametrize(
    "change",
    [parametrizations.weight_norm, parametrizations.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)],
    ids=["weight norm", "spectral norm", "pruned"],
)
@pytest.mark.parametrize("images", [False, True])
def test_inputs_are_guessed_where_the_first_layer_is_parametrized(change, images):
    first = [nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()] if images else [nn.Linear(6, 8)]
    model = nn.Sequential(*first, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    change(model[0])
    before = picture(model)
    assert names(model, None) == [str(len(model) - 3)]
    assert picture(model) == before


class Careless(nn.Module):
    """A forward() that keeps records in every way there is."""

    def __init__(self, fail):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout())
        self.head = nn.Linear(6, 3)
        self.register_buffer("steps", torch.zeros(()))
        self.outside = torch.zeros(())
        self.fail, self.calls, self.seen, self.last = fail, 0, [], {}

    def forward(self, x):
        self.calls += 1
        self.steps.add_(1)
        self.new = h = self.body(x)
        self.seen.append(h)
        self.last["h"] = h
        self.train(not self.training)
        random.random()
        torch.rand(())
        np.random.rand()
        self.outside.add_(1)
        if self.fail:
            raise RuntimeError("on purpose")
        return self.head(h) + torch.ones(3)


def state_of(model):
    modules = {name: {k: v for k, v in vars(m).items() if not isinstance(v, dict)} for name, m in model.named_modules()}
    hooks = [list(m._forward_hooks) + list(m._forward_pre_hooks) for m in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    versions = {key: value._version for key, value in model.state_dict(keep_vars=True).items()}
    grads = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    where = modules, hooks, len(model.seen), dict(model.last), versions, grads, random.getstate()
    return where, (state, model.outside.clone(), torch.get_rng_state(), torch.tensor(np.random.get_state()[1]))


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("example_inputs", [None, torch.randn(3, 5)], ids=["guessed", "given"])
@pytest.mark.parametrize("fail", [False, True])
def test_discovery_leaves_model_and_random_states_alone(fail, example_inputs, verify):
    model = Careless(fail)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    where, values = state_of(model)
    if fail:
        with pytest.raises(ValueError, match="on purpose" if example_inputs is not None else "pass example_inputs"):
            find_unit_groups(model, example_inputs, verify=verify)
    else:
        found = find_unit_groups(model, example_inputs, verify=verify, ignore_outputs=("new", "seen", "last"))
        assert as_rows(found) == [("body.0", ["head"], ["body.1"])]
    after, now = state_of(model)
    assert after == where
    torch.testing.assert_close(now, values, rtol=0, atol=0)


def test_discovery_leaves_the_input_alone():
    x = torch.randn(3, 5)
    before = x.clone()
    find_unit_groups(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), x)
    assert torch.equal(x, before)
