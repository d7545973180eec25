"""The A/B check of a unit group: does what it says of rows and columns hold when the model runs?"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ..groups.layers import out_axis, read_width, spatial_axes
from ..groups.resolving import resolve, strings
from ..groups.spec import Member, ResolvedGroup, UnitGroup
from ..tensors.parts import is_dtensor
from .running import (
    Forward,
    Preserving,
    forwards,
    held_by,
    leaves_of,
    reseed,
    restored,
    storage_key,
    untouched,
    unwrapped,
)
from .snapshot import Snapshot, tensors_in

# rounds of forwards at least, also for a model that draws random numbers; a group of N units has as many as N has
# binary digits
_ROUNDS, _DRAWN = 4, 16
# rounds more for units that could not be seen in the first ones
_MORE = 8
# so many random numbers, a prime, are repeated where more are needed
_NOISE = 65_521
# how the inputs of a run are made other ones; what a model does not run on is tried the next way
_WAYS = ("all", "floats", "order")


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
    verdict = look(model, resolve(model, group), forwards(example_inputs), ignored)
    if verdict.unshown:
        raise ValueError(f"unit group '{group.name}': {verdict.unshown}, so that the check shows nothing")
    if verdict.failure:
        raise ValueError(f"unit group '{group.name}' does not pass the check: {verdict.failure}")


_Made = tuple[Tensor, Tensor, float | None, float]


@dataclass(frozen=True)
class Verdict:
    """What a check said.

    Attributes:
        failure: why the group is wrong.
        unshown: why it may still be wrong, where nothing was seen of its units.
    """

    failure: str = ""
    unshown: str = ""


def check_memory(model: nn.Module) -> None:
    """Checks that parameters and buffers have real memory, and that this process has all of them.

    Raises:
        ValueError: if not; the message names the first.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_dtensor(tensor):
            raise ValueError(f"the check changes whole parameters, and this process holds a part of '{name}'")
        if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
            raise ValueError(f"the check runs the model on numbers, and '{name}' (meta, or fake) has none")


def look(model: nn.Module, group: ResolvedGroup, runs: Sequence[Forward], ignored: tuple[str, ...] = ()) -> Verdict:
    """Checks a resolved group; `ignored` are beginnings of the paths of outputs that units may reach."""
    tensors = [*model.parameters(), *model.buffers()]
    saved = [t.detach().clone() for t in tensors]
    compiled = any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules())
    with contextlib.ExitStack() as stack:
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(restored(model, saved))
        snapshots = [Snapshot([("", model), *(("the inputs", i) for i in held_by(run))]) for run in runs]
        if compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        return _Check(model, group, runs, snapshots, ignored, dict(zip(tensors, saved, strict=True))).verdict()


