"""Looking at a model: nothing of it remains, nothing leaves unseen, and what fails is said truly."""

from __future__ import annotations

import _thread
import array
import asyncio
import collections
import concurrent.futures
import copy
import dataclasses
import functools
import gc
import io
import pickle
import queue
import random
import threading
import typing
import weakref
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch
from networks import Net
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils import dlpack

import cbp_fast
from cbp_fast.discovery import finding as discovery
from cbp_fast.discovery import snapshot
from cbp_fast.discovery.finding import explain, find_unit_groups
from cbp_fast.discovery.running import Given

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def names(model, inputs=X, **options):
    return [group.name for group in find_unit_groups(model, inputs, **options)]


def three(forward):
    """Layers a, b and c; `forward(h)`, of what a makes, may use it and gives what is added to the output, or None."""

    def run(m, x):
        h = m.a(x).relu()
        extra = forward(h)
        y = m.c(m.b(h).relu())
        return y if extra is None else y + extra

    torch.manual_seed(0)
    return Net(run, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))


# looking changes nothing


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


class Loud(list):
    """A list that counts what is done to it."""

    done = 0

    def append(self, value):
        self.done += 1
        super().append(value)

    def clear(self):
        raise RuntimeError("never cleared")

    extend = clear


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
        if cls.__module__ in (__name__, "networks"):
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


# units leave the operations


POOL = concurrent.futures.ThreadPoolExecutor(1)
KEPT: list = []


def in_thread(h):
    result = []
    thread = threading.Thread(target=lambda: result.append(h.square().sum(1, keepdim=True)))
    thread.start()
    thread.join()
    return result[0].detach()


class Worker(threading.Thread):
    def __init__(self, h):
        super().__init__()
        self.h = h

    def run(self):
        self.h = float(self.h.detach().sum())


def in_worker(h):
    worker = Worker(h)
    worker.start()
    worker.join()
    return worker.h


TODO, DONE = queue.SimpleQueue(), queue.SimpleQueue()


def serve():
    while True:
        DONE.put(TODO.get().detach().square().sum(1, keepdim=True))


def in_waiting_thread(h):
    if not any(t.name == "serve" for t in threading.enumerate()):
        threading.Thread(target=serve, daemon=True, name="serve").start()
    TODO.put(h)
    return DONE.get()


def by_dlpack(h):
    return torch.from_dlpack(np.from_dlpack(h.detach()) * 2).sum(1, keepdim=True)


def by_pickle(h):
    return pickle.loads(pickle.dumps(h.detach())).sum(1, keepdim=True)


def by_save(h):
    file = io.BytesIO()
    torch.save(h.detach(), file)
    file.seek(0)
    return torch.load(file).sum(1, keepdim=True)


def by_memory(h):
    out = np.zeros(h.shape, np.float32)
    out[...] = np.ctypeslib.as_array((__import__("ctypes").c_float * h.numel()).from_address(h.data_ptr())).reshape(
        h.shape
    )
    return torch.from_numpy(out).sum(1, keepdim=True)


def by_storage(h):
    return torch.tensor(h.detach().untyped_storage().tolist()).float().mean()


def into_array(h):
    out = torch.zeros(len(h), 1)
    out.numpy()[:] = h.detach().numpy().sum(1, keepdims=True)
    return out


@functools.cache
def threads():
    return ThreadPool(1)


@pytest.fixture(scope="module", autouse=True)
def close_pools():
    threads()
    yield
    threads().terminate()
    POOL.shutdown()


def by_system_thread(h):
    done: queue.SimpleQueue = queue.SimpleQueue()
    _thread.start_new_thread(lambda: done.put(float(h.detach().sum())), ())
    return done.get()


def by_new_pool(h):
    with ThreadPool(1) as pool:
        return pool.apply(lambda: h.sum(1, keepdim=True))


