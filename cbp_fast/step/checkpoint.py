"""What a `state_dict` holds, and what it must hold to go on from it, checked before anything is changed."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from ..rules.rule import Rule
from ..state.state import State
from ..tensors.memory import copy_buffer, extent_of, room_of
from .settings import checked_hyper, shown


def saved(state: State, hyper: Mapping[str, float]) -> dict[str, Any]:
    """Everything that a resumed run needs, as copies, by group name."""
    groups: dict[str, dict[str, Any]] = {}
    for g, layout in enumerate(state.layouts):
        groups[layout.name] = {
            "utility": state.utility[layout.units].clone(),
            "age": state.age[layout.units].clone(),
            "pending": float(state.pending[g]),
            "num_replaced": int(state.num_replaced[g]),
        }
        if state.rule.keeps_mean:
            groups[layout.name]["running_mean"] = state.running_mean[state.columns_of(layout)].clone()
    numbers = {"seed": int(state.seed), "step": int(state.step)}
    measured = {"deviations": state.deviations} if state.deviations else {}
    return {"rule": state.rule.options, **hyper, **numbers, **measured, "groups": groups}


def load(state: State, theirs: Mapping[str, Any]) -> None:
    """Put what was saved, and checked, into a state; what forwards have left is forgotten."""
    # all of it in a copy first
    buffer = state.buffer.clone()
    fields = state.views(buffer)
    for g, layout in enumerate(state.layouts):
        group = theirs["groups"][layout.name]
        fields["utility"][layout.units].copy_(group["utility"])
        fields["age"][layout.units].copy_(group["age"])
        fields["pending"][g] = group["pending"]
        fields["num_replaced"][g] = group["num_replaced"]
        if state.rule.keeps_mean:
            fields["running_mean"][state.columns_of(layout)].copy_(group["running_mean"])
    fields["seed"].fill_(theirs["seed"])
    fields["step"].fill_(theirs["step"])
    for name in ("num_chosen", "count", "activation", "feature"):
        fields[name].zero_()
    if state.deviations:
        state.deviations = theirs["deviations"]
    copy_buffer(state.buffer, buffer)


def carry_over(theirs: State, state: State) -> None:
    """Go on where another state of the model and rule is: groups of the same name and width keep what they have."""
    before = {layout.name: (g, layout) for g, layout in enumerate(theirs.layouts)}
    for g, layout in enumerate(state.layouts):
        number, old = before.get(layout.name, (0, None))
        if old is None or old.num_units != layout.num_units:
            continue
        state.utility[layout.units].copy_(theirs.utility[old.units])
        state.age[layout.units].copy_(theirs.age[old.units])
        state.pending[g].copy_(theirs.pending[number])
        state.num_replaced[g].copy_(theirs.num_replaced[number])
        readers = {theirs.slots[s].module: theirs.slots[s] for s in old.slots}
        for slot in (state.slots[s] for s in layout.slots if state.rule.keeps_mean):
            same = readers.get(slot.module)
            if same is not None and same.block == slot.block:
                state.running_mean[slot.columns].copy_(theirs.running_mean[same.columns])
    if state.deviations:
        state.deviations = theirs.deviations
    state.seed.copy_(theirs.seed)
    state.step.copy_(theirs.step)


def checked_state(state_dict: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a `state_dict` in which every entry is of the kind and size that it is in `own`.

    Args:
        own: what this network saves; its groups are None where they are not known yet.

    Raises:
        ValueError: an entry is not as it must be.
    """
    theirs = _entries(state_dict, "state_dict", own)
    rule = theirs["rule"]
    if not isinstance(rule, Mapping):
        raise ValueError(f"state_dict was saved with another rule: {shown(rule)}")
    rule = _entries(rule, "state_dict['rule']", own["rule"])
    differ = [
        f"{key}={shown(rule[key])}, not {mine!r}"
        for key, mine in own["rule"].items()
        if type(rule[key]) is not type(mine) or rule[key] != mine
    ]
    if differ:
        raise ValueError(f"state_dict was saved with another rule: {'; '.join(differ)}")
    try:
        hyper = checked_hyper({key: theirs[key] for key in own if key.endswith(("_rate", "_threshold"))})
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"state_dict: {error}") from None
    numbers = {key: _checked_entry(key, theirs[key], own[key]) for key in ("seed", "step")}
    measured = {}
    if "deviations" in own:
        mine = own["deviations"]
        deviations = _entries(theirs["deviations"], "state_dict['deviations']", mine)
        measured["deviations"] = {
            str(name): _checked_entry(f"deviation of {shown(name)}", value, 0.0) for name, value in deviations.items()
        }
    known = own["groups"]
    groups = _entries(theirs["groups"], "state_dict['groups'] (another network?)", known)
    checked: dict[str, dict[str, Any]] = {}
    for name, group in groups.items():
        what = f"group '{name}'" if type(name) is str else f"group {shown(name)}"
        mine = known[name] if known is not None else _group_like(group, own["rule"])
        group = _entries(group, f"state_dict of {what}", mine)
        checked[name] = {key: _checked_entry(f"{key} of {what}", group[key], value) for key, value in mine.items()}
    return {"rule": dict(own["rule"]), **hyper, **numbers, **measured, "groups": checked}


