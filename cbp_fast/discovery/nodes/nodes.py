"""What operations make of sets of units: unions, products, mixes; and what reaches which unit through them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .ids import BASE, DATA, ONE, kinds_of, narrow, same_along, scramble, sorted_pairs
from .table import QUICK, Table

# elements up to which units are joined with others of their layer, pair by pair
_WIDE = 4096


class Mix(NamedTuple):
    """Ids of which a reduction made one that is none of theirs."""

    members: Tensor  # int64 [n]
    why: str


class Nodes(Table):
    """Nodes, and what operations make of them.

    Attributes:
        mixes: ids that each mix is made of, and the operation that mixed them.
        why: the operation whose result is being told, which mixes units.
    """

    def __init__(self) -> None:
        super().__init__()
        self.why = ""
        self.mixes: list[Mix] = []
        self._mix_of: dict[int, int] = {}

    def join(self, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        """The union of two ids, element by element."""
        if a is None or b is None:
            return b if a is None else a
        (a, b), shape = self.uncrossed((a, b))
        if a.numel() == 1:
            one, other = sorted((int(a), int(b)))
            if one == other or not one:
                return (a if int(a) else b).expand(shape)
        return self.joined(a, b).expand(shape)

    def uncrossed(self, several: Sequence[Tensor]) -> tuple[list[Tensor], torch.Size]:
        """As :func:`narrow`; and of two of them, one varies only along axes along which the other does.

        Where each varies along axes of its own, every pair of ids would be a set, and a reader along one axis would
        take all units of the other one. So one of the two is merged along its own axes: data before mixes before
        units, and what has fewer ids there. Not units with others of their own layer, of which few are one then.
        """
        wide, shape = narrow(*several)
        axes = [{i for i, n in enumerate(ids.shape) if n > 1 and not same_along(ids, i)} for ids in wide]
        for one, other in itertools.combinations(range(len(wide)), 2):
            own = {one: axes[one] - axes[other], other: axes[other] - axes[one]}
            if all(own.values()) and not (wide[0].numel() <= _WIDE and self._meeting(wide[one], wide[other])):
                sizes = {k: math.prod(wide[k].shape[i] for i in own[k]) for k in own}
                kinds = {k: self.bare[kinds_of(wide[k])] for k in own}
                ranks = {k: (bool(kinds[k].any()), bool(self.is_unit(kinds[k]).any()), sizes[k]) for k in own}
                k = min(own, key=lambda k: ranks[k])
                wide[k] = self.along(wide[k], own[k])
                axes[k] -= own[k]
        return narrow(*wide)[0], shape

    def _meeting(self, a: Tensor, b: Tensor) -> bool:
        """Whether there are units of one source in both."""
        leaves = [self.leaves(kinds_of(ids))[1] for ids in (a, b)]
        sources = [torch.unique(self.origin[units[self.is_unit(units)]]) for units in leaves]
        return bool(torch.isin(*sources).any())

    def union(self, several: Sequence[Tensor]) -> Tensor:
        """The union of ids, element by element, at least one."""
        joined, *others = several
        for ids in others:
            joined = cast(Tensor, self.join(joined, ids))
        return joined

    def with_one(self, ids: Tensor) -> Tensor:
        """Ids that are not zero where their units are; those that are not anyway stay as they are."""
        (ids,), shape = narrow(ids)
        clean = self.clean(ids)
        if clean.any():
            ids = ids.clone()
            ids[clean] = cast(Tensor, self.join(ids[clean], torch.tensor(ONE, device="cpu")))
        return ids.expand(shape)

    def with_data(self, ids: Tensor) -> Tensor:
        """Ids joined with data, where they are any."""
        return torch.where(ids > 0, cast(Tensor, self.join(ids, torch.tensor(DATA, device="cpu"))), ids)

    def stripped(self, ids: Tensor, where: Tensor) -> Tensor:
        """Ids, of which nothing but units and mixes is left in some places."""
        return torch.where(where, self.bare[ids], ids)

    def product(self, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        """The union of two factors; what is zero where its units are leaves nothing of the other but its units."""
        if a is None or b is None:
            return b if a is None else a
        (a, b), shape = narrow(a, b)
        joined = self.join(self.stripped(a, self.clean(b)), self.stripped(b, self.clean(a)))
        return cast(Tensor, joined).expand(shape)

    def merge(self, ids: Tensor) -> Tensor:
        """The union over the last axis: [..., K] -> [...]. Units of one source are mixed."""
        (ids,), shape = narrow(ids)
        if not ids.numel():
            return ids.new_zeros(()).expand(shape[:-1])
        high = ids.amax(-1)
        if ids.shape[-1] > 1:
            low = ids.amin(-1)
            padded = (low == 0) & (high > 0)
            mixed = low != high
            if padded.any():
                mixed &= torch.where(ids == 0, high[..., None], ids).amin(-1) != high
            if mixed.any():
                rows = ids[mixed]
                keys, where = torch.unique(scramble(rows).sum(-1), return_inverse=True)
                first = torch.full_like(keys, len(rows)).scatter_reduce_(
                    0, where, torch.arange(len(rows), device="cpu"), "amin"
                )
                high[mixed] = self._union(_distinct(rows[first]))[where]
            if padded.any():
                # some of what is summed is a constant
                high[padded] = self.with_one(high[padded])
        return high.expand(shape[:-1])

    def along(self, ids: Tensor, axes: Collection[int]) -> Tensor:
        """The union along some axes, at each place of them; one number has none."""
        if not ids.dim():
            return ids
        (thin,), shape = narrow(ids)
        kept = [axis for axis in range(ids.dim()) if axis not in axes]
        merged = self.merge(thin.permute(kept + list(axes)).flatten(len(kept)))
        return merged.reshape([1 if i in axes else n for i, n in enumerate(thin.shape)]).expand(shape)

    def _union(self, rows: Tensor) -> Tensor:
        """One id for each row of distinct ids, filled up by zeros."""
        n, k = rows.shape
        if n * k <= QUICK:
            mixed = torch.tensor([self._meet(row) for row in rows.tolist()], device="cpu")
        else:
            mixed = self._which_meet(rows)
        out = rows[:, 0].clone()
        apart = ~mixed
        if apart.any():
            out[apart] = self.union(rows[apart].unbind(-1))
        if mixed.any():
            out[mixed] = self._mixed(rows[mixed])
        return out

    def _meet(self, ids: Sequence[int]) -> bool:
        """Whether some of these ids have more units of a source together than one of them alone."""
        together: dict[int, set[int]] = {}
        most: dict[int, int] = {}
        for node in ids:
            small = self.leaves_of(node) if node else ()
            leaves = self.leaves(torch.tensor([node], device="cpu"))[1].tolist() if small is None else small
            own: dict[int, set[int]] = {}
            for leaf in leaves:
                own.setdefault(self.about[leaf].source, set()).add(leaf)
            for source, units in own.items():
                if source:
                    together.setdefault(source, set()).update(units)
                    most[source] = max(most.get(source, 0), len(units))
        return any(len(units) > most[source] for source, units in together.items())

    def _which_meet(self, rows: Tensor) -> Tensor:
        """Of which rows of distinct ids, filled up by zeros, that is true: bool [n]."""
        n, k = rows.shape
        at = torch.arange(n * k, device="cpu")[rows.flatten() > 0]
        entry, leaf = self.leaves(rows.flatten()[at])
        entry = at[entry]
        source = torch.where(self.is_unit(leaf), self.origin[leaf], 0)
        # how many units of each source are in a row, and at most in one of its ids
        units = source > 0
        row_, leaf_ = sorted_pairs(entry[units] // k, leaf[units])
        everyone, index = torch.unique(row_ * BASE + self.origin[leaf_], return_inverse=True)
        total = torch.bincount(index, minlength=len(everyone))
        each, counts = torch.unique(entry[units] * BASE + source[units], return_counts=True)
        place = torch.searchsorted(everyone, (each // BASE // k) * BASE + each % BASE)
        most = torch.zeros_like(total).scatter_reduce_(0, place, counts, "amax")
        mixed = torch.zeros(n, dtype=torch.bool, device="cpu")
        mixed[everyone[total > most] // BASE] = True
        return mixed

    def mixed(self, kinds: Tensor) -> Tensor:
        """One id for values that are made of all of some different ids [n], whatever these are; int64 []."""
        if not self.bare[kinds].any():
            return cast(Tensor, self.join(self.merge(kinds), torch.tensor(DATA, device="cpu")))
        return self._mixed(kinds[None]).reshape(())

    def _mixed(self, rows: Tensor) -> Tensor:
        """The mix of each row of ids, filled up by zeros."""
        keys = scramble(rows).sum(-1).tolist()
        fresh = {key: i for i, key in enumerate(keys) if key not in self._mix_of}
        if fresh:
            new = self.leaf(None, len(fresh))
            self.mix[new] = torch.arange(len(self.mixes) + 1, len(self.mixes) + 1 + len(fresh), device="cpu")
            self.origin[new] = -self.mix[new]
            self.mixes += [Mix(rows[i][rows[i] > 0], self.why) for i in fresh.values()]
            # a mix is data for whoever gates or shares it
            both = self.with_data(torch.arange(new.start, new.stop, device="cpu"))
            self._mix_of.update(zip(fresh, both.tolist(), strict=True))
        return torch.tensor([self._mix_of[key] for key in keys], device="cpu")

    def holds_data(self, ids: Tensor) -> bool:
        """Whether there is anything in some ids but parameters, constants and random numbers."""
        kinds = kinds_of(ids)
        return bool(self.bare[kinds].any()) or bool((self.leaves(kinds)[1] == DATA).any())

    def spread(self, causes: Sequence[tuple[Tensor, int]], cause_of: Callable[[int], int]) -> Tensor:
        """The least cause that reaches each node, int64 [size]; above `BASE` where none does.

        Args:
            causes: ids and the number of a cause, which reaches all of their leaves.
            cause_of: the number of the cause that a mix, given by its number, is for its units, if any reaches it.
        """
        reached = torch.full((self.size,), BASE + 1, device="cpu")
        for ids, cause in causes:
            _, leaf = self.leaves(torch.unique(ids))
            reached[leaf] = reached[leaf].clamp(max=cause)
        # what a mix is made of was there before it
        nodes = self.mix[: self.size].nonzero()[:, 0].flip(0)
        for some in nodes.split(QUICK) if len(nodes) else ():
            numbers = (self.mix[some] - 1).tolist()
            members = [self.mixes[number].members for number in numbers]
            mix = torch.repeat_interleave(torch.tensor([len(m) for m in members], device="cpu"))
            entry, leaf = self.leaves(torch.cat(members))
            mix, leaf = sorted_pairs(mix[entry], leaf)
            own = leaf.split(torch.bincount(mix, minlength=len(members)).tolist())
            for node, number, leaves in zip(some.tolist(), numbers, own, strict=True):
                if reached[node] <= BASE:
                    reached[leaves] = reached[leaves].clamp(max=cause_of(number))
        return reached


def _distinct(rows: Tensor) -> Tensor:
    """Rows with every id once, the largest first, then zeros."""
    rows = rows.sort(-1, descending=True).values
    again = torch.zeros_like(rows, dtype=torch.bool)
    again[:, 1:] = rows[:, 1:] == rows[:, :-1]
    rows = rows.masked_fill(again, 0).sort(-1, descending=True).values
    return rows[:, : int((rows > 0).sum(-1).max())]
