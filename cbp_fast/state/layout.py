"""Where a group's units lie: in the flat state, in the tensors of the model, and in what a reading layer sees."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..groups.layers import out_axis
from ..groups.spec import Block, Member
from ..tensors.parts import Extent, extent_of


class TensorRef(NamedTuple):
    """Where a tensor of the model is found at every step, so that a re-assigned one is seen."""

    owner: dict[str, Tensor | None]  # `_parameters` or `_buffers` of a module: no `__getattr__` on the way
    key: str
    name: str
    shape: torch.Size  # of the whole tensor
    dtype: torch.dtype
    extent: Extent

    def get(self) -> Tensor | None:
        """The tensor as it is now; None if the module has it no more."""
        return self.owner.get(self.key)

    @property
    def is_parameter(self) -> bool:
        """Whether an optimizer may keep state for it."""
        return self.key in ("weight", "bias")


class Slot(NamedTuple):
    """One layer that reads a group's units: the place where their activations are observed."""

    group: int
    module: nn.Module
    weight: int  # in `State.weights`, -1 where the rule does not read outgoing weights
    columns: slice  # in the column-wise fields of the state, in the order of the layer's features from block.start on
    spatial: int  # 0: features are the last axis; d: channels before d spatial axes
    block: Block  # which of the layer's features are the group's
    features: int  # all that the layer reads
    seen: range  # those of them that are in its input in this process
    counts: bool  # whether this process counts the samples

    @property
    def here(self) -> slice:
        """Which of the slot's columns this process sees, counted from the slot's first."""
        n, start = self.columns.stop - self.columns.start, self.block.start
        first = min(max(self.seen.start - start, 0), n)
        return slice(first, max(min(self.seen.stop - start, n), first))

    @property
    def first_seen(self) -> int:
        """The feature of the layer's input, in this process, where `here` begins."""
        return max(self.block.start - self.seen.start, 0)

    @property
    def adds(self) -> bool:
        """Whether what this process sums over samples is no other's to add."""
        return self.counts or len(self.seen) < self.features


class Layout(NamedTuple):
    """Where one group lies in the flat state."""

    name: str
    num_units: int
    columns_per_unit: int
    units: slice
    slots: tuple[int, ...]
    incoming: tuple[tuple[int, Block], ...]  # in `State.weights`, empty where the rule does not read incoming weights
    stream: int  # Philox tensor id of the group's own draws


def stream_id(name: str, group: bool = False) -> int:
    """Philox tensor id: the first 31 bits of the name's SHA-256; a group's own stream has the top bit set."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1 | (group << 31)


def tensor_ref(
    name: str, module: nn.Module, key: str, extent: Callable[[str, Tensor], Extent] = extent_of
) -> TensorRef | None:
    """Where `key` of the module called `name` is found; None if the module has no such tensor."""
    owners: tuple[Any, ...] = (module._parameters, module._buffers)
    for owner in owners:
        tensor = owner.get(key)
        if tensor is not None:
            full_name = f"{name}.{key}" if name else key
            where = extent(full_name, tensor)
            # fully_shard puts another tensor in its place while the module is in use
            owner = {key: tensor} if where.is_dtensor else owner
            return TensorRef(owner, key, full_name, tensor.shape, tensor.dtype, where)
    return None


def conv_groups_here(ref: TensorRef, conv_groups: int) -> tuple[int, int]:
    """How many of a weight's convolution groups this process holds, and the first of them."""
    rows = ref.shape[0] // conv_groups
    return (max(ref.extent.part[0] // rows, 1), ref.extent.first[0] // rows) if conv_groups > 1 else (1, 0)


def input_axis(member: Member) -> tuple[int, int]:
    """The axis of a reader's weight along which its inputs lie, and its convolution groups."""
    return 1 - out_axis(member.module), getattr(member.module, "groups", 1)


def columns_of(h: Tensor, slot: Slot) -> Tensor:
    """What a reading layer sees of the group, as [samples, positions, columns seen here]."""
    axis = h.dim() - 1 - slot.spatial
    h = h.narrow(axis, slot.first_seen, slot.here.stop - slot.here.start)
    if slot.spatial == 0:
        return h.reshape(-1, 1, h.shape[-1])
    if axis == 0:
        h = h[None]
    return h.flatten(2).transpose(1, 2)


def by_unit(columns: Tensor, slot: Slot) -> Tensor:
    """A slot's columns as a view [units, columns a unit]."""
    _, unit_stride, per_unit, position_stride = slot.block
    return columns.as_strided((len(columns) // per_unit, per_unit), (unit_stride, position_stride))
