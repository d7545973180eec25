"""What loss of plasticity looks like: dormant units, rank of a representation, size of the weights, ages, utilities."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch._C import _get_tracing_state as _tracing
from torch.compiler import is_compiling

from .continual_backprop import ContinualBackprop
from .hooks.forwards import Hook, hang, take_off
from .hooks.observing import is_observed
from .state.layout import Slot, by_unit, columns_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCALARS = {
    "dormant": "share of dormant units",
    "effective_rank": "effective rank",
    "stable_rank": "stable rank",
    "weight_magnitude": "mean weight magnitude",
}
_BINS = 30


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


class Writer(Protocol):
    """What of TensorBoard's SummaryWriter is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Takes one number."""

    def add_histogram(self, tag: str, values: Tensor, global_step: int) -> object:
        """Takes a tensor of values."""


class _Watcher(Hook):
    """Forward pre-hook of a reading layer that keeps rows of its input for a measurement."""

    __slots__ = ("monitor", "slot")

    def __init__(self, monitor: Monitor, slot: Slot) -> None:
        super().__init__(monitor._cbp)
        self.monitor: Monitor | None = monitor
        self.slot = slot

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        monitor, slot = self.monitor, self.slot
        if monitor is not None and module.training and is_observed() and not is_compiling() and not _tracing():
            h = columns_of(args[0] if args else kwargs["input"], slot).flatten(0, 1)
            # a copy: what follows may change it in place
            monitor._seen[slot.group] = slot, h[:: -(-len(h) // monitor._samples)].clone()

    def off(self) -> None:
        self.monitor = None


class Monitor:
    """Plasticity of a network under continual backprop, measured every so many steps.

    Call `step()` after every step of the optimizer. A measurement looks at the last training forward before it, through
    hooks that are on the reading layers for that step only; in between a step costs an addition and a comparison. A
    model compiled by `torch.compile` runs no later hooks: of it only weights, ages and utilities are measured.

    Args:
        cbp: attached to the network.
        every: steps from one measurement to the next.
        tau: as of `dormant_units`.
        samples: rows of a forward, taken evenly, on which ranks and dormant units are measured.
        writer: a `SummaryWriter`, or anything with `add_scalar` and `add_histogram`, that gets every measurement.

    Attributes:
        history: the measurements, made of plain numbers, strings, dicts and lists, as `json.dump` takes them: "step",
            "weight_magnitude" of the model, and "groups": by name "dormant" (share), "effective_rank", "stable_rank",
            "replaced" (units so far), and "age" and "utility" as {"counts": [...], "edges": [...]}.

    Raises:
        ValueError: `every` or `samples` is not a positive integer, or `tau` is negative.

    Example:
        >>> monitor = Monitor(cbp, every=1000)
        >>> for x, y in stream:
        ...     F.cross_entropy(model(x), y).backward()
        ...     optimizer.step()
        ...     monitor.step()
    """

    def __init__(
        self,
        cbp: ContinualBackprop,
        every: int = 1000,
        *,
        tau: float = 0.0,
        samples: int = 512,
        writer: Writer | None = None,
    ) -> None:
        if not isinstance(cbp, ContinualBackprop):
            raise TypeError(f"cbp is a {type(cbp).__name__}, must be a ContinualBackprop attached to the model")
        for name, value in (("every", every), ("samples", samples)):
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ValueError(f"Monitor: {name} is {value!r}, must be a positive integer")
        if not tau >= 0:
            raise ValueError(f"Monitor: tau is {tau}, must be 0 or more")
        self.history: list[dict[str, Any]] = []
        self._cbp, self._every, self._tau, self._samples, self._writer = cbp, int(every), tau, int(samples), writer
        self._steps = 0
        self._modules: list[nn.Module] = []
        self._seen: dict[int, tuple[Slot, Tensor]] = {}
        self._watch_if_next()

    @torch.no_grad()
    def step(self) -> dict[str, Any] | None:
        """Counts a step; returns the measurement if one was due."""
        self._steps += 1
        measured = None
        if self._steps % self._every == 0:
            measured = self._measure()
            self.history.append(measured)
        self._watch_if_next()
        return measured

    def remove(self) -> None:
        """Takes its hooks off the model."""
        take_off(self._modules, lambda hook: isinstance(hook, _Watcher) and hook.monitor is self)
        self._modules = []

    def _watch_if_next(self) -> None:
        self.remove()
        self._seen = {}
        if (self._steps + 1) % self._every == 0:
            for slot in self._cbp._engine.state.slots:
                self._modules.append(slot.module)
                hang(slot.module, _Watcher(self, slot))

    def _measure(self) -> dict[str, Any]:
        cbp, state = self._cbp, self._cbp._engine.state
        step, magnitude = int(state.step), weight_magnitude(cbp._model).item()
        groups: dict[str, dict[str, Any]] = {}
        replaced, values = cbp.num_replaced, {"age": cbp.age, "utility": cbp.utility}
        for g, layout in enumerate(state.layouts):
            group: dict[str, Any] = {}
            if g in self._seen:
                group |= self._representation(*self._seen[g])
            group["replaced"] = replaced[layout.name]
            for name, of_groups in values.items():
                group[name] = _histogram(of_groups[layout.name])
            groups[layout.name] = group
        if self._writer is not None:
            self._writer.add_scalar("weight_magnitude", magnitude, step)
            for name, group in groups.items():
                for key, value in group.items():
                    if key in values:
                        self._writer.add_histogram(f"{name}/{key}", values[key][name], step)
                    else:
                        self._writer.add_scalar(f"{name}/{key}", value, step)
        return {"step": step, "weight_magnitude": magnitude, "groups": groups}

    def _representation(self, slot: Slot, h: Tensor) -> dict[str, float]:
        """Of the sampled features `[samples, columns]` that one reader saw."""
        columns = by_unit(torch.arange(h.shape[1], device=h.device), slot)
        dormant = dormant_units(h[:, columns.T], self._tau)
        return {
            "dormant": dormant.float().mean().item(),
            "effective_rank": effective_rank(h).item(),
            "stable_rank": stable_rank(h).item(),
        }


def plot(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws what a `Monitor` has measured: ranks, dormant units and weights over time, and the last histograms.

    Args:
        history: `Monitor.history`, or the same read back from a file.

    Returns:
        A figure of matplotlib, which has to be installed; `.savefig(path)` writes it.

    Raises:
        ValueError: `history` is empty.
    """
    if not history:
        raise ValueError("plot: the history is empty")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for panel, (key, title) in zip(panels, _SCALARS.items(), strict=False):
        if key in history[0]:
            panel.plot([m["step"] for m in history], [m[key] for m in history], color="black")
        for name in history[-1]["groups"]:
            points = [(m["step"], m["groups"][name][key]) for m in history if key in m["groups"].get(name, {})]
            if points:
                panel.plot(*zip(*points, strict=True), label=name)
        panel.set(title=title, xlabel="step")
        panel.set_ylim(bottom=0)
    for panel, key in zip(list(figure.axes)[len(_SCALARS) :], ("age", "utility"), strict=True):
        for name, group in history[-1]["groups"].items():
            panel.stairs(group[key]["counts"], group[key]["edges"], label=name)
        panel.set(title=f"{key} of units at step {history[-1]['step']}", xlabel=key, ylabel="units")
    if len(history[-1]["groups"]) <= 12:
        figure.axes[-1].legend(title="group")
    return figure


def _histogram(values: Tensor) -> dict[str, list[float]]:
    values = values.float()
    low, high = values.min().item(), values.max().item()
    # equal values fall into one bin of width 1
    high = high if high > low else low + 1
    counts = torch.histc(values, _BINS, low, high)
    return {"counts": counts.tolist(), "edges": torch.linspace(low, high, _BINS + 1).tolist()}


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
