"""What loss of plasticity looks like from outside: dormant units, rank of a representation, size of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def dormant_units(h: Tensor, tau: float = 0.0) -> Tensor:
    """Which units have all but stopped answering: mean abs(h_j) <= tau * (mean of that over the layer).

    Sokar et al., "The dormant neuron phenomenon in deep reinforcement learning", ICML 2023, eq. 1; tau = 0 finds the
    units that are zero on every sample. A unit with a value that is not finite is not dormant, and the layer's mean
    leaves it out.

    Args:
        h: activations `[..., H]`, the units last and samples before them (for a convolution `h.movedim(1, -1)`).
        tau: share of the layer's mean magnitude at or below which a unit counts as dormant.

    Returns:
        bool `[H]`; `.sum()` is how many, `.float().mean()` their share.

    Raises:
        ValueError: `h` has no sample, or `tau` is negative.
    """
    if not tau >= 0:
        raise ValueError(f"dormant_units: tau is {tau}, must be 0 or more")
    magnitude = _samples("dormant_units", h).abs().mean(0)
    layer = magnitude[magnitude.isfinite()].mean()
    return magnitude <= tau * layer


@torch.no_grad()
def effective_rank(h: Tensor) -> Tensor:
    """How many directions a representation uses: exp(-sum_k p_k log p_k), p = singular values / their sum.

    Roy & Vetterli, "The effective rank", EUSIPCO 2007. Between 1 and min(samples, H).

    Args:
        h: activations `[..., H]`, the units last and samples before them.

    Returns:
        float64 scalar: 0 where h is zero throughout, NaN where something in it is not finite.

    Raises:
        ValueError: `h` has no sample.
    """
    p = _spectrum("effective_rank", h)
    return torch.special.entr(p).sum().exp() * (p.sum() != 0)


@torch.no_grad()
def stable_rank(h: Tensor, share: float = 0.99) -> Tensor:
    """Least k such that the k largest singular values make up `share` of the sum of all.

    This is what Dohare et al., Nature 632 (2024), call stable rank; elsewhere the name also stands for
    (Frobenius norm / spectral norm)^2, which is another number.

    Args:
        h: activations `[..., H]`, the units last and samples before them.
        share: of the sum of singular values, in (0, 1].

    Returns:
        float64 scalar, a whole number: 0 where h is zero throughout, NaN where something in it is not finite.

    Raises:
        ValueError: `h` has no sample, or `share` is outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"stable_rank: share is {share}, must be above 0 and at most 1")
    p = _spectrum("stable_rank", h)
    # min: rounding can leave the whole sum a little below a share of 1
    k = torch.clamp((p.cumsum(0) < share).sum() + 1, max=int(p.count_nonzero()))
    return torch.where(p.sum().isnan(), p.sum(), k.to(p.dtype))


@torch.no_grad()
def weight_magnitude(model: nn.Module) -> Tensor:
    """Mean absolute value over all entries of all parameters of `model`, as Dohare et al., Nature 632 (2024), plot it.

    Returns:
        float64 scalar.

    Raises:
        ValueError: `model` has no parameter.
    """
    parameters = list(model.parameters())
    if not parameters:
        raise ValueError("weight_magnitude: the model has no parameter")
    total = torch.stack([p.abs().sum(dtype=torch.float64).cpu() for p in parameters]).sum()
    return total / sum(p.numel() for p in parameters)


def _samples(name: str, h: Tensor) -> Tensor:
    """h as float64 `[samples, H]`."""
    if h.dim() < 2 or h.numel() == 0:
        raise ValueError(f"{name}: h is {list(h.shape)}, must be [samples, units] with at least one of each")
    return h.detach().reshape(-1, h.shape[-1]).double()


def _spectrum(name: str, h: Tensor) -> Tensor:
    """Singular values of h `[..., H]` in descending order, divided by their sum; all zero where the sum is."""
    h = _samples(name, h)
    # LAPACK stops with an error on values that are not finite
    if not h.isfinite().all():
        return h.new_full((min(h.shape),), torch.nan)
    s = torch.linalg.svdvals(h)
    return s / s.sum() if s.any() else s
