"""Sets of the units that activations are made of: the table that :mod:`.provenance` writes and reads.

A node is a set of leaves. A leaf is one unit, a parameter, a mix of many units (a sum over features), DATA that no unit
makes, RANDOM numbers, or ONE, which says that the value is not zero where its units are. A value of units and mixes
alone is zero where its units are, and so is its product with anything: that a unit gates data, so that the column is
the unit's alone, is told from this.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

DATA, ONE, RANDOM = 1, 2, 3
BASE = 2**31  # ids are below it, so that a pair fits an int64
# leaves up to which a set of them is kept by itself, so that equal sets are one node
_FEW = 48
# of a hash: odd, so that no two ids become one
_FACTORS = (-7046029254386353131, -4658895280553007687)
# pairs, or ids in rows, up to which Python is quicker than some dozen operations on tensors
QUICK = 64
# elements up to which units are joined with others of their layer, pair by pair
_WIDE = 4096


def scramble(ids: Tensor) -> Tensor:
    """A hash of int64 `ids`, to be summed over a set; 0 stays 0."""
    ids = ids * _FACTORS[0]
    ids = (ids ^ (ids >> 29)) * _FACTORS[1]
    return ids ^ (ids >> 32)


def _wrapped(number: int) -> int:
    """As an int64 wraps."""
    return ((number + 2**63) & (2**64 - 1)) - 2**63


class _Leaf(NamedTuple):
    """What Python knows of a leaf."""

    hash: int  # as of `scramble`
    bare: bool  # whether it is a unit or a mix
    source: int  # of a unit, else 0


class _Leaves(dict[int, _Leaf]):
    """The leaves that Python was asked for; all are in `runs` of equal ones, which begin with the ids `firsts`."""

    def __init__(self) -> None:
        super().__init__()
        self.firsts: list[int] = []
        self.runs: list[tuple[bool, int]] = []

    def __missing__(self, leaf: int) -> _Leaf:
        number = _wrapped(leaf * _FACTORS[0])
        number = _wrapped((number ^ (number >> 29)) * _FACTORS[1])
        self[leaf] = about = _Leaf(number ^ (number >> 32), *self.runs[bisect.bisect(self.firsts, leaf) - 1])
        return about


def narrow(*ids: Tensor) -> tuple[list[Tensor], torch.Size]:
    """Ids broadcast together, with one entry along every axis where none varies, and the shape to expand to."""
    shape = ids[0].shape
    wide: Sequence[Tensor] = ids
    if any(t.shape != shape for t in ids):
        wide = torch.broadcast_tensors(*ids)
        shape = wide[0].shape
    for axis, size in enumerate(shape):
        if size > 1 and all(same_along(t, axis) for t in wide):
            wide = [t.narrow(axis, 0, 1) for t in wide]
    return list(wide), shape


def same_along(ids: Tensor, axis: int) -> bool:
    """Whether ids are known not to vary along an axis; few of them are not looked at."""
    if ids.stride(axis) == 0:
        return True
    if ids.numel() <= 1024:
        return False
    first = ids.narrow(axis, 0, 1)
    # the second place tells most of those that vary
    return torch.equal(first, ids.narrow(axis, 1, 1)) and torch.equal(first.expand_as(ids), ids)


def kinds_of(ids: Tensor) -> Tensor:
    """The different ids, int64 [n]."""
    (ids,), _ = narrow(ids)
    return torch.unique(ids)


class Source(NamedTuple):
    """Consecutive ids: the units that a weight makes along an axis, or (axis None) the one id of a parameter."""

    parameter: str
    axis: int | None
    first: int
    size: int


class Mix(NamedTuple):
    """Ids of which a reduction made one that is none of theirs."""

    members: Tensor  # int64 [n]
    why: str


def _sorted_pairs(row: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    pairs = torch.unique(row * BASE + leaf)
    return pairs // BASE, pairs % BASE


class Nodes:
    """The table of nodes; equal sets of few leaves are one node.

    Attributes:
        sources: what the ids of units and of parameters stand for.
        mixes: ids that each mix is made of, and the operation that mixed them.
        why: the operation whose result is being told, which mixes units.
    """

    def __init__(self) -> None:
        # left and right child of a large set, bare, origin, number of the mix and where the leaves begin
        self._table = torch.zeros(6, 1024, dtype=torch.int64, device="cpu")
        self._leaves = torch.zeros(4096, dtype=torch.int64, device="cpu")
        self._used = 0
        self.size = 0
        self.why = ""
        self.sources: list[Source] = []
        self.mixes: list[Mix] = []
        self._source_of: dict[tuple[str, int | None], int] = {}
        self._joins: dict[int, int] = {}
        self._sets: dict[int, int] = {}
        self._mix_of: dict[int, int] = {}
        # of nodes that Python was asked for: the leaves of a small set, or None; and what a leaf is
        self._small: dict[int, tuple[int, ...] | None] = {}
        self._about = _Leaves()
        self._add(1)
        for _ in range(RANDOM):
            self._leaf(Source("", None, self.size, 1))

    left = property(lambda self: self._table[0], doc="First child of a large set, else 0; int64.")
    right = property(lambda self: self._table[1], doc="Second child of a large set, int64.")
    bare = property(lambda self: self._table[2], doc="The node of its units and mixes alone, int64.")
    origin = property(lambda self: self._table[3], doc="Number of a unit's source, of a mix -1 - its number, int64.")
    mix = property(lambda self: self._table[4], doc="1 + the number of a mix, else 0; int64.")

    def _add(self, count: int) -> slice:
        new = slice(self.size, self.size + count)
        self.size = new.stop
        if self.size >= self._table.shape[1]:
            self._table = torch.nn.functional.pad(self._table, (0, 2 * self.size - self._table.shape[1]))
        return new

    def _keep(self, nodes: slice, sizes: Tensor, leaves: Tensor) -> None:
        """Write the leaves of new nodes, one node's after the other's."""
        end = self._used + len(leaves)
        if end > len(self._leaves):
            self._leaves = torch.nn.functional.pad(self._leaves, (0, 2 * end - len(self._leaves)))
        self._leaves[self._used : end] = leaves
        self._table[5, nodes.start + 1 : nodes.stop + 1] = self._used + sizes.cumsum(0)
        self._used = end

    def _leaf(self, source: Source | None, count: int = 1) -> slice:
        """New nodes that are leaves: of a source, or `count` mixes."""
        new = self._add(source.size if source else count)
        ids = torch.arange(new.start, new.stop, device="cpu")
        self._keep(new, torch.ones_like(ids), ids)
        self._sets.update(zip(scramble(ids).tolist(), ids.tolist(), strict=True))
        if source:
            self.sources.append(source)
            self.origin[new] = len(self.sources)
        bare = source is None or source.axis is not None
        if bare:
            self.bare[new] = ids
        self._about.firsts.append(new.start)
        self._about.runs.append((bare, len(self.sources) if source and bare else 0))
        return new

    def source(self, parameter: str, axis: int | None, count: int) -> Tensor:
        """The ids of a source, int64 [count]; new ones the first time."""
        key = parameter, axis
        if key not in self._source_of:
            self._source_of[key] = len(self.sources)
            self._leaf(Source(parameter, axis, self.size, count))
        first = self.sources[self._source_of[key]].first
        return torch.arange(first, first + count, device="cpu")

    def is_unit(self, ids: Tensor) -> Tensor:
        """Whether each is one unit."""
        return (self.bare[ids] == ids) & (self.origin[ids] > 0)

    def clean(self, ids: Tensor) -> Tensor:
        """Whether each is zero where its units are."""
        return (self.bare[ids] == ids) & (ids > 0)

    def source_of(self, node: int) -> Source | None:
        """The source of a unit or parameter; None for all other nodes."""
        number = int(self.origin[node])
        return self.sources[number - 1] if number > 0 else None

    def join(self, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        """The union of two ids, element by element."""
        if a is None or b is None:
            return b if a is None else a
        (a, b), shape = self.uncrossed((a, b))
        if a.numel() == 1:
            one, other = sorted((int(a), int(b)))
            if one == other or not one:
                return (a if int(a) else b).expand(shape)
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        new = (low != high) & (low > 0)
        if new.any():
            pairs, where = torch.unique(low[new] * BASE + high[new], return_inverse=True)
            high[new] = self._joined(pairs)[where]
        return high.expand(shape)

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

    def _joined(self, pairs: Tensor) -> Tensor:
        keys = pairs.tolist()
        if len(keys) <= QUICK:
            self._join_few([key for key in keys if key not in self._joins])
        known = [self._joins.get(key, 0) for key in keys]
        ids = torch.tensor(known, device="cpu")
        if not all(known):
            fresh = ids == 0
            left, right = pairs[fresh] // BASE, pairs[fresh] % BASE
            sizes = self._sizes(left) + self._sizes(right)
            few = (self.left[left] == 0) & (self.left[right] == 0) & (sizes <= _FEW)
            made = torch.zeros_like(left)
            if few.any():
                made[few] = self._sets_of(*self._expanded(left[few], right[few]), int(few.sum()))
            many = ~few
            if many.any():
                new = self._add(int(many.sum()))
                made[many] = torch.arange(new.start, new.stop, device="cpu")
                self._keep(new, torch.zeros(new.stop - new.start, dtype=torch.int64, device="cpu"), made[:0])
                self.left[new], self.right[new] = left[many], right[many]
                self.bare[new] = made[many]
                less = many & ((self.bare[left] != left) | (self.bare[right] != right))
                if less.any():
                    self.bare[made[less]] = cast(Tensor, self.join(self.bare[left[less]], self.bare[right[less]]))
            ids[fresh] = made
            self._joins.update(zip(keys, ids.tolist(), strict=True))
        return ids

    def _join_few(self, pairs: Sequence[int]) -> None:
        """What `_joined` does with small sets, one by one."""
        new: list[tuple[tuple[int, ...], int]] = []
        for pair in pairs:
            left, right = (self._leaves_of(node) for node in divmod(pair, BASE))
            if left is not None and right is not None and len(left) + len(right) <= _FEW:
                self._joins[pair] = self._set_of(tuple(sorted({*left, *right})), new)
        if new:
            nodes = self._add(len(new))
            sizes = torch.tensor([len(leaves) for leaves, _ in new], device="cpu")
            self._keep(nodes, sizes, torch.tensor([leaf for leaves, _ in new for leaf in leaves], device="cpu"))
            self.bare[nodes] = torch.tensor([bare for _, bare in new], device="cpu")

    def _leaves_of(self, node: int) -> tuple[int, ...] | None:
        """The leaves of a small set, sorted."""
        if node not in self._small:
            first, end = self._table[5, node : node + 2].tolist()
            self._small[node] = tuple(self._leaves[first:end].tolist()) if end > first else None
        return self._small[node]

    def _set_of(self, leaves: tuple[int, ...], new: list[tuple[tuple[int, ...], int]]) -> int:
        """The node of a small set, given by its sorted leaves, and 0 of an empty one; `new` ones with what is bare."""
        about = [self._about[leaf] for leaf in leaves]
        key = _wrapped(sum(leaf.hash for leaf in about))
        if not leaves or key in self._sets:
            return self._sets[key] if leaves else 0
        bare = tuple(leaf for leaf, known in zip(leaves, about, strict=True) if known.bare)
        below = self._set_of(bare, new) if len(bare) < len(leaves) else -1
        node = self.size + len(new)
        new.append((leaves, node if below < 0 else below))
        self._sets[key], self._small[node] = node, leaves
        return node

    def _sizes(self, nodes: Tensor) -> Tensor:
        return self._table[5, nodes + 1] - self._table[5, nodes]

    def _expanded(self, *nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Row and leaf of every leaf of the union of small sets, row by row, sorted, each once."""
        rows, leaves = [], []
        for ids in nodes:
            sizes = self._sizes(ids)
            row = torch.repeat_interleave(torch.arange(len(ids), device="cpu"), sizes)
            within = torch.arange(len(row), device="cpu") - (sizes.cumsum(0) - sizes)[row]
            rows.append(row)
            leaves.append(self._leaves[self._table[5, ids][row] + within])
        if len(nodes) == 1:
            # of each, they are kept so
            return rows[0], leaves[0]
        return _sorted_pairs(torch.cat(rows), torch.cat(leaves))

    def _sets_of(self, row: Tensor, leaf: Tensor, count: int) -> Tensor:
        """The nodes of `count` sets, given by the row and leaf of each of their leaves; an empty set is 0."""
        hashes = torch.zeros(count, dtype=torch.int64, device="cpu").index_add_(0, row, scramble(leaf))
        keys = hashes.tolist()
        ids = torch.tensor([self._sets.get(key, 0) for key in keys], device="cpu")
        fresh = (ids == 0) & (hashes != 0)
        if fresh.any():
            different, where = torch.unique(hashes[fresh], return_inverse=True)
            which = fresh.nonzero()[:, 0]
            first = torch.full_like(different, count).scatter_reduce_(0, where, which, "amin")
            number = torch.full((count,), -1, device="cpu")
            number[first] = torch.arange(len(first), device="cpu")
            mine = number[row] >= 0
            order = torch.argsort(number[row[mine]], stable=True)
            new_row, new_leaf = number[row[mine]][order], leaf[mine][order]
            new = self._add(len(first))
            self._keep(new, torch.bincount(new_row, minlength=len(first)), new_leaf)
            made = torch.arange(new.start, new.stop, device="cpu")
            self._sets.update(zip(different.tolist(), made.tolist(), strict=True))
            ids[fresh] = made[where]
            bare = self.bare[new_leaf] == new_leaf
            whole = torch.ones(len(first), dtype=torch.bool, device="cpu")
            whole[new_row[~bare]] = False
            self.bare[made] = made
            if not whole.all():
                some = (~whole).nonzero()[:, 0]
                number = torch.full((len(first),), -1, device="cpu")
                number[some] = torch.arange(len(some), device="cpu")
                mine = bare & (number[new_row] >= 0)
                self.bare[made[some]] = self._sets_of(number[new_row[mine]], new_leaf[mine], len(some))
        return ids

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

    def mixed(self, kinds: Tensor) -> Tensor:
        """One id for values that are made of all of some different ids [n], whatever these are; int64 []."""
        if not self.bare[kinds].any():
            return cast(Tensor, self.join(self.merge(kinds), torch.tensor(DATA, device="cpu")))
        return self._mixed(kinds[None]).reshape(())

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
            small = self._leaves_of(node) if node else ()
            leaves = self.leaves(torch.tensor([node], device="cpu"))[1].tolist() if small is None else small
            own: dict[int, set[int]] = {}
            for leaf in leaves:
                own.setdefault(self._about[leaf].source, set()).add(leaf)
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
        row_, leaf_ = _sorted_pairs(entry[units] // k, leaf[units])
        everyone, index = torch.unique(row_ * BASE + self.origin[leaf_], return_inverse=True)
        total = torch.bincount(index, minlength=len(everyone))
        each, counts = torch.unique(entry[units] * BASE + source[units], return_counts=True)
        place = torch.searchsorted(everyone, (each // BASE // k) * BASE + each % BASE)
        most = torch.zeros_like(total).scatter_reduce_(0, place, counts, "amax")
        mixed = torch.zeros(n, dtype=torch.bool, device="cpu")
        mixed[everyone[total > most] // BASE] = True
        return mixed

    def _mixed(self, rows: Tensor) -> Tensor:
        """The mix of each row of ids, filled up by zeros."""
        keys = scramble(rows).sum(-1).tolist()
        fresh = {key: i for i, key in enumerate(keys) if key not in self._mix_of}
        if fresh:
            new = self._leaf(None, len(fresh))
            self.mix[new] = torch.arange(len(self.mixes) + 1, len(self.mixes) + 1 + len(fresh), device="cpu")
            self.origin[new] = -self.mix[new]
            self.mixes += [Mix(rows[i][rows[i] > 0], self.why) for i in fresh.values()]
            # a mix is data for whoever gates or shares it
            both = self.with_data(torch.arange(new.start, new.stop, device="cpu"))
            self._mix_of.update(zip(fresh, both.tolist(), strict=True))
        return torch.tensor([self._mix_of[key] for key in keys], device="cpu")

    def leaves(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Units, parameters, data, ONE and mixes that `ids` [n] are made of: indices into it, and leaves."""
        row, node = torch.arange(len(ids), device="cpu"), ids
        rows: list[Tensor] = []
        found: list[Tensor] = []
        while len(node):
            small = self.left[node] == 0
            at, leaf = self._expanded(node[small])
            rows.append(row[small][at])
            found.append(leaf)
            row, node = row[~small], node[~small]
            if len(node):
                row, node = _sorted_pairs(torch.cat([row, row]), torch.cat([self.left[node], self.right[node]]))
        if len(rows) == 1:
            return rows[0], found[0]
        if not rows:
            return row, node
        return _sorted_pairs(torch.cat(rows), torch.cat(found))

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
            mix, leaf = _sorted_pairs(mix[entry], leaf)
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
