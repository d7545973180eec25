"""A forward is followed again where random numbers, or what nobody saw, may show something else."""

import functools
import random

import pytest
import torch
from known_networks import ROWS, lines
from networks import Net
from torch import nn

from cbp_fast.discovery import explain, find_unit_groups
from cbp_fast.discovery.following import following


def test_a_path_that_chance_does_not_change_is_followed_once(monkeypatch):
    """Each layer of a transformer asks whether it is left out, which by default it never is."""
    followed, look = [], following._follow
    monkeypatch.setattr(following, "_follow", lambda *args: (followed.append(1), look(*args))[1])
    for dropped, once in ((0.0, True), (0.5, False)):

        def forward(m, x, dropped=dropped):
            h = torch.relu(m.a(x))
            return m.b(h if torch.rand(()) < dropped else torch.tanh(h))

        model = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 2))
        followed.clear()
        assert [g.name for g in find_unit_groups(model, torch.randn(3, 4))] == ["a"]
        assert (len(followed) == 1) == once


@pytest.mark.parametrize(
    "number",
    [lambda: torch.rand(()).item(), lambda: torch.rand(1).numpy()[0], random.random],
    ids=["item", "numpy", "Python"],
)
def test_what_chance_chooses_beside_the_operations_is_seen(number):
    def forward(m, x):
        by = int(number() * 6)
        order = torch.tensor([(i + by) % 6 for i in range(6)])
        return m.b(torch.relu(m.a(x))[:, order])

    model = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 2))
    for seed in range(3):
        random.seed(seed)
        torch.manual_seed(seed)
        assert find_unit_groups(model, torch.randn(3, 4)) == []


def test_path_chosen_at_random_is_taken_both_ways():
    def by_python(m, x):
        h = m.a(x)
        return m.c(m.b(h) if random.random() < 0.5 else h)

    def by_torch(m, x):
        h = m.a(x)
        return m.c(m.b(h) if torch.rand(()) < 0.5 else h)

    for function in (by_python, by_torch):
        for seed in range(5):
            random.seed(seed)
            torch.manual_seed(seed)
            model = Net(function, a=nn.Linear(5, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 3))
            assert find_unit_groups(model, ROWS) == []
            assert "only what was taken was seen" in explain(model, ROWS)


def test_what_a_cache_has_held_before_is_no_reason_to_follow_the_forward_twice(monkeypatch):
    held = torch.randn(3, 5)
    looks = []
    look = following._follow
    monkeypatch.setattr(following, "_follow", lambda *args: looks.append(1) or look(*args))
    cached = functools.lru_cache(lambda: held * 2)
    model = Net(lambda m, x: m.b(m.a(x + cached()).relu()), a=nn.Linear(5, 6), b=nn.Linear(6, 3))
    model(ROWS[:3])
    assert lines(find_unit_groups(model, ROWS[:3])) == {"a: a -> b"}
    assert len(looks) == 1