EXITS = {
    "thread": in_thread,
    "thread of a class": in_worker,
    "new pool": lambda h: concurrent.futures.ThreadPoolExecutor(1).submit(lambda: h.sum(1, keepdim=True)).result(),
    "pool": lambda h: POOL.submit(lambda: h.detach().sum(1, keepdim=True)).result(),
    "pool, as a number": lambda h: POOL.submit(lambda: float(h.detach().sum())).result(),
    "pool, by NumPy": lambda h: float(POOL.submit(lambda: h.detach().numpy().sum()).result()),
    "pool, as a list": lambda h: POOL.submit(h.tolist).result()[0][0],
    "map of a pool": lambda h: next(POOL.map(lambda t: t.sum(1, keepdim=True), [h])),
    "pool of multiprocessing": lambda h: threads().apply(lambda: h.sum(1, keepdim=True)),
    "map of multiprocessing": lambda h: threads().map(lambda t: float(t.detach().sum()), [h])[0],
    "new pool of multiprocessing": by_new_pool,
    "thread that waits": in_waiting_thread,
    "NumPy": lambda h: torch.from_numpy(h.detach().numpy() * 2).sum(1, keepdim=True),
    "asarray": lambda h: float(np.asarray(h.detach()).sum()),
    "array that is written": into_array,
    "DLPack": by_dlpack,
    "DLPack, as before": lambda h: dlpack.from_dlpack(dlpack.to_dlpack(h.detach())).sum(1, keepdim=True),
    "pickle": by_pickle,
    "shared memory": lambda h: h.detach().clone().share_memory_().sum(1, keepdim=True),
    "system's thread": by_system_thread,
    "event loop": lambda h: asyncio.run(asyncio.to_thread(lambda: float(h.detach().sum()))),
    "copy": lambda h: copy.deepcopy(h.detach()).sum(1, keepdim=True),
    "shallow copy": lambda h: copy.copy(h.detach()).sum(1, keepdim=True),
    "torch.save": by_save,
    "address": by_memory,
    "bytes": by_storage,
    "item": lambda h: h.sum().item(),
    "float": lambda h: float(h.detach().sum()),
    "tolist": lambda h: h.tolist()[0][0],
    "repr": lambda h: len(repr(h)),
    "format": lambda h: float(f"{h.detach().sum():.3f}"),
    "map_": lambda h: h.detach().clone().apply_(lambda v: v + 1).sum(1, keepdim=True),
}


@pytest.mark.parametrize("name", EXITS)
def test_units_that_leave_the_operations_are_refused(name):
    model = three(EXITS[name])
    assert "a" not in names(model)
    (line,) = [line for line in explain(model, X).splitlines() if line.startswith("'a' ")]
    assert "no layer reads it" not in line
    # the units of the others are followed as ever, but for what comes from nowhere
    assert "b" in names(model) or name in ("thread that waits", "pickle")


def test_threads_that_touch_no_units_change_nothing():
    def forward(m, x):
        POOL.submit(lambda: torch.ones(3) * 2).result()
        return m.c(m.a(x).relu())

    assert names(Net(forward, a=nn.Linear(6, 8), c=nn.Linear(8, 3))) == ["a"]
    assert "start" in vars(threading.Thread)
    assert threading.Thread.start.__module__ == "threading"
    assert concurrent.futures.ThreadPoolExecutor.submit.__module__ == "concurrent.futures.thread"
    assert "apply_async" not in vars(ThreadPool)


def test_layers_that_another_thread_runs_are_left_out():
    def forward(m, x):
        h = m.a(x).relu()
        return m.c(h) + POOL.submit(lambda: m.b(x)).result() + m.b(h[:, :6])

    model = Net(forward, a=nn.Linear(6, 8), b=nn.Linear(6, 3), c=nn.Linear(8, 3))
    assert names(model) == ["a:6-7"]
    assert "'b.weight' is used in two ways: matrix product, what another thread does with it" in explain(model, X)


@dataclasses.dataclass(slots=True)
class Pair:
    y: object
    h: object


class Pairs:
    def __init__(self, y, h):
        self.y, self.h = y, h

    def __call__(self):
        return self.y


class View(collections.abc.Mapping):
    __slots__ = ("_own",)

    def __init__(self, y, h):
        self._own = {"y": y, "h": h}

    def __getitem__(self, key):
        return self._own[key]

    def __iter__(self):
        return iter(self._own)

    def __len__(self):
        return len(self._own)


