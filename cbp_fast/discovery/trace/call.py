"""One operation with its arguments, by their names in its schema, which rules take one by one."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..running.calls import leaves_of


class _Schema(NamedTuple):
    """What a rule asks of an operation, which takes long to ask of torch."""

    op: str  # its name without an overload, and without the underscore of an in-place one
    name: str
    names: tuple[str, ...]
    outs: frozenset[str]  # arguments that are only written, as `out=`
    written: frozenset[str]  # those, and what is changed in place
    mutable: bool
    tags: frozenset[torch.Tag]


@functools.cache
def _schema_of(func: torch._ops.OpOverload) -> _Schema:
    name, arguments = func._overloadpacket.__name__, func._schema.arguments
    outs = (a.name for a in arguments if a.kwarg_only and a.alias_info is not None and a.alias_info.is_write)
    names = tuple(a.name for a in arguments)
    written = frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    return _Schema(
        name.rstrip("_"), name, names, frozenset(outs), written, func._schema.is_mutable, frozenset(func.tags)
    )


class Call:
    """One operation with its arguments, which a rule takes one by one.

    Attributes:
        op: its name without an overload, and without the underscore of an in-place one; `name`: with that.
        names: of the arguments in the schema, in their order.
        given: arguments by their names in the schema.
        tensors: those that are read, with the name of their argument; what `out=` gives is not.
        left: those of them that no rule took.
    """

    def __init__(self, func: Any, args: Any, kwargs: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.plain = isinstance(func, torch._ops.OpOverload)
        if self.plain:
            self.op, self.name, self.names, self.outs, self.written, self.mutable, self.tags = _schema_of(func)
            self.given = dict(zip(self.names, args, strict=False))
            self.given.update((k, v) for k, v in kwargs.items() if k not in self.outs)
        else:
            self.op = self.name = str(func)
            self.given, self.mutable = {"arguments": (args, kwargs)}, False
            self.names = ()
            self.outs = self.written = self.tags = frozenset[Any]()
        self.tensors: list[tuple[str, Tensor]] = []
        for key, value in self.given.items():
            if isinstance(value, Tensor):
                self.tensors.append((key, value))
            elif isinstance(value, (list, tuple)):
                self.tensors += [(key, t) for t in leaves_of(value) if isinstance(t, Tensor)]
        self.left = list(self.tensors)

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name)

    def take(self, *names: str) -> list[Tensor]:
        """The tensors of some arguments, or of all; the rule accounts for them."""
        taken = [t for name, t in self.left if not names or name in names]
        self.left = [(name, t) for name, t in self.left if names and name not in names]
        return taken