class _Check:
    """The check of one group.

    Attributes:
        ran: whether the model ran through a round.
        shown: whether rows of units moved the output anywhere.
        varied: whether the model ran on other inputs, or has none.
        drawn: whether it draws random numbers.
        steady: whether it does the same again from one random state.
        failure: what was found wrong.
        error: what the model raised last.
    """

    def __init__(
        self,
        model: nn.Module,
        group: ResolvedGroup,
        runs: Sequence[Forward],
        snapshots: Sequence[Snapshot],
        ignored: tuple[str, ...],
        saved: dict[Tensor, Tensor],
    ) -> None:
        self.model, self.group, self.ignored, self.saved = model, group, ignored, saved
        self.runs = list(zip(runs, snapshots, strict=True))
        self.generator = torch.Generator("cpu").manual_seed(0)
        self.random = torch.randn(_NOISE, generator=self.generator, device="cpu")
        self.modules = [m.module for m in (*group.incoming, *group.outgoing, *group.norms)]
        self.world = False, False
        self.ran = self.shown = self.varied = self.drawn = False
        self.steady = True
        self.failure = ""
        self.error: Exception | None = None

    def verdict(self) -> Verdict:
        """Rounds until something is wrong, or every subset of units was seen to move the output, or for long enough."""
        todo, more, number = self._subsets(_ROUNDS), _MORE, 0
        while todo and not (self.failure and self.shown):
            units = todo.pop(0)
            if not self._round(units, number) and more:
                todo.append(units)
                more -= 1
            number += 1
            if number == 1 and self.drawn:
                # other paths, and other units that are not dropped
                todo += self._subsets(_DRAWN - _ROUNDS)
        unshown = ""
        if not self.ran and not self.shown:
            unshown = "the model does not run, at least not with other weights"
        elif not self.shown:
            unshown = "the output does not depend on its units"
        elif not self.varied:
            unshown = "the model ran on no inputs but the given ones"
        elif not self.steady:
            unshown = "the model gives another result each time, from one random state"
        if unshown and self.error is not None:
            when = "with other weights or inputs it raised " if self.ran else ""
            unshown += f" ({when}{type(self.error).__name__}: {self.error})"
        return Verdict(self.failure, unshown)

    def _subsets(self, least: int) -> list[Tensor]:
        """Units with a digit in common, of their binary numbers: each one is in a subset that lacks any other one."""
        n = self.group.num_units
        subsets: list[Tensor] = []
        while len(subsets) < least:
            number = torch.randperm(n, generator=self.generator, device="cpu") + 1
            subsets += [(number >> digit & 1).nonzero()[:, 0] for digit in range(n.bit_length())]
        return subsets[: max(least, n.bit_length())]

    def _round(self, units: Tensor, number: int) -> bool:
        """Looks at some units once; returns whether they were seen to move the output."""
        # a bias may decide that a branch is never taken
        negated = number > 0 and bool(torch.randint(2, (), generator=self.generator, device="cpu"))
        for noisy in (True, False):
            self._set_weights(noisy, noisy and negated)
            kept = [(t, t.detach().clone()) for module in self.modules for t in _tensors(module)]
            for way in (*_WAYS, None):
                try:
                    seen = self._compare(units, number, way)
                    self.ran = True
                    return seen
                except Exception as error:  # the user's code may raise anything
                    self.error = error
                finally:
                    for tensor, value in kept:
                        tensor.detach().copy_(value)
        return False

    def _compare(self, units: Tensor, number: int, way: str | None) -> bool:
        """One round on inputs varied in a `way`, or on the given ones alone (None)."""
        columns = [(place, tensor[place].clone(), tensor) for tensor, place in self._columns(units)]

        made = list(_made(self.group, units))

        def run(sign: int, read: bool, way: str | None) -> _Seen:
            for place, value, tensor in columns:
                tensor[place] = value if read else 0
            self._fill_rows(made, number, sign)
            return self._run(units, number, way)

        given = run(0, False, None)
        other = given if way is None else run(0, False, way)
        self.varied |= way is not None and (other.varied or not given.inputs)
        if given.sees_other_than(other):
            again = run(0, False, None), run(0, False, way)
            if given.sees_other_than(again[0]) or other.sees_other_than(again[1]):
                self.steady = False
            else:
                self.failure = "the columns of its outgoing layers read something else than its units"
        if number % 2:
            way, other = None, given
        for sign in (-1, 1):
            alive = run(sign, False, way)
            gap = other.gap(alive)
            if not gap or not (other.finite and alive.finite):
                continue
            # a model that draws numbers that nobody can seed is seldom as near to itself three times
            if all(gap > 8 * max(other.gap(run(0, False, way)), alive.gap(run(sign, False, way))) for _ in range(3)):
                self.shown = True
                self.failure = (
                    "its units reach the output by another way than the columns of its outgoing layers (as by a norm "
                    "over features that is written by hand)"
                )
                return True
            self.steady = False
        read = run(1, True, way)
        self.shown = self.shown or read.gap(run(0, True, way)) > 0
        return read.gap(alive) > 0

    def _set_weights(self, noisy: bool, negated: bool) -> None:
        """All parameters as they were, or slightly changed, so that no zero hides anything."""
        was_noisy, was_negated = self.world
        self.world = noisy, negated
        with torch.no_grad():
            for i, p in enumerate(self.model.parameters()):
                if not p.numel() or not (p.is_floating_point() or p.is_complex()):
                    continue
                scale = 0.1 * self.saved[p].abs().mean() + 0.01
                if was_noisy != noisy:
                    p.copy_(self.saved[p])
                    if noisy and scale.isfinite():
                        p.add_(self._noise(p, i) * scale)
                if p.dim() == 1 and scale.isfinite() and negated != (was_negated and was_noisy == noisy):
                    p.neg_()

    def _noise(self, like: Tensor, salt: int) -> Tensor:
        """Normal numbers of a tensor's shape, the same for the same `salt`."""
        first = salt * 7919 % _NOISE
        times = -(-(like.numel() + first) // _NOISE)
        flat = self.random.repeat(times)[first : first + like.numel()]
        return flat.view(like.shape).to(like.device, like.dtype)

    def _fill_rows(self, made: Sequence[_Made], number: int, sign: int) -> None:
        """Rows, biases and norm entries of units: defaults (sign 0), or random numbers, times the sign.

        Whatever the input, a unit is positive before its activation function with one of the signs 1 and -1.
        """
        for salt, (tensor, index, default, scale) in enumerate(made):
            place = tensor[index]
            if not sign:
                place = torch.full_like(place, default or 0.0)
            elif default == 1.0:
                place = self._noise(place, 31 * number + salt).abs().clamp(0.2, 2)
            else:
                place = self._noise(place, 31 * number + salt) * (scale * sign)
            tensor[index] = place

    def _columns(self, units: Tensor) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        return (_columns(member, units) for member in self.group.outgoing)

    def _run(self, units: Tensor, seed: int, way: str | None) -> _Seen:
        """All runs, from one random state."""
        seen = _Seen([[] for _ in self.group.outgoing])
        vary = None if way is None else functools.partial(self._other, way, seed)
        watch = _Watch(self.model, vary)
        for run, snapshot in self.runs:
            before = _seed(seed)
            # inside a context of the user it would keep weights that have changed
            torch.clear_autocast_cache()
            # first, so that what the hooks write is none of the model's
            with untouched(self.model, snapshot=snapshot):
                try:
                    with self._hooked(watch, units, seen), watch, _Uncoupled(), torch.enable_grad():
                        output = run(self.model)
                    self.drawn |= _random_states() != before
                    seen.outputs += self._outputs(output, watch, snapshot)
                finally:
                    watch.restore()
        seen.eps, seen.inputs, seen.varied = watch.eps, watch.inputs, watch.varied
        return seen

    @contextlib.contextmanager
    def _hooked(self, watch: _Watch, units: Tensor, seen: _Seen) -> Iterator[None]:
        """Hooks that tell `watch` where the run is, and keep what the columns read."""
        handles = []
        for module in self.model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(watch.enter, prepend=True, with_kwargs=True))
                handles.append(module.register_forward_hook(watch.leave, always_call=True))
        for member, features in zip(self.group.outgoing, seen.features, strict=True):
            observe = functools.partial(_observe, member, units, features)
            handles.append(member.module.register_forward_pre_hook(observe, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _outputs(self, output: Any, watch: _Watch, snapshot: Snapshot) -> list[Tensor]:
        """What a run returned, and what it left in attributes of the model."""
        with _disable_current_modes():
            found = [(path, t) for path, t in tensors_in(output)]
            found += [("", torch.tensor(n)) for n in tree_leaves(output) if isinstance(n, (int, float, complex))]
            numpy = sys.modules.get("numpy")
            if numpy:
                arrays = (a for a in tree_leaves(output) if isinstance(a, (numpy.ndarray, numpy.generic)))
                found += [("", torch.as_tensor(a)) for a in arrays if a.dtype.kind in "biufc"]
            gradients = {id(t.grad) for t in snapshot.tensors() if t.is_leaf}
            for path, value in snapshot.changed():
                if id(value) not in gradients:
                    found += [(at, t) for at, t in tensors_in(value, path) if storage_key(t) in watch.made]
            return [_dense(t) for path, t in found if not path.startswith(self.ignored or ("\0",))]

    def _other(self, way: str, number: int, x: Tensor) -> Tensor:
        """Another input like x."""
        if not x.dim() or not x.numel() or x.is_nested or x.layout != torch.strided:
            return x
        if way == "order":
            return x.roll(1, 0)
        if x.is_floating_point() or x.is_complex():
            # gradients go back to the given one
            finite = x.detach().isfinite()
            scale = torch.where(finite, x.detach(), 0).abs().mean()
            noise = self._noise(x, number + 1) * torch.where(scale > 0, scale, 1.0)
            return torch.where(finite, (x * (1.5, -1.0, 0.6)[number % 3] + noise).to(x.dtype), x)
        if way == "floats":
            return x
        i = torch.arange(x.numel(), device=x.device)
        return x.flatten()[(i * i + number + 1) % len(i)].view(x.shape)


class _Seen:
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

    def gap(self, other: _Seen) -> float:
        """How far outputs differ beyond rounding of the last place; 0 if they do not."""
        if len(self.outputs) != len(other.outputs):
            return float("inf")
        return max(map(_gap, self.outputs, other.outputs), default=0.0)

    def sees_other_than(self, other: _Seen) -> bool:
        """Whether readers see something else, beyond rounding in the coarsest precision."""
        tolerance = 16 * max(self.eps, other.eps)
        return any(_unlike(*calls, tolerance) for calls in zip(self.features, other.features, strict=True))


class _Watch(Preserving):
    """Varies what comes into the model from outside, and not what its own modules pass on.

    Outside of all modules, where a function runs a model by its parts, every tensor that is made of the model's is its
    own too.

    Attributes:
        own: keys of the storages that the model made, and of its parameters and buffers.
        eps, inputs, varied: as of `_Seen`.
    """

    def __init__(self, model: nn.Module, vary: Any) -> None:
        super().__init__()
        self.vary = vary
        self.own = {storage_key(t) for t in (*model.parameters(), *model.buffers())}
        self.depth = 0
        self.eps = 0.0
        self.inputs = self.varied = False

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self.depth += 1
        if self.depth > 1:
            return None
        with _disable_current_modes():
            return self._others((args, kwargs), {})

    def leave(self, *_: Any) -> None:
        self.depth -= 1

    def _others(self, value: Any, seen: dict[int, Any]) -> Any:
        """The value with other tensors for those from outside, in containers and in copies of objects."""

        def other(leaf: Any) -> Any:
            if id(leaf) in seen:
                return seen[id(leaf)]
            seen[id(leaf)] = leaf
            if isinstance(leaf, Tensor):
                if _key(leaf) not in self.own:
                    self.inputs |= leaf.dim() > 0 and leaf.numel() > 0
                    if self.vary is not None:
                        seen[id(leaf)] = self.vary(leaf)
                        self.varied |= seen[id(leaf)] is not leaf
            elif hasattr(leaf, "__dict__") and not callable(leaf) and not isinstance(leaf, type(sys)):
                state = self._others(vars(leaf), seen)
                if any(state[key] is not child for key, child in vars(leaf).items()):
                    seen[id(leaf)] = copy.copy(leaf)
                    vars(seen[id(leaf)]).update(state)
            return seen[id(leaf)]

        return tree_map(other, value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        keys = {_key(t) for t in leaves_of(args, kwargs) if isinstance(t, Tensor)}
        own = self.depth > 0 or not keys.isdisjoint(self.own)
        if own and not self.depth and isinstance(func, torch._ops.OpOverload) and not func._schema.is_mutable:
            # data that joins what the model made; indices say where, and stay
            with _disable_current_modes():
                args, kwargs = tree_map(self._joining, (args, kwargs))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if getattr(func, "_overloadpacket", func).__name__ in _NORM_OPS:
            with _disable_current_modes():
                names = (a.name for a in func._schema.arguments)
                channels = func is torch.ops.aten.native_group_norm.default
                out[0].copy_(_scaled({**dict(zip(names, args, strict=False)), **kwargs}, channels))
        for t in leaves_of(out):
            if isinstance(t, Tensor):
                if t.is_floating_point():
                    self.eps = max(self.eps, torch.finfo(t.dtype).eps)
                if own:
                    self.own.add(_key(t))
                elif _key(t) not in keys:
                    self.own.discard(_key(t))
        return out

    def _joining(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or _key(value) in self.made:
            return value
        return self._others(value, {})


def _key(tensor: Tensor) -> int:
    try:
        return storage_key(tensor)
    except (RuntimeError, NotImplementedError):  # inside vmap
        return -id(tensor)


_NORMS: dict[Any, tuple[str, ...]] = dict.fromkeys(
    (F.layer_norm, F.group_norm, torch.layer_norm, torch.group_norm), ("input", "", "weight", "bias")
)
_NORMS |= dict.fromkeys((F.rms_norm, torch.rms_norm), ("input", "", "weight", "eps"))
# what those become, where they are called past Python's functions
_NORM_OPS = ("native_layer_norm", "native_group_norm", "_fused_rms_norm")


class _Uncoupled(TorchFunctionMode):
    """Norms over features become their scale and shift, in the memory layout and dtype of the norm's own result."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _NORMS:
            return func(*args, **kwargs)
        with torch.no_grad():
            result = func(*args, **kwargs)
        # the result, and not the input, may be written to
        given = {**dict(zip(_NORMS[func], args, strict=False)), **kwargs}
        return torch.empty_like(result).copy_(_scaled(given, func in (F.group_norm, torch.group_norm)))


def _scaled(given: dict[str, Any], channels: bool) -> Tensor:
    """The input of a norm, scaled and shifted along its channels or its last axes."""
    x = given["input"]
    weight, bias = given.get("weight"), given.get("bias")
    if channels:
        weight, bias = (t if t is None else t.reshape(-1, *(1,) * (x.dim() - 2)) for t in (weight, bias))
    x = x if weight is None else x * weight
    return cast(Tensor, x if bias is None else x + bias)


def _seed(seed: int) -> Any:
    """Sets all global random states, and returns them."""
    reseed(seed)
    return _random_states()


def _random_states() -> Any:
    numpy = sys.modules.get("numpy")
    of_numpy = numpy and numpy.random.get_state()
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]
    return random.getstate(), of_numpy and (of_numpy[1].tolist(), *of_numpy[2:]), [s.tolist() for s in states]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _indices(member: Member, units: Tensor) -> Tensor:
    start, unit_stride, per_unit, position_stride = member.block
    return (start + units[:, None] * unit_stride + torch.arange(per_unit, device="cpu") * position_stride).flatten()


def _made(group: ResolvedGroup, units: Tensor) -> Iterator[_Made]:
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


def _columns(member: Member, units: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The weight of a reader with its features along the first axes, and their indices there."""
    weight, groups = member.module.get_parameter("weight").detach(), getattr(member.module, "groups", 1)
    index = _indices(member, units).to(weight.device)
    if out_axis(member.module):
        return weight, (index,)
    each = read_width(member.module) // groups
    blocks = weight.view(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return blocks, (index // each, index % each)


def _observe(member: Member, units: Tensor, features: list[Tensor], module: nn.Module, args: Any, kwargs: Any) -> None:
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


def _dense(tensor: Tensor) -> Tensor:
    """A copy of all numbers in a tensor of any kind."""
    t = tensor.detach()
    if t.is_nested:
        t = torch.cat([part.flatten() for part in t.unbind()])
    elif t.layout != torch.strided:
        t = t.to_dense()
    if t.is_quantized:
        t = t.dequantize()
    return torch.view_as_real(t.resolve_conj()).clone() if t.is_complex() else t.clone()


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