class Held(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.h = h


def generate(y, h):
    yield y
    yield h


def future(h):
    result = concurrent.futures.Future()
    result.set_result(h)
    return result


OUTPUTS = {
    "slots": Pair,
    "callable": Pairs,
    "mapping": View,
    "set": lambda y, h: {y, h},
    "deque": lambda y, h: collections.deque([y, h]),
    "closure": lambda y, h: (y, lambda: h),
    "default": lambda y, h: (y, lambda t=h: t),
    "partial": lambda y, h: (y, functools.partial(torch.add, h)),
    "method": lambda y, h: (y, h.sum),
    "method of an object": lambda y, h: (y, Pairs(y, h).__call__),
    "iterator": lambda y, h: (y, iter([h])),
    "zip": lambda y, h: (y, zip([1], [h], strict=True)),
    "generator": generate,
    "key": lambda y, h: {h: y},
    "module": lambda y, h: (y, Held(h)),
    "future": lambda y, h: (y, future(h)),
    "distribution": lambda y, h: (y, torch.distributions.Normal(h, torch.ones(()))),
    "array of objects": lambda y, h: (y, [np.array([None, Pair(1, h)], dtype=object)]),
    "nested": lambda y, h: Pair(y, [{"x": (Pairs(1, {2: h}),)}]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_units_in_any_output_are_refused(name):
    def forward(m, x):
        h = m.a(x).relu()
        return OUTPUTS[name](m.c(m.b(h).relu()), h)

    model = Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))
    assert names(model) == ["b"]
    text = explain(model, X)
    assert "'a' (Linear)  its units are part of the model's output" in text
    assert "'c' (Linear)  it makes the model's output" in text


def test_paths_of_outputs_are_those_to_ignore():
    def forward(m, x):
        h = m.a(x).relu()
        return Pair(m.c(h), {"h": h})

    model = Net(forward, a=nn.Linear(6, 8), c=nn.Linear(8, 3))
    assert names(model) == []
    assert names(model, ignore_outputs=".h") == ["a"]


class Registry:
    __slots__ = ("last",)
    table: typing.ClassVar[dict] = {}


REGISTRY, LOCAL = Registry(), threading.local()


def keep_in_closure():
    kept = []
    return three(lambda h: kept.append(h))


def keep_by_hook():
    kept = {}
    model = three(lambda h: None)
    model.a.register_forward_hook(lambda m, args, out: kept.__setitem__("a", out.detach()))
    return model


def suspended(h):
    def run():
        yield 1
        yield h

    KEPT.append(run())
    next(KEPT[-1])


def cycle(h):
    # garbage, which only the collector finds
    node = [h]
    node.append(node)


KEEPERS = {
    "closure": keep_in_closure,
    "hook": keep_by_hook,
    "global": lambda: three(lambda h: KEPT.append(h)),
    "global, detached view": lambda: three(lambda h: KEPT.append(h.detach()[1:, ::2])),
    "slot": lambda: three(lambda h: setattr(REGISTRY, "last", h)),
    "class": lambda: three(lambda h: Registry.table.update(h=h)),
    "thread-local": lambda: three(lambda h: setattr(LOCAL, "h", h)),
    "generator": lambda: three(suspended),
    "function": lambda: three(lambda h: KEPT.append(lambda: h)),
}


@pytest.mark.parametrize("name", KEEPERS)
def test_units_that_outlive_the_forward_are_refused(name):
    model = KEEPERS[name]()
    try:
        assert names(model) == ["b"]
        (line,) = [line for line in explain(model, X).splitlines() if line.startswith("'a' ")]
        assert "its units are kept" in line
    finally:
        KEPT.clear()
        Registry.table.clear()
        REGISTRY.last = LOCAL.h = None


def test_units_in_the_callers_containers_are_refused():
    def forward(m, x, kept):
        h = m.a(x).relu()
        kept["h"] = h
        return m.c(h)

    model = Net(lambda m, given: forward(m, *given), a=nn.Linear(6, 8), c=nn.Linear(8, 3))
    kept = {}
    for inputs in (((X, kept),), lambda m: m((X, kept))):
        assert names(model, inputs) == [] or isinstance(inputs, tuple)
        assert kept == {}


def test_what_is_dead_after_the_forward_is_no_output():
    assert names(three(cycle)) == ["a", "b"]
    kept = []

    def forward(m, x):
        h = m.a(x).relu()
        kept.append(torch.ones(3))
        kept.append(x * 2)
        return m.c(h)

    assert names(Net(forward, a=nn.Linear(6, 8), c=nn.Linear(8, 3))) == ["a"]


# what fails is said truly


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_scripted_submodules_are_left_out_alone():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.mid = torch.jit.script(nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 8)))

        def forward(self, x):
            return self.c(self.b(self.mid(self.a(x).relu()).relu()).relu())

    text = explain(Half(), X)
    assert names(Half()) == ["b"]
    assert "'mid.0.weight' reads it, but not in a call of 'mid.0' (RecursiveScriptModule)" in text
    assert "'mid.2' (RecursiveScriptModule)" in text


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_units_in_nested_tensors_are_refused(layout):
    def forward(m, x):
        h = m.a(x).relu()
        if layout == torch.jagged:
            many = torch.nested.nested_tensor_from_jagged(h, torch.tensor([0, 1, 4]))
            h = m.b(many).relu().values()
        else:
            many = torch._nested_tensor_from_tensor_list([h[:1], h[1:]])
            h = torch.cat(torch.unbind(m.b(many).relu()))
        return m.d(m.c(h).relu())

    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8), "d": nn.Linear(8, 3)}
    model = Net(forward, **layers)
    assert names(model) == ["c"]
    text = explain(model, X)
    assert "takes or makes a nested tensor, which cannot be followed" in text
    assert "'b' (Linear)  its weights go into" in text


