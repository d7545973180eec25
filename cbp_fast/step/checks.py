"""Whether tensors are still what they were at attach, and can be written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..groups.spec import ResolvedGroup
from ..state.layout import TensorRef
from ..tensors.memory import room_of
from ..tensors.native import DTYPES, unwritable
from ..tensors.parts import is_dtensor


def checked(ref: TensorRef, device: torch.device, layer: str) -> Tensor:
    """The tensor as it is now.

    Args:
        device: where the state is.
        layer: for which layer that is done, for messages; empty for an attached object.

    Raises:
        RuntimeError: it is not what it was at attach.
    """
    tensor, of = ref.get(), f"{layer}: " if layer else ""
    again = "make the layer anew" if layer else "call refresh()"
    if tensor is None:
        raise RuntimeError(f"{of}{ref.name} is no longer there; {again}")
    if tensor.device != device:
        move = "model.to" if layer else "cbp.to"
        raise RuntimeError(
            f"{of}{ref.name} is on {tensor.device} but continual backprop's state is on "
            f"{device}; call {move}({str(tensor.device)!r}) after moving the model"
        )
    if is_dtensor(tensor) != ref.extent.is_dtensor:
        raise RuntimeError(
            f"{ref.name} became a {type(tensor).__name__} after continual backprop was attached; first fully_shard "
            "or parallelize_module the model, then make the optimizer, then attach"
        )
    if ref.is_parameter and not tensor.requires_grad:
        raise RuntimeError(
            f"{of}{ref.name} was frozen (requires_grad is False) after continual backprop was attached; "
            + ("take the layer out" if layer else "call refresh(), or exclude= its group")
        )
    for what, now, then in (("shape", tensor.shape, ref.shape), ("dtype", tensor.dtype, ref.dtype)):
        if now != then:
            raise RuntimeError(
                f"{of}{ref.name} has {what} {_plain(now)} but had {_plain(then)} when continual backprop was "
                f"attached; {again}"
            )
    return tensor


def check_entry(key: object, name: str, parameter: Tensor, entry: Tensor) -> None:
    """Raises RuntimeError for a tensor of the optimizer's state that cannot be set."""
    if entry.device != parameter.device or entry.layout != torch.strided or entry.dtype not in DTYPES:
        raise RuntimeError(
            f"the optimizer keeps {key} of '{name}' as a {entry.layout} tensor of {entry.dtype} on {entry.device}; to "
            f"be reset it must be dense, of 16 to 64 bits and on {parameter.device}"
        )


def check_memory(tensors: list[Tensor], names: Sequence[str], layer: str) -> None:
    """Raises RuntimeError for a tensor that has no memory of its own, or none that can be written."""
    found = unwritable(tensors, list(map(room_of, tensors)))
    if found is not None:
        number, why = found
        of = f"{layer}: " if layer else ""
        kind = type(tensors[number])
        which = "" if kind in (Tensor, torch.nn.Parameter) else f", a {kind.__name__},"
        name = names[number] if " of " in names[number] else f"'{names[number]}'"
        raise RuntimeError(
            f"{of}{name}{which} {why}, so that it cannot be re-initialised and nothing was; give it memory "
            "of its own that can be written, or exclude= its group"
        )


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, torch.Size) else value


def one_device(groups: Sequence[ResolvedGroup]) -> torch.device:
    """The device that all layers of the groups are on; raises ValueError for several."""
    names: dict[torch.device, str] = {}
    for group in groups:
        for name, module, _ in (*group.incoming, *group.outgoing, *group.norms):
            for tensor in module.parameters(recurse=False):
                names.setdefault(tensor.device, name)
    if len(names) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in names.items())
        raise ValueError(f"the groups lie on several devices ({places}); attach one object to each part of the model")
    device = next(iter(names))
    # of weights that are still to come the state is there already
    return torch.device("cpu") if device.type == "meta" else device
