"""The A/B check of a unit group: does what it says of rows and columns hold when the model runs?"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .running import Forward, Preserving, forwards, restored, untouched, unwrapped
from .snapshot import tensors_in
from .unit_groups import Member, ResolvedGroup, UnitGroup, out_axis, read_width, resolve, spatial_axes


def verify_unit_groups(model: nn.Module, groups: Iterable[UnitGroup], example_inputs: Any) -> None:
    """Applies :func:`verify_unit_group` to every group."""
    for group in groups:
        verify_unit_group(model, group, example_inputs)


def verify_unit_group(model: nn.Module, group: UnitGroup, example_inputs: Any) -> None:
    """Checks a unit group by changing weights and running the model; everything is as before afterwards.

    For every other unit of the group, on weights with some noise added (so that no zero hides anything):

    - A: with their columns at zero, random rows, biases and norm entries do not move the output: nothing else reads
      them.
    - B: with rows and biases at zero and norm entries at their defaults, their columns see the same whatever the input:
      nothing else is read there.

    Norms over features (``layer_norm``, ``group_norm``, ``rms_norm`` of torch.nn.functional) couple all units by their
    statistics; here they only scale and shift.

    Args:
        model: the model, on real memory.
        group: a group, found or given by hand.
        example_inputs: as of :func:`~cbp_fast.find_unit_groups`; the first forward's inputs are also varied, for B.

    Raises:
        TypeError, ValueError: if the group does not resolve.
        ValueError: if the check fails, or shows nothing because the output does not depend on the units.
    """
    model = unwrapped(model)
    resolved = resolve(model, group)
    failed = _failure(model, resolved, forwards(example_inputs))
    if failed:
        raise ValueError(f"unit group '{group.name}' does not pass the check: {failed}")


def _failure(model: nn.Module, group: ResolvedGroup, runs: Sequence[Forward]) -> str:
    units = torch.arange(0, group.num_units, 2, device="cpu")
    with restored(model), torch.no_grad(), _Uncoupled():
        generator = torch.Generator("cpu").manual_seed(0)
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(_noise(p, generator) * (0.1 * p.abs().mean() + 0.01))

        def columns(value: float | None) -> None:
            for member in group.outgoing:
                _fill(*_columns(member, units), value, generator)

        def rows(value: float | None) -> None:
            for tensor, index, default in _made(group, units):
                _fill(tensor, (index,), value if value is None or default is None else default, generator)

        with restored(model):
            before = _outputs(model, runs)
            rows(None)
            if not _differ(before, _outputs(model, runs)):
                return "the output does not depend on its units, so that the check shows nothing"
        with restored(model):
            columns(0.0)
            before = _outputs(model, runs)
            rows(None)
            if _differ(before, _outputs(model, runs)):
                return (
                    "its units reach the output by another way than the columns of its outgoing layers (as by a norm "
                    "over features that is written by hand)"
                )
        rows(0.0)
        if _differ(*(_features(model, group, units, runs, vary) for vary in (False, True))):
            return "the columns of its outgoing layers read something else than its units"
    return ""


class _Uncoupled(TorchFunctionMode):
    """Norms over features become their scale and shift."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in ("layer_norm", "group_norm", "rms_norm") or not isinstance(args[0], Tensor):
            return func(*args, **kwargs)
        x = args[0]
        weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
        bias = kwargs.get("bias", args[3] if len(args) > 3 and name != "rms_norm" else None)
        if name == "group_norm":
            weight, bias = (t if t is None else t.reshape(-1, *(1,) * (x.dim() - 2)) for t in (weight, bias))
        x = x if weight is None else x * weight
        return x if bias is None else x + bias


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float32, device="cpu").to(like.device, like.dtype)


def _fill(tensor: Tensor, index: tuple[Tensor, ...], value: float | None, generator: torch.Generator) -> None:
    """Sets entries to a value, or (None) to random numbers between 0.5 and 2."""
    place = tensor[index]
    if value is None:
        place = (torch.rand(place.shape, generator=generator, device="cpu") * 1.5 + 0.5).to(place)
    else:
        place = torch.full_like(place, value)
    tensor[index] = place


def _indices(member: Member, units: Tensor) -> Tensor:
    start, unit_stride, per_unit, position_stride = member.block
    return (start + units[:, None] * unit_stride + torch.arange(per_unit, device="cpu") * position_stride).flatten()


def _made(group: ResolvedGroup, units: Tensor) -> Iterator[tuple[Tensor, Tensor, float | None]]:
    """(tensor with units along the first axis, indices, default of a norm) of all that makes or normalises units."""
    for member in group.incoming:
        weight, bias = member.module.get_parameter("weight"), getattr(member.module, "bias", None)
        index = _indices(member, units).to(weight.device)
        yield weight.movedim(out_axis(member.module), 0), index, None
        if bias is not None:
            yield bias, index, None
    for member in group.norms:
        for key, default in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            tensor = getattr(member.module, key, None)
            if tensor is not None:
                yield tensor, _indices(member, units).to(tensor.device), default


def _columns(member: Member, units: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The weight of a reader with its features along the first axes, and their indices there."""
    weight, groups = member.module.get_parameter("weight"), getattr(member.module, "groups", 1)
    index = _indices(member, units).to(weight.device)
    if out_axis(member.module):
        return weight, (index,)
    each = read_width(member.module) // groups
    blocks = weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return blocks, (index // each, index % each)


def _outputs(model: nn.Module, runs: Sequence[Forward]) -> list[Tensor]:
    tensors = []
    for run in runs:
        torch.manual_seed(0)
        with untouched(model), Preserving() as changes:
            try:
                output = run(model)
            finally:
                changes.restore()
            tensors += [t.detach().clone() for _, t in tensors_in(output) if t.is_floating_point()]
    return tensors


def _features(
    model: nn.Module, group: ResolvedGroup, units: Tensor, runs: Sequence[Forward], vary: bool
) -> list[Tensor]:
    """What the columns of the units see, on the given inputs or on other ones: least and greatest values."""
    seen: list[Tensor] = []
    depth = [0]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        depth[0] += 1
        if not vary or depth[0] > 1:
            return None
        return torch.utils._pytree.tree_map(_varied, (args, kwargs))

    def observe(member: Member, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = (args[0] if args else kwargs["input"]).detach()
        x = x.movedim(x.dim() - 1 - spatial_axes(member.module), -1)
        seen.append(x[..., _indices(member, units).to(x.device)])

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda *_: depth.__setitem__(0, depth[0] - 1), always_call=True))
    for member in group.outgoing:
        handles.append(member.module.register_forward_pre_hook(functools.partial(observe, member), with_kwargs=True))
    try:
        _outputs(model, runs)
    finally:
        for handle in handles:
            handle.remove()
    return [t.amin(0) if t.dim() > 1 else t for t in seen] + [t.amax(0) if t.dim() > 1 else t for t in seen]


def _varied(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.dim():
        return value
    if value.is_floating_point():
        return value * 1.5 + 0.5
    return value.flip(0).roll(1, -1)


def _differ(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists of results are unlike beyond rounding."""
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return True
        scale = float(a.abs().max()) if a.numel() else 0.0
        tolerance = torch.finfo(a.dtype).eps * 16 * max(scale, 1e-6)
        if a.numel() and not float((a - b).abs().max()) <= tolerance:
            return True
    return False