def _group_like(group: Any, rule: Mapping[str, Any]) -> dict[str, Any]:
    """What a group's entries must be, of which nothing is known but what was saved."""
    utility, mean = (group.get(key) if type(group) is dict else None for key in ("utility", "running_mean"))
    n = _length(utility)
    double = type(utility) is Tensor and utility.dtype == torch.float64
    like: dict[str, Any] = {
        "utility": torch.empty(n, dtype=torch.float64 if double else torch.float32, device="cpu"),
        "age": torch.empty(n, dtype=torch.int32, device="cpu"),
        "pending": 0.0,
        "num_replaced": 0,
    }
    if Rule(**rule).keeps_mean:
        like["running_mean"] = torch.empty(_length(mean), dtype=torch.float64, device="cpu")
    return like


def _length(vector: Any) -> int:
    return len(vector) if type(vector) is Tensor and not vector.is_nested and vector.dim() == 1 else 0


def _entries(theirs: Any, what: str, mine: Mapping[str, Any] | None) -> dict[Any, Any]:
    """The entries of a mapping, which must have the keys of `mine`, if those are known."""
    if not isinstance(theirs, Mapping):
        raise ValueError(f"{what} is a {type(theirs).__name__}, must be a mapping")
    try:
        entries = {key: theirs[key] for key in theirs}
        keys = set(entries)
        wrong_type = [key for key in keys if type(key) is not str]
        missing, unexpected = (set(), set()) if mine is None else (mine.keys() - keys, keys - mine.keys())
    except Exception as error:
        raise ValueError(f"{what} cannot be read: {shown(error)}") from None
    if missing or unexpected or wrong_type:
        extra = sorted(shown(key) for key in {*unexpected, *wrong_type})
        gone = sorted(missing) or "nothing"
        raise ValueError(f"{what}: missing {gone}, unexpected {', '.join(extra[:20]) or 'nothing'}")
    return entries


def _checked_entry(what: str, theirs: Any, mine: Any) -> Any:
    """A copy of one entry of a `state_dict`."""
    if isinstance(mine, Tensor):
        return _checked_tensor(what, theirs, mine)
    kind = numbers.Integral if isinstance(mine, int) else numbers.Real
    least = -(2**63) if what == "seed" else 0
    try:
        value = type(mine)(theirs) if isinstance(theirs, kind) and not isinstance(theirs, bool) else None
    except Exception:
        value = None
    if value is None:
        raise ValueError(f"state_dict: {what} is {shown(theirs)}, must be a {type(mine).__name__}")
    if not least <= value < 2**63:
        raise ValueError(f"state_dict: {what} is {shown(theirs)}, must be at least {least} and below 2**63")
    return value


def _checked_tensor(what: str, theirs: Any, mine: Tensor) -> Tensor:
    must = f"must be {tuple(mine.shape)} {mine.dtype}"
    if type(theirs) is not Tensor:
        raise ValueError(f"state_dict: {what} is {type(theirs).__name__}, {must}")
    try:
        if theirs.layout != torch.strided or theirs.shape != mine.shape or theirs.dtype != mine.dtype:
            layout = "" if theirs.layout == torch.strided else f" {theirs.layout}"
            raise ValueError(f"state_dict: {what} is {tuple(theirs.shape)} {theirs.dtype}{layout}, {must}")
        if theirs.requires_grad:
            raise ValueError(f"state_dict: {what} requires a gradient; detach it")
        if theirs.is_meta or is_functorch_wrapped_tensor(theirs) or room_of(theirs) < extent_of(theirs):
            raise ValueError(f"state_dict: {what} has no numbers in it")
        copy = theirs.detach().to("cpu", copy=True)
        good = bool(copy.isfinite().all()) and (what.startswith("running_mean") or not bool((copy < 0).any()))
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(f"state_dict: {what} cannot be read: {shown(error)}") from None
    if not good:
        raise ValueError(f"state_dict: {what} has entries that are negative or not finite")
    return copy
