"""Units that leave the operations, are returned, or are kept, do not leave unseen."""

from __future__ import annotations

import _thread
import asyncio
import collections
import concurrent.futures
import copy
import functools
import io
import pickle
import queue
import threading
import typing
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch
from looked_at import Pair, X, names, three
from networks import Net
from torch import nn
from torch.utils import dlpack

from cbp_fast.discovery import explain

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


# of the session, as the pools are: a worker may run this file's tests in several turns
@pytest.fixture(scope="session", autouse=True)
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
