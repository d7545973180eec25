"""Checks unit groups, found or given by hand, and raises where one is wrong or nothing is shown of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ...groups.resolving import resolve, strings
from ...groups.spec import UnitGroup
from ..running.forwards import forwards, unwrapped
from .check import check, check_memory


def verify_unit_groups(
    model: nn.Module, groups: Iterable[UnitGroup], example_inputs: Any, *, ignore_outputs: str | Sequence[str] = ()
) -> None:
    """Applies :func:`verify_unit_group` to every group."""
    for group in groups:
        verify_unit_group(model, group, example_inputs, ignore_outputs=ignore_outputs)


def verify_unit_group(
    model: nn.Module, group: UnitGroup, example_inputs: Any, *, ignore_outputs: str | Sequence[str] = ()
) -> None:
    """Checks a unit group by changing weights and running the model; everything is as before afterwards.

    For several subsets of the units, chosen so that every unit is without every other one in one of them:

    - A: with their columns at zero, other rows, biases and norm entries do not move the output: nothing else reads
      them.
    - B: with rows and biases at zero and norm entries at their defaults, their columns see the same whatever the input:
      nothing else is read there.

    Each subset is looked at with weights slightly changed (so that no zero hides anything), on the given inputs and on
    other ones, in another random state, with rows of both signs. What is multiplied by zero adds nothing in any
    precision, so results must be equal but for rounding of the last place and for what the model's own runs differ by.
    Where the model raises with other inputs or weights, or what the columns read is not finite, nothing is said.

    Norms over features (``layer_norm``, ``group_norm``, ``rms_norm`` of torch.nn.functional) couple all units by their
    statistics; here they only scale and shift. A norm that is written by hand is a coupling.

    Args:
        model: the model, on real memory.
        group: a group, found or given by hand.
        example_inputs: as of :func:`~cbp_fast.find_unit_groups`.
        ignore_outputs: as of :func:`~cbp_fast.find_unit_groups`.

    Raises:
        TypeError, ValueError: if the group does not resolve, or parameters have no memory or are held in parts.
        ValueError: if the check fails, or shows nothing because nothing moved the output or the model did not run.
    """
    model = unwrapped(model)
    check_memory(model)
    ignored = strings("ignore_outputs", ignore_outputs, "beginnings of paths of outputs")
    verdict = check(model, resolve(model, group), forwards(example_inputs), ignored)
    if verdict.unshown:
        raise ValueError(f"unit group '{group.name}': {verdict.unshown}, so that the check shows nothing")
    if verdict.failure:
        raise ValueError(f"unit group '{group.name}' does not pass the check: {verdict.failure}")
