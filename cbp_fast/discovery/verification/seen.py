"""What a run showed, and whether another one showed something else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Seen:
    """What a run showed.

    Attributes:
        features: for every reader and call, what the columns of some units read, [..., columns].
        outputs: what the run returned and kept.
        eps: the coarsest precision that anything was computed in.
        inputs: whether the model was given any tensor from outside; `varied`: whether one was another one.
    """

    def __init__(self, features: list[list[Tensor]]) -> None:
        self.features = features
        self.outputs: list[Tensor] = []
        self.eps = 0.0
        self.inputs = self.varied = False

    @property
    def finite(self) -> bool:
        """Whether all that the columns read is finite: then it adds nothing where they are zero."""
        return all(bool(x.isfinite().all()) for calls in self.features for x in calls)

    def gap(self, other: Seen) -> float:
        """How far outputs differ beyond rounding of the last place; 0 if they do not."""
        if len(self.outputs) != len(other.outputs):
            return float("inf")
        return max(map(_gap, self.outputs, other.outputs), default=0.0)

    def sees_other_than(self, other: Seen) -> bool:
        """Whether readers see something else, beyond rounding in the coarsest precision."""
        tolerance = 16 * max(self.eps, other.eps)
        return any(_unlike(*calls, tolerance) for calls in zip(self.features, other.features, strict=True))


def _gap(a: Tensor, b: Tensor) -> float:
    """How far two results differ, against the largest number in them; 0 if by rounding only."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.is_floating_point():
        return float((a != b).double().mean()) if a.numel() else 0.0
    finite = a.isfinite() & b.isfinite()
    if not bool((finite | (a == b) | (a.isnan() & b.isnan())).all()):
        return float("inf")
    # what is multiplied by zero adds nothing in low precision either
    eps = torch.finfo(torch.promote_types(a.dtype, torch.float32)).eps
    x, y = (torch.where(finite, t, 0).to(torch.promote_types(t.dtype, torch.float32)) for t in (a, b))
    most = float(x.abs().max()) if x.numel() else 0.0
    far = (x - y).abs() - eps * (16 * x.abs() + most)
    return float((x - y).abs().max()) / (most or 1.0) if x.numel() and bool((far > 0).any()) else 0.0


def _unlike(first: Sequence[Tensor], second: Sequence[Tensor], tolerance: float) -> bool:
    """Whether columns see different things in two runs, call by call; of calls that do not correspond, their range."""
    if [x.shape for x in first] == [x.shape for x in second]:
        pairs = list(zip(first, second, strict=True))
    else:
        calls = [[x.reshape(-1, x.shape[-1]) for x in calls if x.numel()] for calls in (first, second)]
        if not all(calls):
            return False
        rows = [torch.cat(some) for some in calls]
        pairs = list(zip(*([x.amin(0), x.amax(0)] for x in rows), strict=True))
    for a, b in pairs:
        finite = a.isfinite() & b.isfinite()
        x, y = (torch.where(finite, t, 0).to(torch.promote_types(t.dtype, torch.float32)) for t in (a, b))
        if x.numel() and bool(((x - y).abs() > tolerance * x.abs().max()).any()):
            return True
    return False


def dense(tensor: Tensor) -> Tensor:
    """A copy of all numbers in a tensor of any kind."""
    t = tensor.detach()
    if t.is_nested:
        t = torch.cat([part.flatten() for part in t.unbind()])
    elif t.layout != torch.strided:
        t = t.to_dense()
    if t.is_quantized:
        t = t.dequantize()
    return torch.view_as_real(t.resolve_conj()).clone() if t.is_complex() else t.clone()