def test_fake_tensors_are_named():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        assert "'0' (Linear)  '0.weight' is a FakeTensor" in explain(model, torch.randn(4, 6))
        assert find_unit_groups(model) == []


def test_what_runs_but_cannot_be_followed_is_not_blamed_on_the_inputs():
    def forward(m, x):
        h = m.a(x)
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("not under a mode")
        return m.c(h)

    model = Net(forward, a=nn.Linear(6, 8), c=nn.Linear(8, 3))
    says = r"Net\.forward\(\) runs, but cannot be followed \(at or after addmm in 'a' \(Linear\)\): not under a mode"
    for inputs in (X, None):
        with pytest.raises(ValueError, match=says):
            find_unit_groups(model, inputs)
    with pytest.raises(ValueError, match=r"does not run on the example_inputs given: "):
        find_unit_groups(model, X[:, 1:])


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc")], ids=["Python", "torch"])
def test_a_look_that_runs_out_of_memory_does_not_blame_the_forward(monkeypatch, error):
    """Before the forward is tried by itself, what was followed so far has gone."""
    looks = []

    class Trace(discovery.Trace):
        def __init__(self, model):
            super().__init__(model)
            looks.append(weakref.ref(self))

    class Big(nn.Module):
        def forward(self, x):
            following = torch.utils._python_dispatch._get_current_dispatch_mode() is not None
            if following:
                raise error
            gc.collect()
            if any(look() for look in looks):
                raise MemoryError
            return x

    monkeypatch.setattr(discovery, "Trace", Trace)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), Big())
    with pytest.raises(ValueError, match=r"runs, but cannot be followed"):
        find_unit_groups(model, X)
    assert looks


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


# large batches


# globals, which no snapshot reaches
ROWS: list = []
STORED: list = []
LIVING: list = []


def counting(forward):
    """The forward, which notes how many rows it is given."""

    def run(m, x, *others):
        ROWS.append(len(x))
        return forward(m, x, *others)

    ROWS.clear()
    torch.manual_seed(0)
    return Net(run, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3), drop=nn.Dropout(0.5)).train()


def rows_of(forward, *inputs):
    """Groups of a model, and how many rows each forward was given."""
    return names(counting(forward), inputs), list(ROWS)


def masked(m, x, mask):
    if mask.all():
        mask = None
    h = m.drop(m.a(x).relu())
    h = m.drop(m.b(h if mask is None else h * mask[:, None]).relu())
    return m.c(h)


