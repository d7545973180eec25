"""Of large batches a few samples are looked at, and no forward more often than it shows something new."""

from __future__ import annotations

import copy
import random
import weakref

import pytest
import torch
from looked_at import Loud, Pair, names
from networks import Net
from torch import nn

import cbp_fast
from cbp_fast.discovery.running.forwards import Given

# globals, which no snapshot reaches
ROWS: list = []
STORED: list = []
LIVING: list = []


def counting(forward):
    """The forward, which notes how many rows it is given."""

    def run(m, x, *others):
        ROWS.append(len(x))
        return forward(m, x, *others)

    ROWS.clear()
    torch.manual_seed(0)
    return Net(run, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3), drop=nn.Dropout(0.5)).train()


def rows_of(forward, *inputs):
    """Groups of a model, and how many rows each forward was given."""
    return names(counting(forward), inputs), list(ROWS)


def masked(m, x, mask):
    if mask.all():
        mask = None
    h = m.drop(m.a(x).relu())
    h = m.drop(m.b(h if mask is None else h * mask[:, None]).relu())
    return m.c(h)


BATCH = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def test_a_few_samples_show_what_a_batch_shows():
    # a value that Python reads is no reason to look again where nothing random is read
    found, rows = rows_of(masked, BATCH, torch.ones(64, dtype=torch.bool))
    assert found == ["a", "b"]
    assert sorted(rows) == [2, 3, 64]
    # the samples that show what the whole batch does
    mask = torch.ones(64, dtype=torch.bool)
    mask[40] = False
    found, rows = rows_of(masked, BATCH, mask)
    assert found == ["a", "b"]
    assert sorted(rows) == [2, 2, 3, 3, 64]


def joined(m, x):
    return m.c(m.a(x).view(-1, 16)[:, :8].relu())


def square(m, x, graph):
    return m.c(graph @ m.a(x).relu())


def edges(m, x, index):
    h = m.a(x).relu()
    return m.c(h.index_add(0, index[1], h[index[0]]))


def by_size(m, x):
    h = m.a(x).relu()
    return m.c(m.b(h).relu() if len(x) > 10 else h)


def transposed(m, x):
    return m.c(m.a(x).T.contiguous()[:, :8])


WHOLE = {
    "reads its values": (lambda m, x: m.c(m.a(x[x[:, 0] > 0]).relu()), BATCH),
    "joins samples": (joined, BATCH),
    "graph": (edges, BATCH, torch.arange(64).repeat(2, 1)),
    "graph as a list": (lambda m, x, e: edges(m, x, e.T), BATCH, torch.arange(64)[:, None].repeat(1, 2)),
    "path by size": (by_size, BATCH),
}


@pytest.mark.parametrize("name", WHOLE)
def test_whole_batches_where_a_few_samples_are_another_function(name):
    found, rows = rows_of(*WHOLE[name])
    assert rows[-1] == 64
    forward, *inputs = WHOLE[name]
    torch.manual_seed(0)
    model = Net(forward, a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3)).train()
    assert found == names(model, lambda m: m(*inputs))


def test_samples_are_cut_in_all_that_a_forward_is_given():
    def forward(x, parts, *, lengths, boxes, scale, names):
        seen.append((x.shape, parts["y"][0].shape, len(lengths), len(boxes), scale.shape, len(names), x.requires_grad))

    seen: list = []
    x, y = torch.randn(12, 2, requires_grad=True), torch.randn(12)
    kwargs = {"lengths": list(range(12)), "boxes": [{"b": torch.ones(i, 4)} for i in range(12)], "scale": torch.ones(3)}
    given = Given((x, {"y": (y,)}), {**kwargs, "names": ("a", "b")})
    for run in (given, given.cut(range(3))):
        run(forward)
    assert seen == [(torch.Size([n, 2]), torch.Size([n]), n, n, torch.Size([3]), 2, True) for n in (12, 3)]
    assert Given((torch.ones(12, 2), torch.arange(5)), {}).samples == 0
    assert Given((torch.eye(12).to_sparse(),), {}).samples == 0
    assert Given((torch.ones(12, 2), Pair(x, y)), {}).samples == 0


def test_first_training_forward_looks_at_few_samples_and_keeps_its_own():
    model = counting(masked)
    plain = copy.deepcopy(model)
    mask = torch.ones(64, dtype=torch.bool)
    torch.manual_seed(1)
    expected = plain(BATCH, mask)
    cbp = cbp_fast.ContinualBackprop(model, torch.optim.SGD(model.parameters(), 0.1))
    ROWS.clear()
    torch.manual_seed(1)
    assert torch.equal(model(BATCH, mask), expected)
    assert sorted(ROWS) == [2, 3, 64, 64]
    assert list(cbp.age) == ["a", "b"]


def test_repeats_end_where_nothing_new_is_seen():
    def forward(m, x):
        m.calls.append(random.random())
        return m.c(m.a(x).relu() * m.calls[-1])

    calls = Loud()
    model = counting(forward)
    model.calls = calls
    assert names(model, unreached_ok=True) == ["a"]
    assert len(ROWS) == 5
    assert list(calls) == []


def test_memory_of_a_look_is_freed_before_the_next():
    def forward(m, x):
        if torch.rand(()) < 0.5:
            x = x + 1
        LIVING.append(sum(r() is not None for r in STORED))
        h = m.a(x).relu()
        STORED.append(weakref.ref(h))
        return m.c(h)

    assert names(Net(forward, a=nn.Linear(6, 8), c=nn.Linear(8, 3))) == ["a"]
    assert len(LIVING) > 2
    assert not any(LIVING)
