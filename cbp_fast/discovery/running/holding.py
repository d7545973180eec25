"""The tensors that any object holds: what a model returns, or keeps."""

from __future__ import annotations

import functools
import gc
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .reach import ATOMS, MOST, RUNNERS, attributes_of, content_of, entries_of, in_reach, is_array, keys_of, slots_of

_NOTHING = (type, types.ModuleType, types.FrameType, types.CodeType)


def tensors_in(value: Any, path: str = "", inside: Iterable[nn.Module] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that an object holds, with its path: in containers, attributes, slots, closures and what else.

    Args:
        value: what a model returns, or keeps.
        path: what it is called.
        inside: modules whose tensors are none of these; None for all modules.
    """
    # they are told by their numbers, so they must live
    seen: dict[int, Any] = {id(m): m for m in inside or ()}
    todo = [(path, value)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, Tensor):
            yield path, value
            continue
        if type(value) in ATOMS or id(value) in seen or isinstance(value, _NOTHING) or len(seen) > MOST:
            continue
        if isinstance(value, nn.Module) and inside is None:
            continue
        seen[id(value)] = value
        todo += reversed(list(_children(value, path)))


def _children(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    held: set[int] = set()
    if isinstance(value, dict):
        for key in keys_of(value):
            child = dict.__getitem__(value, key)
            held.add(id(child))
            yield f"{path}[{key!r}]", child
            if isinstance(key, Tensor):
                yield f"{path} key", key
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        for i, child in enumerate(entries_of(value)):
            held.add(id(child))
            yield f"{path}[{i}]", child
    elif is_array(value):
        if value.dtype.hasobject and value.dtype.names is None:
            yield from ((f"{path}[{i}]", v) for i, v in enumerate(value.ravel().tolist()))
    elif isinstance(value, types.FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            yield f"{path}.{name}", content_of(cell, vars(types.CellType)["cell_contents"])
        yield path, value.__defaults__
        yield path, value.__kwdefaults__
    elif isinstance(value, functools.partial):
        yield from ((f"{path}.{key}", getattr(value, key)) for key in ("func", "args", "keywords"))
    elif isinstance(value, types.MethodType):
        yield from ((f"{path}.{key}", getattr(value, key)) for key in ("__self__", "__func__"))
    elif isinstance(value, (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)):
        frames = (getattr(value, f"{kind}_frame", None) for kind in ("gi", "cr", "ag"))
        yield from ((f"{path}.{key}", v) for frame in frames if frame for key, v in frame.f_locals.items())
    elif not in_reach(type(value)) or (attributes_of(value) is None and not slots_of(type(value))):
        if str(type(value).__module__).partition(".")[0] in ("torch", *RUNNERS):
            return
        # iterators, views, and what C code holds
        yield from ((f"{path}[{i}]", v) for i, v in enumerate(gc.get_referents(value)))
    for key, child in (attributes_of(value) or {}).items():
        if id(child) not in held:
            yield f"{path}.{key}", child
    for name, member in slots_of(type(value)):
        if id(content_of(value, member)) not in held:
            yield f"{path}.{name}", content_of(value, member)
