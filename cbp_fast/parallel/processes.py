"""What knows of several processes: which they are, what they must agree on, and what of a step is whose."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..groups.layers import inside, out_axis, read_width
from ..groups.spec import Member, ResolvedGroup
from ..tensors.parts import Extent, extent_of, is_dtensor


@dataclass(frozen=True)
class Processes:
    """The processes that train one model together, and what of a step is this one's.

    Attributes:
        group: over which the sums are reduced.
        seed: of all of them.
        counts: whether this process counts samples: along a tensor-parallel dimension all see the same ones.
        tensor_parallel: by parameter, the dimensions of its mesh that are tensor-parallel.
        first: by name of a split weight, whether this process is the first that holds its part.
        split: whether they hold parts of the parameters, or see the same samples.
    """

    group: Any
    seed: int
    counts: bool
    tensor_parallel: dict[Tensor, range]
    first: dict[str, bool]
    split: bool

    def extent(self, name: str, tensor: Tensor) -> Extent:
        """As `extent_of`, with who adds it."""
        extent = extent_of(name, tensor)
        return extent._replace(adds=extent.part.numel() > 0 and self.first.get(name, True))

    def seen(self, member: Member) -> range:
        """The features of its input that a reading layer sees in this process."""
        axis = 1 - out_axis(member.module)
        weight = member.module.weight
        dims = self.tensor_parallel.get(weight, range(0))  # type: ignore[arg-type]
        if any(getattr(weight.placements[d], "dim", None) == axis for d in dims):  # type: ignore[union-attr, index]
            extent = extent_of(member.name, weight)  # type: ignore[arg-type]
            return range(extent.first[axis], extent.first[axis] + extent.part[axis])
        return range(read_width(member.module))

    def of_first(self, value: Any) -> Any:
        """What the first process has."""
        values = [value]
        dist.broadcast_object_list(values, group=self.group, group_src=0)
        return values[0]

    def reduce_(self, flat: Tensor) -> dist.Work:
        """Begin to add up what all processes have; every one gets the same bits, when the result is waited for."""
        return dist.all_reduce(flat, group=self.group, async_op=True)


def several_processes() -> bool:
    """Whether PyTorch runs in more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and `torch.compile`.

    Raises:
        ValueError: FullyShardedDataParallel wraps it or a part of it.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules()):
        raise ValueError(
            "FullyShardedDataParallel keeps parameters in a flat one; use torch.distributed.fsdp.fully_shard"
        )
    return inside(model)


def join_processes(
    model: nn.Module, groups: Sequence[ResolvedGroup], process_group: Any, seed: int | None, settings: dict[str, Any]
) -> Processes | None:
    """Find the processes that train the model together, and agree with them on what all must have alike.

    One all_gather. None where this is the only process.

    Args:
        settings: what must be equal everywhere, by name.

    Raises:
        ValueError: a process has another network, seed or setting, or the model is parallel in a way that does not
            work.
    """
    tensor_parallel = _tensor_parallel(model)
    group = _group(model, process_group)
    if group is None:
        return None
    members = {m.name: m for g in groups for m in (*g.incoming, *g.outgoing, *g.norms)}
    shapes = {
        f"{name}.{key}": (tuple(p.shape), str(p.dtype))
        for name, member in members.items()
        for key, p in member.module.named_parameters(recurse=False)
    }
    extents = {}
    for name, member in members.items():
        where = extent_of(name, member.module.weight)  # type: ignore[arg-type]
        if where.split:
            extents[f"{name}.weight"] = where.part, where.first
    parts = {g.name: [(m.name, *m.block) for m in (*g.incoming, *g.outgoing, *g.norms)] for g in groups}
    alike = {"parameters": shapes, "groups": parts, "seed": seed, **settings}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (alike, extents, torch.initial_seed()), group=group)
    _check_alike([theirs for theirs, _, _ in everyone])
    first = {}
    for name, extent in extents.items():
        held = [theirs[name] for _, theirs, _ in everyone]
        if sum(part.numel() for part, _ in set(held)) != torch.Size(shapes[name][0]).numel():
            raise ValueError(
                f"the parts of {name} in the {len(held)} processes do not make up the whole; pass the process_group "
                "of all that train the model"
            )
        first[name] = held.index(extent) == dist.get_rank(group)
    lead = all(
        p.device_mesh.get_coordinate()[d] == 0  # type: ignore[attr-defined]
        for p, dims in tensor_parallel.items()
        for d in dims
    )
    split = bool(extents) or any(tensor_parallel.values())
    return Processes(group, everyone[0][2] if seed is None else seed, lead, tensor_parallel, first, split)


def _check_alike(everyone: Sequence[dict[str, Any]]) -> None:
    """Complain of the first thing in which a process differs from the first one."""
    for rank, theirs in enumerate(everyone):
        for what, value in everyone[0].items():
            if theirs[what] == value:
                continue
            mine, other = value, theirs[what]
            if isinstance(value, dict):
                key = next(k for k in {**value, **other} if value.get(k) != other.get(k))
                what, mine, other = f"{what}[{key!r}]", value.get(key), other.get(key)
            raise ValueError(
                f"the processes differ: {what} is {mine!r} on rank 0 and {other!r} on rank {rank}; attach the same "
                "network with the same arguments everywhere, or pass the process_group of those that train together"
            )


def _group(model: nn.Module, process_group: Any) -> Any:
    """The process group to reduce over; None for a single process."""
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError("process_group is given but torch.distributed is not initialized")
        return None
    inner = unwrapped(model)
    meshes = {p.device_mesh for p in inner.parameters() if is_dtensor(p)}  # type: ignore[attr-defined]
    group = process_group
    if group is None and inner is not model and not meshes:
        group = model.process_group
    managed = all(p in _managed(inner) for p in inner.parameters())
    if group is None and managed and len(meshes) == 1 and next(iter(meshes)).ndim == 1:
        group = next(iter(meshes)).get_group()
    group = dist.group.WORLD if group is None else group
    ranks = dist.get_process_group_ranks(group)
    for mesh in meshes:
        if outside := set(mesh.mesh.flatten().tolist()) - set(ranks):
            raise ValueError(f"the model is spread over ranks {sorted(outside)}, which are not in process_group")
    return group if len(ranks) > 1 else None


def _managed(model: nn.Module) -> dict[Tensor, nn.Module]:
    """The parameters that `fully_shard` or `replicate` keeps, each with the innermost module that it was applied to."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    owners: Iterable[nn.Module] = (m for m in model.modules() if fsdp and isinstance(m, fsdp.FSDPModule))
    # inner modules come after outer ones
    return {p: owner for owner in owners for p in owner.parameters()}


def _tensor_parallel(model: nn.Module) -> dict[Tensor, range]:
    """By parameter, the dimensions of its mesh along which all processes see the same samples."""
    managed = _managed(model)
    found: dict[Tensor, range] = {}
    for p in model.parameters():
        if not is_dtensor(p):
            continue
        placements, data = p.placements, 0  # type: ignore[attr-defined]
        if p in managed:
            # fully_shard over two dimensions replicates along the first of them
            replicate = any(cls.__name__ == "ReplicateModule" for cls in type(managed[p]).__mro__)
            data = 2 if placements[0].is_replicate() and not replicate else 1
        found[p] = range(min(data, len(placements)), len(placements))
    return found
