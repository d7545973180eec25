"""How the unit groups of a model are asked for, and which of them are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from ..groups.resolving import strings
from ..groups.spec import ResolvedGroup, UnitGroup


class Asked(NamedTuple):
    """What is remembered of how the groups are to be found."""

    groups: UnitGroup | Sequence[UnitGroup] | None
    example_inputs: Any
    include: str | Sequence[str] | None
    exclude: str | Sequence[str] | None
    include_coupled: bool = False
    unreached_ok: bool = False
    ignore_outputs: str | Sequence[str] = ()
    verify: bool = False

    def finding(self) -> dict[str, Any]:
        """The options of `find_unit_groups`."""
        return {name: getattr(self, name) for name in ("include_coupled", "unreached_ok", "ignore_outputs", "verify")}

    def without_finding(self) -> Asked:
        """The same without those."""
        return self._replace(include_coupled=False, unreached_ok=False, ignore_outputs=(), verify=False)

    def check_given(self) -> None:
        """Raises ValueError for options of finding groups, where groups are given."""
        # a beginning of all outputs is empty
        options = [name for name, value in self.finding().items() if value or value == ""]
        if options:
            names = ", ".join(options)
            raise ValueError(
                f"groups= gives the unit groups, and {names} is for finding them (verify_unit_group checks given ones)"
            )


def in_forward_order(groups: Sequence[ResolvedGroup]) -> list[ResolvedGroup]:
    """Groups whose readers make the units of another go before it; each is told which layers precede its own."""
    makers = [{member.module for member in group.incoming} for group in groups]
    before = [
        [other for other in groups if other is not group and any(member.module in made for member in other.outgoing)]
        for group, made in zip(groups, makers, strict=True)
    ]
    waiting, ordered = list(range(len(groups))), []
    placed: set[str] = set()
    while waiting:
        # in a circle the given order stands
        ready = (i for i in waiting if all(other.name in placed for other in before[i]))
        i = next(ready, waiting[0])
        waiting.remove(i)
        placed.add(groups[i].name)
        ordered.append(replace(groups[i], preceding=tuple(layer for other in before[i] for layer in other.incoming)))
    return ordered


def filtered(
    groups: list[ResolvedGroup], include: str | Sequence[str] | None, exclude: str | Sequence[str] | None
) -> list[ResolvedGroup]:
    """The groups whose names match.

    Raises:
        ValueError: a pattern matches none.
        TypeError: it is no pattern.
    """

    def matches(option: str, patterns: str | Sequence[str]) -> set[str]:
        hits: set[str] = set()
        for pattern in strings(option, patterns, "patterns of group names, such as 'layers.*'"):
            found = {group.name for group in groups if fnmatchcase(group.name, pattern)}
            if not found:
                names = ", ".join(group.name for group in groups)
                raise ValueError(f"{option}={pattern!r} matches no unit group; they are: {names}")
            hits |= found
        return hits

    taken = {group.name for group in groups} if include is None else matches("include", include)
    left_out = set() if exclude is None else matches("exclude", exclude)
    return [group for group in groups if group.name in taken - left_out]
