"""The A/B check of a unit group: does what it says of rows and columns hold when the model runs?"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ...groups.spec import ResolvedGroup
from ...tensors.parts import is_dtensor
from ..running.forwards import Forward, held_by
from ..running.holding import tensors_in
from ..running.memory import storage_key
from ..running.restoring import reseed, restored, untouched
from ..running.snapshot import Snapshot
from .members import Made, columns_of, made_by, observe
from .seen import Seen, dense
from .watching import Uncoupled, Watch

# rounds of forwards at least, also for a model that draws random numbers; a group of N units has as many as N has
# binary digits
_ROUNDS, _DRAWN = 4, 16
# rounds more for units that could not be seen in the first ones
_MORE = 8
# so many random numbers, a prime, are repeated where more are needed
_NOISE = 65_521
# how the inputs of a run are made other ones; what a model does not run on is tried the next way
_WAYS = ("all", "floats", "order")


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


def check(model: nn.Module, group: ResolvedGroup, runs: Sequence[Forward], ignored: tuple[str, ...] = ()) -> Verdict:
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

        made = list(made_by(self.group, units))

        def run(sign: int, read: bool, way: str | None) -> Seen:
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

    def _fill_rows(self, made: Sequence[Made], number: int, sign: int) -> None:
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
        return (columns_of(member, units) for member in self.group.outgoing)

    def _run(self, units: Tensor, seed: int, way: str | None) -> Seen:
        """All runs, from one random state."""
        seen = Seen([[] for _ in self.group.outgoing])
        vary = None if way is None else functools.partial(self._other, way, seed)
        watch = Watch(self.model, vary)
        for run, snapshot in self.runs:
            before = _seed(seed)
            # inside a context of the user it would keep weights that have changed
            torch.clear_autocast_cache()
            # first, so that what the hooks write is none of the model's
            with untouched(self.model, snapshot=snapshot):
                try:
                    with self._hooked(watch, units, seen), watch, Uncoupled(), torch.enable_grad():
                        output = run(self.model)
                    self.drawn |= _random_states() != before
                    seen.outputs += self._outputs(output, watch, snapshot)
                finally:
                    watch.restore()
        seen.eps, seen.inputs, seen.varied = watch.eps, watch.inputs, watch.varied
        return seen

    @contextlib.contextmanager
    def _hooked(self, watch: Watch, units: Tensor, seen: Seen) -> Iterator[None]:
        """Hooks that tell `watch` where the run is, and keep what the columns read."""
        handles = []
        for module in self.model.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(watch.enter, prepend=True, with_kwargs=True))
                handles.append(module.register_forward_hook(watch.leave, always_call=True))
        for member, features in zip(self.group.outgoing, seen.features, strict=True):
            hook = functools.partial(observe, member, units, features)
            handles.append(member.module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _outputs(self, output: Any, watch: Watch, snapshot: Snapshot) -> list[Tensor]:
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
            return [dense(t) for path, t in found if not path.startswith(self.ignored or ("\0",))]

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
