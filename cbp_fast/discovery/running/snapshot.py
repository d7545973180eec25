"""What a model and its inputs hold in Python, to be put back as it was."""

from __future__ import annotations

import array
import functools
import pickle
import random
import sys
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .reach import (
    ATOMS,
    MISSING,
    MOST,
    attributes_of,
    content_of,
    entries_of,
    in_reach,
    is_array,
    is_foreign,
    keys_of,
    slots_of,
)

_PLAIN = frozenset([dict, OrderedDict, defaultdict, list, set, frozenset, tuple, deque, bytearray])
# NumPy arrays of more bytes are not copied
_LARGEST = 2**26


class Snapshot:
    """What is reachable from some roots, to see later what has changed and to put it back.

    Entries are compared by identity, and what did not change is not written. It holds for dicts, lists, sets, deques
    and arrays, whatever their classes do, at any depth; for attributes and slots of modules and of ordinary objects;
    for cells of closures; for shape, memory, gradient and attributes of tensors, not for their values; for NumPy
    arrays of up to 64 MB; and for random generators.

    Out of reach: attributes of classes, globals, iterators, objects of the standard library and of PyTorch's inner
    parts, and of packages that run models.

    Args:
        roots: names and objects; what lies below them is named by its path.
    """

    @_disable_current_modes()
    def __init__(self, roots: Iterable[tuple[str, Any]]) -> None:
        self._dicts: list[tuple[dict[Any, Any], list[Any], list[Any], Any, str]] = []
        self._lists: list[tuple[Any, list[Any], Any]] = []
        self._raw: list[tuple[Any, Any]] = []
        self._places: list[tuple[Callable[[], Any], Callable[[Any], None], Any, Any]] = []
        self._objects: list[tuple[Any, type, dict[str, Any]]] = []
        self._tensors: list[tuple[Tensor, Tensor | None, bool, Tensor | None, Any]] = []
        self._generators: list[tuple[Any, Any]] = []
        self._types: dict[type, tuple[bool, list[tuple[str, Any]]]] = {}
        self._seen: set[int] = set()
        self._todo: deque[tuple[Any, Any]] = deque()
        # what is seen is told by its number, so it must live
        self._roots = list(roots)
        for name, root in self._roots:
            self._meet(root, name)
        while self._todo and len(self._seen) < MOST:
            self._visit(*self._todo.popleft())
        self._todo.clear()

    def _meet(self, value: Any, path: Any) -> None:
        if type(value) not in ATOMS and id(value) not in self._seen:
            self._seen.add(id(value))
            self._todo.append((value, path))

    def _meet_all(self, keys: Iterable[Any], values: list[Any], path: Any, style: str) -> None:
        if not set(map(type, values)) <= ATOMS:
            for key, value in zip(keys, values, strict=True):
                self._meet(value, (path, style, key))

    def _visit(self, value: Any, path: Any) -> None:
        if isinstance(value, dict):
            self._dict(value, path, "item")
            if isinstance(value, defaultdict):
                self._slot(value, vars(defaultdict)["default_factory"], (path, "attribute", "default_factory"))
        elif isinstance(value, (list, set, deque)):
            content = entries_of(value)
            self._lists.append((value, content, path))
            self._meet_all(range(len(content)), content, path, "item")
        elif isinstance(value, (tuple, frozenset)):
            content = entries_of(value)
            self._meet_all(range(len(content)), content, path, "item")
        elif isinstance(value, (bytearray, array.array)) or is_array(value):
            if not is_array(value) or (value.flags.writeable and value.nbytes <= _LARGEST):
                self._raw.append((value, value.copy() if is_array(value) else value[:]))
            if is_array(value) and value.dtype.hasobject and value.dtype.names is None:
                self._meet_all(range(value.size), value.ravel().tolist(), path, "item")
        elif isinstance(value, types.FunctionType):
            self._function(value, path)
            return
        elif isinstance(value, types.MethodType):
            self._meet(value.__self__, path)
            self._meet(value.__func__, path)
            return
        elif isinstance(value, functools.partial):
            for key, child in (("func", value.func), ("args", value.args), ("keywords", value.keywords)):
                self._meet(child, (path, "attribute", key))
        elif isinstance(value, Tensor):
            self._tensor(value, path)
        elif _is_random(value):
            self._generators.append((value, _state(value)))
        self._object(value, path)

    def _dict(self, value: dict[Any, Any], path: Any, style: str) -> None:
        keys = keys_of(value)
        values = [dict.__getitem__(value, key) for key in keys] if keys else keys
        self._dicts.append((value, keys, values, path, style))
        if keys:
            self._meet_all(keys, values, path, style)

    def _place(self, get: Callable[[], Any], put: Callable[[Any], None], path: Any) -> None:
        now = get()
        self._places.append((get, put, now, path))
        self._meet(now, path)

    def _slot(self, owner: Any, member: Any, path: Any) -> None:
        self._place(functools.partial(content_of, owner, member), functools.partial(_put, owner, member), path)

    def _function(self, value: types.FunctionType, path: Any) -> None:
        if is_foreign(value.__module__):
            return
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            if id(cell) not in self._seen:
                self._seen.add(id(cell))
                self._slot(cell, vars(types.CellType)["cell_contents"], (path, "attribute", name))
        self._meet(value.__defaults__, path)
        self._meet(value.__kwdefaults__, path)
        self._dict(value.__dict__, path, "attribute")

    def _tensor(self, value: Tensor, path: Any) -> None:
        plain = type(value) in (Tensor, nn.Parameter, nn.Buffer) and value.layout == torch.strided
        # what it looks like and where it lies, for `.data =`, `resize_`, `t_` and their like
        alias = value.detach() if plain and not value.is_nested else None
        self._tensors.append((value, alias, value.requires_grad, value.grad if value.is_leaf else None, path))

    def _object(self, value: Any, path: Any) -> None:
        """Its attributes and slots; containers may have some too."""
        cls = type(value)
        if cls in _PLAIN:
            return
        if cls not in self._types:
            ours = issubclass(cls, (nn.Module, Tensor, dict, list, set, tuple, deque))
            reach = (ours or in_reach(cls)) and not issubclass(cls, (type, types.ModuleType, weakref.ref))
            self._types[cls] = reach, slots_of(cls) if reach else []
        reach, slots = self._types[cls]
        if not reach:
            return
        own = attributes_of(value)
        if own is not None:
            self._objects.append((value, cls, own))
            for key in ("_parameters", "_buffers", "_modules") if isinstance(value, nn.Module) else ():
                # they are named as attributes of the module
                if isinstance(own.get(key), dict) and id(own[key]) not in self._seen:
                    self._seen.add(id(own[key]))
                    self._dict(own[key], path, "attribute")
            self._dict(own, path, "attribute")
        for name, member in slots:
            self._slot(value, member, (path, "attribute", name))

    def tensors(self) -> Iterator[Tensor]:
        """Those that were met."""
        return (entry[0] for entry in self._tensors)

    @_disable_current_modes()
    def changed(self) -> list[tuple[str, Any]]:
        """Paths and values of what is held now and was not before."""
        found: list[tuple[Any, Any]] = []
        for d, keys, values, path, style in self._dicts:
            if not _same_items(d, keys, values):
                before = set(map(id, values))
                found += [
                    ((path, style, key), dict.__getitem__(d, key))
                    for key in keys_of(d)
                    if id(dict.__getitem__(d, key)) not in before
                ]
                # a key may be a tensor
                new = [key for key in keys_of(d) if not any(key is k for k in keys)] if len(d) < 1000 else keys_of(d)
                found += [((path, "item", "a key"), key) for key in new if type(key) not in ATOMS]
        for container, content, path in self._lists:
            now = entries_of(container)
            if not _same(now, content):
                before = set(map(id, content))
                found += [((path, "item", i), v) for i, v in enumerate(now) if id(v) not in before]
        for get, _, before, path in self._places:
            if get() is not before:
                found.append((path, get()))
        for owner, _, own in self._objects:
            attributes = attributes_of(owner)
            if attributes is not own and attributes is not None:
                found.append(("another __dict__", attributes))
        for tensor, alias, _, grad, path in self._tensors:
            if alias is not None and not _alike(tensor, alias):
                found.append((path, tensor))
            if tensor.is_leaf and tensor.grad is not grad:
                found.append(((path, "attribute", "grad"), tensor.grad))
        return [(_name(path), value) for path, value in found]

    @_disable_current_modes()
    def drawn(self) -> bool:
        """Whether one of the generators has been used."""
        return any(pickle.dumps(_state(g)) != pickle.dumps(before) for g, before in self._generators)

    def reseed(self, seed: int) -> None:
        """Puts the generators into other states, until `restore`."""
        for generator, _ in self._generators:
            if isinstance(generator, random.Random):
                generator.seed(seed)
            elif isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            elif hasattr(generator, "get_state"):
                generator.seed(seed)
            else:
                bits = getattr(generator, "bit_generator", generator)
                bits.state = type(bits)(seed).state

    @_disable_current_modes()
    def restore(self) -> None:
        """Puts back what has changed."""
        for owner, cls, own in self._objects:
            if type(owner) is not cls:
                object.__setattr__(owner, "__class__", cls)
            if attributes_of(owner) is not own:
                object.__setattr__(owner, "__dict__", own)
        for d, keys, values, _, _ in self._dicts:
            if not _same_items(d, keys, values):
                base = OrderedDict if isinstance(d, OrderedDict) else dict
                base.clear(d)
                for key, value in zip(keys, values, strict=True):
                    # what a weak dictionary held may be gone
                    if not any(isinstance(x, weakref.ref) and x() is None for x in (key, value)):
                        base.__setitem__(d, key, value)
        for container, content, _ in self._lists:
            if not _same(entries_of(container), content):
                _refill(container, content)
        for raw, before in self._raw:
            if isinstance(raw, bytearray):
                if raw != before:
                    bytearray.__setitem__(raw, slice(None), before)
            elif isinstance(raw, array.array):
                if raw.tobytes() != before.tobytes():
                    array.array.__setitem__(raw, slice(None), before)
            elif raw.flags.writeable:
                raw[...] = before
        for get, put, value, _ in self._places:
            if get() is not value:
                put(value)
        for tensor, alias, requires_grad, grad, _ in self._tensors:
            if alias is not None and not _alike(tensor, alias):
                tensor.data = alias
            if tensor.is_leaf:
                if tensor.requires_grad != requires_grad:
                    tensor.requires_grad_(requires_grad)
                if tensor.grad is not grad:
                    tensor.grad = grad
        for generator, state in self._generators:
            if state is not None:
                _set_state(generator, state)


