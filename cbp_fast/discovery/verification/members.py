"""What makes, scales and reads units of a group, in the tensors of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ...groups.layers import out_axis, read_width, spatial_axes
from ...groups.spec import Member, ResolvedGroup

# a tensor with units along the first axis, indices, a norm's default, usual size
Made = tuple[Tensor, Tensor, float | None, float]


def made_by(group: ResolvedGroup, units: Tensor) -> Iterator[Made]:
    """(tensor with units along the first axis, indices, a norm's default, usual size) of what makes or scales units."""
    for member in group.incoming:
        weight, bias = member.module.get_parameter("weight").detach(), getattr(member.module, "bias", None)
        index = _indices(member, units).to(weight.device)
        rows = weight.movedim(out_axis(member.module), 0)
        scale = float(weight.abs().mean()) or 0.1
        yield rows, index, None, scale
        if bias is not None:
            # enough to switch a unit on or off for every input
            yield bias.detach(), index, None, scale * (rows[0].numel() ** 0.5)
    for member in group.norms:
        for key, default in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            tensor = getattr(member.module, key, None)
            if tensor is not None:
                yield tensor.detach(), _indices(member, units).to(tensor.device), default, 1.0


def columns_of(member: Member, units: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The weight of a reader with its features along the first axes, and their indices there."""
    weight, groups = member.module.get_parameter("weight").detach(), getattr(member.module, "groups", 1)
    index = _indices(member, units).to(weight.device)
    if out_axis(member.module):
        return weight, (index,)
    each = read_width(member.module) // groups
    blocks = weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return blocks, (index // each, index % each)


def observe(member: Member, units: Tensor, features: list[Tensor], module: nn.Module, args: Any, kwargs: Any) -> None:
    """Keeps what the columns of some units read."""
    with _disable_current_modes():
        x = next(t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        while torch._C._functorch.is_functorch_wrapped_tensor(x):
            axis = torch._C._functorch.maybe_get_bdim(x)
            x = torch._C._functorch.get_unwrapped(x)
            x = x if axis < 0 else x.movedim(axis, 0)
        x = x.detach()
        if x.is_nested:
            x = torch.cat([part.flatten(0, -2) for part in x.unbind()])
        x = x.movedim(x.dim() - 1 - spatial_axes(member.module), -1)
        features.append(x[..., _indices(member, units).to(x.device)])


def _indices(member: Member, units: Tensor) -> Tensor:
    start, unit_stride, per_unit, position_stride = member.block
    return (start + units[:, None] * unit_stride + torch.arange(per_unit, device="cpu") * position_stride).flatten()
