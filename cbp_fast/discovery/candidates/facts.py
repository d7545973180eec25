"""What a trace says of every node: where its units are, which belong together, and what forbids them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from ..nodes.ids import BASE, DATA, scramble
from ..nodes.nodes import Nodes
from ..trace.trace import Trace


class Entries:
    """Where each unit was made, read, normalised and passed on: one pair for each place.

    Attributes:
        layers: role and layer of each part of the places, which are numbered through.
        starts: the first place of each.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[str, Any]] = []
        self.starts = [0]
        self._pairs: list[Tensor] = []

    def add(self, role: str, key: Any, unit: Tensor, position: Tensor) -> None:
        """Units are at some positions of a layer, in a role."""
        self.layers.append((role, key))
        self._pairs.append(torch.stack([unit, position + self.starts[-1]]))
        self.starts.append(self.starts[-1] + int(position.max()) + 1)

    def pairs(self) -> Tensor:
        """Units and places, int64 [2, E]; they are handed over."""
        return _taken_together(self._pairs)

    def split(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's number and the position there of each place."""
        starts = torch.tensor(self.starts, device="cpu")
        layer = torch.bucketize(places, starts, right=True) - 1
        return layer, places - starts[layer]


class Facts:
    """What the records of a trace say of every node.

    Attributes:
        entries: where units were made, read, normalised and passed on.
        root: the least node that belongs to the same units, int64 [nodes].
        refusal: the number of the reason that forbids each, or of none if above all; `reasons`: in words.
        raw: whether its columns hold data that no unit makes, too.
        coupled: whether readers see different sums of its units.
        notes: by what is said of units, whether it is said of each.
    """

    def __init__(self, trace: Trace) -> None:
        nodes = trace.nodes
        n = nodes.size
        self.entries = Entries()
        self.reasons = [reason for _, reason in trace.refused]
        for i, source in enumerate(nodes.sources):
            if source.axis is not None:
                rows = torch.arange(source.size, device="cpu")
                self.entries.add("make", (source.parameter, source.axis, i), source.first + rows, rows)

        causes = [(ids, i) for i, (ids, _) in enumerate(trace.refused)]
        raw = torch.zeros(n, dtype=torch.bool, device="cpu")
        edges: list[Tensor] = []
        sums: list[Tensor] = []
        crowds: list[tuple[Tensor, str]] = []
        # where a layer stands: in the order of the forward, makers first
        for (role, key), pairs in trace.records.items():
            pairs_ = torch.unique(torch.cat([p * BASE + i for p, i in pairs]))
            place, ids = pairs_ // BASE, pairs_ % BASE
            row, leaf = nodes.leaves(ids)
            is_unit = nodes.is_unit(leaf)
            at = place[row]
            dirty = torch.zeros(int(place.max()) + 1 if len(place) else 1, dtype=torch.bool, device="cpu")
            if not is_unit.all():
                causes.append((leaf[nodes.mix[leaf] > 0], BASE))
                dirty[at[leaf == DATA]] = role == "read"
                row, at, leaf = row[is_unit], at[is_unit], leaf[is_unit]
                raw[leaf[dirty[at]]] = True
            if not len(leaf):
                continue
            first = torch.full_like(dirty, BASE, dtype=torch.int64).scatter_reduce_(0, at, leaf, "amin")
            joined = torch.stack([leaf, first[at]])
            edges.append(joined[:, joined[0] != joined[1]])
            total = torch.zeros(len(ids), dtype=torch.int64, device="cpu").index_add_(0, row, scramble(leaf))
            one = torch.zeros_like(total).index_copy_(0, row, leaf)
            sums.append(torch.stack([one, total])[:, total != 0])
            self.entries.add(role, key, leaf, at)
            if not (place.diff() > 0).all():
                crowd = _crowded(nodes, row, at, leaf)
                if len(crowd):
                    name = key[0] if isinstance(key, tuple) else key
                    crowds.append((crowd, f"'{name}' takes several of its units for one"))

        def mixed(number: int) -> int:
            self.reasons.append(f"its features are mixed by {nodes.mixes[number].why}")
            return len(self.reasons) - 1

        self.refusal = nodes.spread(causes, mixed)
        for crowd, reason in crowds:
            self.refusal[crowd] = self.refusal[crowd].clamp(max=len(self.reasons))
            self.reasons.append(reason)
        self.notes: dict[str, Tensor] = defaultdict(lambda: torch.zeros(n, dtype=torch.bool, device="cpu"))
        for ids, note in trace.notes:
            _, leaf = nodes.leaves(torch.unique(ids))
            self.notes[note][leaf] = True

        self.root = _connect(n, _taken_together(edges))
        for held in self.notes.values():
            held[self.root[held.nonzero()[:, 0]]] = True
        self.raw = torch.zeros_like(raw)
        self.raw[self.root[raw]] = True
        self.refusal = torch.full_like(self.refusal, BASE).scatter_reduce_(0, self.root, self.refusal, "amin")
        one, total = _taken_together(sums)
        zero, at = torch.zeros_like(self.root), self.root[one]
        low, high = (zero.scatter_reduce(0, at, total, how, include_self=False) for how in ("amin", "amax"))
        self.coupled = high != low


def _taken_together(parts: list[Tensor]) -> Tensor:
    """Pairs [2, ...] in one tensor; the list is emptied, so that they are held once."""
    whole = torch.cat([torch.zeros(2, 0, dtype=torch.int64, device="cpu"), *parts], 1)
    parts.clear()
    return whole


def _crowded(nodes: Nodes, row: Tensor, at: Tensor, unit: Tensor) -> Tensor:
    """Units of one layer that share a place without being joined, at different positions."""
    source = nodes.origin[unit]
    _, index, here = torch.unique(row * BASE + source, return_inverse=True, return_counts=True)
    pairs = torch.unique(at * BASE + unit)
    spots, counts = torch.unique(pairs // BASE * BASE + nodes.origin[pairs % BASE], return_counts=True)
    there = counts[torch.searchsorted(spots, at * BASE + source)]
    return unit[here[index] < there]


def _connect(n: int, edges: Tensor) -> Tensor:
    """The smallest node that each of n nodes is connected to, by edges [2, E]."""
    root = torch.arange(n, device="cpu")
    a, b = edges
    while True:
        low = torch.minimum(root[a], root[b])
        new = root.scatter_reduce(0, a, low, "amin").scatter_reduce(0, b, low, "amin")
        new = torch.minimum(new, new[new])
        if torch.equal(new, root):
            return root
        root = new