def _put(owner: Any, member: Any, value: Any) -> None:
    member.__delete__(owner) if value is MISSING else member.__set__(owner, value)


def _is_random(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    own = (random.Random, torch.Generator)
    return isinstance(value, own) or bool(
        numpy and isinstance(value, (numpy.random.Generator, numpy.random.BitGenerator, numpy.random.RandomState))
    )


def _state(generator: Any) -> Any:
    """The state of a random generator, as Python keeps it; None if it has none."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().clone()
    if isinstance(generator, random.Random):
        try:
            return generator.getstate()
        except NotImplementedError:  # the system's
            return None
    if hasattr(generator, "get_state"):
        return generator.get_state()
    return getattr(generator, "bit_generator", generator).state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(state)
    else:
        getattr(generator, "bit_generator", generator).state = state


def _refill(container: Any, content: list[Any]) -> None:
    if isinstance(container, list):
        list.__setitem__(container, slice(None), content)
    elif isinstance(container, set):
        set.clear(container)
        set.update(container, [c for c in content if not (isinstance(c, weakref.ref) and c() is None)])
    else:
        deque.clear(container)
        deque.extend(container, content)


def _same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(map(is_, a, b))


def _same_items(d: dict[Any, Any], keys: list[Any], values: list[Any]) -> bool:
    if not keys:
        return not dict.__len__(d)
    return (
        dict.__len__(d) == len(keys)
        and _same(keys_of(d), keys)
        and all(map(is_, map(functools.partial(dict.__getitem__, d), keys), values))
    )


def _alike(tensor: Tensor, alias: Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory."""
    return (
        tensor.shape == alias.shape
        and tensor.stride() == alias.stride()
        and tensor.storage_offset() == alias.storage_offset()
        and tensor.untyped_storage()._cdata == alias.untyped_storage()._cdata
    )


def _name(path: Any) -> str:
    pieces: list[str] = []
    while not isinstance(path, str):
        path, style, key = path
        pieces.append(f".{key}" if style == "attribute" else f"[{key!r}]")
    return (path + "".join(reversed(pieces))).removeprefix(".")