BATCH = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def test_a_few_samples_show_what_a_batch_shows():
    # a value that Python reads is no reason to look again where nothing random is read
    found, rows = rows_of(masked, BATCH, torch.ones(64, dtype=torch.bool))
    assert found == ["a", "b"]
    assert sorted(rows) == [2, 3, 64]
    # the samples that show what the whole batch does
    mask = torch.ones(64, dtype=torch.bool)
    mask[40] = False
    found, rows = rows_of(masked, BATCH, mask)
    assert found == ["a", "b"]
    assert sorted(rows) == [2, 2, 3, 3, 64]


def joined(m, x):
    return m.c(m.a(x).view(-1, 16)[:, :8].relu())


def square(m, x, graph):
    return m.c(graph @ m.a(x).relu())


def edges(m, x, index):
    h = m.a(x).relu()
    return m.c(h.index_add(0, index[1], h[index[0]]))


def by_size(m, x):
    h = m.a(x).relu()
    return m.c(m.b(h).relu() if len(x) > 10 else h)


def transposed(m, x):
    return m.c(m.a(x).T.contiguous()[:, :8])


WHOLE = {
    "reads its values": (lambda m, x: m.c(m.a(x[x[:, 0] > 0]).relu()), BATCH),
    "joins samples": (joined, BATCH),
    "graph": (edges, BATCH, torch.arange(64).repeat(2, 1)),
    "graph as a list": (lambda m, x, e: edges(m, x, e.T), BATCH, torch.arange(64)[:, None].repeat(1, 2)),
    "path by size": (by_size, BATCH),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_batches_where_a_few_samples_are_another_function(name):
    found, rows = rows_of(*WHOLE[name])
    assert rows[-1] == 64
    forward, *inputs = WHOLE[name]
    torch.manual_seed(0)
    model = Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3)).train()
    assert found == names(model, lambda m: m(*inputs))


def test_samples_are_cut_in_all_that_a_forward_is_given():
    def forward(x, parts, *, lengths, boxes, scale, names):
        seen.append((x.shape, parts["y"][0].shape, len(lengths), len(boxes), scale.shape, len(names), x.requires_grad))

    seen: list = []
    x, y = torch.randn(12, 2, requires_grad=True), torch.randn(12)
    kwargs = {"lengths": list(range(12)), "boxes": [{"b": torch.ones(i, 4)} for i in range(12)], "scale": torch.ones(3)}
    given = Given((x, {"y": (y,)}), {**kwargs, "names": ("a", "b")})
    for run in (given, given.cut(range(3))):
        run(forward)
    assert seen == [(torch.Size([n, 2]), torch.Size([n]), n, n, torch.Size([3]), 2, True) for n in (12, 3)]
    assert Given((torch.ones(12, 2), torch.arange(5)), {}).samples == 0
    assert Given((torch.eye(12).to_sparse(),), {}).samples == 0
    assert Given((torch.ones(12, 2), Pair(x, y)), {}).samples == 0


def test_first_training_forward_looks_at_few_samples_and_keeps_its_own():
    model = counting(masked)
    plain = copy.deepcopy(model)
    mask = torch.ones(64, dtype=torch.bool)
    torch.manual_seed(1)
    expected = plain(BATCH, mask)
    cbp = cbp_fast.ContinualBackprop(model, torch.optim.SGD(model.parameters(), 0.1))
    ROWS.clear()
    torch.manual_seed(1)
    assert torch.equal(model(BATCH, mask), expected)
    assert sorted(ROWS) == [2, 3, 64, 64]
    assert list(cbp.age) == ["a", "b"]


def test_repeats_end_where_nothing_new_is_seen():
    def forward(m, x):
        m.calls.append(random.random())
        return m.c(m.a(x).relu() * m.calls[-1])

    calls = Loud()
    model = counting(forward)
    model.calls = calls
    assert names(model, unreached_ok=True) == ["a"]
    assert len(ROWS) == 5
    assert list(calls) == []


def test_memory_of_a_look_is_freed_before_the_next():
    def forward(m, x):
        if torch.rand(()) < 0.5:
            x = x + 1
        LIVING.append(sum(r() is not None for r in STORED))
        h = m.a(x).relu()
        STORED.append(weakref.ref(h))
        return m.c(h)

    assert names(Net(forward, a=nn.Linear(6, 8), c=nn.Linear(8, 3))) == ["a"]
    assert len(LIVING) > 2
    assert not any(LIVING)
