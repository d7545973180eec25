"""The table of nodes: sets of leaves, each kept once, and what two of them are together."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .ids import BASE, RANDOM, scramble, scrambled, sorted_pairs, wrapped

# leaves up to which a set of them is kept by itself, so that equal sets are one node
_FEW = 48
# pairs, or ids in rows, up to which Python is quicker than some dozen operations on tensors
QUICK = 64


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
        self[leaf] = about = _Leaf(scrambled(leaf), *self.runs[bisect.bisect(self.firsts, leaf) - 1])
        return about


class Source(NamedTuple):
    """Consecutive ids: the units that a weight makes along an axis, or (axis None) the one id of a parameter."""

    parameter: str
    axis: int | None
    first: int
    size: int


class Table:
    """Sets of leaves; equal sets of few leaves are one node.

    Attributes:
        size: number of nodes.
        sources: what the ids of units and of parameters stand for.
        about: what Python knows of the leaves that it was asked for.
    """

    def __init__(self) -> None:
        # left and right child of a large set, bare, origin, number of the mix and where the leaves begin
        self._table = torch.zeros(6, 1024, dtype=torch.int64, device="cpu")
        self._leaves = torch.zeros(4096, dtype=torch.int64, device="cpu")
        self._used = 0
        self.size = 0
        self.sources: list[Source] = []
        self._source_of: dict[tuple[str, int | None], int] = {}
        self._joins: dict[int, int] = {}
        self._sets: dict[int, int] = {}
        # of nodes that Python was asked for: the leaves of a small set, or None; and what a leaf is
        self._small: dict[int, tuple[int, ...] | None] = {}
        self.about = _Leaves()
        self._add(1)
        for _ in range(RANDOM):
            self.leaf(Source("", None, self.size, 1))

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

    def leaf(self, source: Source | None, count: int = 1) -> slice:
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
        self.about.firsts.append(new.start)
        self.about.runs.append((bare, len(self.sources) if source and bare else 0))
        return new

    def source(self, parameter: str, axis: int | None, count: int) -> Tensor:
        """The ids of a source, int64 [count]; new ones the first time."""
        key = parameter, axis
        if key not in self._source_of:
            self._source_of[key] = len(self.sources)
            self.leaf(Source(parameter, axis, self.size, count))
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

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        """The union of two ids of one shape, element by element."""
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        new = (low != high) & (low > 0)
        if new.any():
            pairs, where = torch.unique(low[new] * BASE + high[new], return_inverse=True)
            high[new] = self._unions(pairs)[where]
        return high

    def _unions(self, pairs: Tensor) -> Tensor:
        """The union of each of some different pairs, int64 [n], as ``low * BASE + high``."""
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
                    self.bare[made[less]] = self.joined(self.bare[left[less]], self.bare[right[less]])
            ids[fresh] = made
            self._joins.update(zip(keys, ids.tolist(), strict=True))
        return ids

    def _join_few(self, pairs: Sequence[int]) -> None:
        """What `_unions` does with small sets, one by one."""
        new: list[tuple[tuple[int, ...], int]] = []
        for pair in pairs:
            left, right = (self.leaves_of(node) for node in divmod(pair, BASE))
            if left is not None and right is not None and len(left) + len(right) <= _FEW:
                self._joins[pair] = self._set_of(tuple(sorted({*left, *right})), new)
        if new:
            nodes = self._add(len(new))
            sizes = torch.tensor([len(leaves) for leaves, _ in new], device="cpu")
            self._keep(nodes, sizes, torch.tensor([leaf for leaves, _ in new for leaf in leaves], device="cpu"))
            self.bare[nodes] = torch.tensor([bare for _, bare in new], device="cpu")

    def leaves_of(self, node: int) -> tuple[int, ...] | None:
        """The leaves of a small set, sorted."""
        if node not in self._small:
            first, end = self._table[5, node : node + 2].tolist()
            self._small[node] = tuple(self._leaves[first:end].tolist()) if end > first else None
        return self._small[node]

    def _set_of(self, leaves: tuple[int, ...], new: list[tuple[tuple[int, ...], int]]) -> int:
        """The node of a small set, given by its sorted leaves, and 0 of an empty one; `new` ones with what is bare."""
        about = [self.about[leaf] for leaf in leaves]
        key = wrapped(sum(leaf.hash for leaf in about))
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
        return sorted_pairs(torch.cat(rows), torch.cat(leaves))

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
                row, node = sorted_pairs(torch.cat([row, row]), torch.cat([self.left[node], self.right[node]]))
        if len(rows) == 1:
            return rows[0], found[0]
        if not rows:
            return row, node
        return sorted_pairs(torch.cat(rows), torch.cat(found))
