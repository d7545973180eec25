"""Which units are chosen and how many, worked out by hand in comments, on both backends."""

import math

import numpy as np
import pytest
import torch
from by_hand import INF, NAN, SEED, Units, attach, feed, linear

from cbp_fast import Rule

# which units


def test_the_least_score_goes_first(backend):
    assert Units(backend, 4, replacement_rate=0.75).step(3, 1, 4, 2) == [1, 3, 0]


@pytest.mark.parametrize("rule", ["nature", "gnt"])
def test_equal_scores_take_the_lower_index(backend, rule):
    assert Units(backend, 4, rule=rule, replacement_rate=0.5).step(1, 1, 1, 1) == [0, 1]


def test_scores_are_corrected_for_age(backend):
    units = Units(backend, 2, decay_rate=0.5)
    units.cbp.utility["0"].copy_(torch.tensor([0.6, 0.5]))
    units.cbp.age["0"].copy_(torch.tensor([10, 1]))
    units.cbp.replacement_rate = 0.5
    # held, so as set: 0.6 / (1 - 1 / 1024) against 0.5 / (1 - 1 / 2)
    assert units.step(NAN, NAN) == [0]


def test_clarenas_scores_are_divided_by_age(backend):
    units = Units(backend, 2, decay_rate=0.5, rule="clarena")
    units.cbp.utility["0"].copy_(torch.tensor([0.9, 0.1]))
    units.cbp.age["0"].copy_(torch.tensor([10, 1]))
    units.cbp.replacement_rate = 1.0
    # 0.9 / 10 against 0.1 / 1
    assert units.step(NAN, NAN) == [0]


def test_scores_compare_as_float32(backend):
    # in float64 the second would be less
    assert Units(backend, 2, replacement_rate=0.5).step(1 + 1e-12, 1) == [0]


def test_a_float64_score_beyond_float32_is_the_last_of_the_candidates(backend):
    units = Units(backend, 4, replacement_rate=1)
    # the two of them are equal, but come before what is no candidate
    assert units.step(NAN, 1e300, 1e200, 1e30) == [3, 1, 2]


def test_minus_zero_is_zero(backend):
    units = Units(backend, 2)
    units.cbp.utility["0"].copy_(torch.tensor([0.0, -0.0]))
    units.cbp.age["0"].fill_(1)
    units.cbp.replacement_rate = 0.5
    assert units.step(NAN, NAN) == [0]


def test_a_unit_whose_score_is_not_finite_is_no_candidate(backend):
    units = Units(backend, 3)
    units.cbp.utility["0"].copy_(torch.tensor([NAN, INF, 7.0]))
    units.cbp.age["0"].fill_(1)
    units.cbp.replacement_rate = 1.0
    assert units.step(NAN, NAN, NAN) == [2]
    # three were due, and two still are
    assert units.pending == 2


def test_random_scores_are_of_the_groups_stream(backend, philox):
    units = Units(backend, 5, rule=Rule.gnt("random"), replacement_rate=0.4)
    for step in range(1, 30):
        scores = philox.unit(SEED, step, philox.stream("0", group=True), range(5))
        assert units.step(1, 2, 3, 4, 5) == np.argsort(scores, kind="stable")[:2].tolist()
    assert units.cbp.utility["0"].tolist() == [0] * 5


# how many units


def test_what_is_due_accumulates(backend):
    units = Units(backend, 3, replacement_rate=0.25)
    # 0.75 | 1.5 | 1.25 | 1.0 | 0.75
    counts = [(len(units.step(1, 2, 3)), units.pending) for _ in range(5)]
    assert counts == [(0, 0.75), (1, 0.5), (1, 0.25), (1, 0.0), (0, 0.75)]


def test_a_unit_is_protected_for_the_threshold(backend):
    units = Units(backend, 1, maturity_threshold=2, replacement_rate=1.0)
    # ages 1, 2, 3
    assert [units.step(1) for _ in range(6)] == [[], [], [0], [], [], [0]]


def test_a_unit_is_not_chosen_before_it_is_mature(backend):
    units = Units(backend, 3, maturity_threshold=3, replacement_rate=0.5)
    units.cbp.age["0"].copy_(torch.tensor([5, 2, 5]))
    # ages 6, 3 and 6: two are mature, and one of them is due, though unit 1 has the least score
    assert units.step(5, 1, 3) == [2]


def test_only_mature_units_are_due(backend):
    units = Units(backend, 4, maturity_threshold=3)
    units.cbp.age["0"].copy_(torch.tensor([0, 5, 0, 5]))
    units.cbp.replacement_rate = 0.25
    units.step(1, 2, 3, 4)
    assert units.pending == 0.5


def test_all_units_are_due_once_one_is_mature(backend):
    units = Units(backend, 4, maturity_threshold=3, rule=Rule.gnt(accrual="all"), replacement_rate=0.125)
    units.step(1, 2, 3, 4)
    assert units.pending == 0
    units.cbp.age["0"].copy_(torch.tensor([0, 0, 0, 5]))
    units.step(1, 2, 3, 4)
    assert units.pending == 0.5


def test_what_is_due_beyond_the_candidates_stays_due(backend):
    units = Units(backend, 4, maturity_threshold=3, rule=Rule.gnt(accrual="all"), replacement_rate=0.75)
    units.cbp.age["0"].copy_(torch.tensor([0, 0, 0, 5]))
    # 3 are due and 1 is mature
    assert units.step(1, 2, 3, 4) == [3]
    assert units.pending == 2


def test_rate_0_replaces_nothing(backend):
    units = Units(backend, 3, replacement_rate=0)
    assert [units.step(1, 2, 3) for _ in range(5)] == [[]] * 5
    assert units.cbp.age["0"].tolist() == [5] * 3


def test_rate_1_replaces_every_mature_unit(backend):
    units = Units(backend, 3, replacement_rate=1, maturity_threshold=1)
    assert [units.step(2, 1, 3) for _ in range(4)] == [[], [1, 0, 2], [], [1, 0, 2]]


def test_clarena_accrues_whole_units_and_replaces_one_at_a_time(backend):
    units = Units(backend, 5, rule="clarena", replacement_rate=0.3)
    # int(0.3 * 5) = 1 a step; more than one must be due
    counts = [(len(units.step(1, 2, 3, 4, 5)), units.pending) for _ in range(4)]
    assert counts == [(0, 1.0), (1, 1.0), (1, 1.0), (1, 1.0)]
    units.cbp.replacement_rate = 1.0
    # 1 + 5, of which one goes
    assert (len(units.step(1, 2, 3, 4, 5)), units.pending) == (1, 5.0)


def test_clarena_never_replaces_where_less_than_one_unit_is_due(backend):
    units = Units(backend, 5, rule="clarena", replacement_rate=0.19)
    assert [units.step(1, 2, 3, 4, 5) for _ in range(30)] == [[]] * 30
    assert units.pending == 0


def test_clarena_with_something_due_and_nothing_eligible_replaces_nothing(backend):
    units = Units(backend, 2, rule="clarena", replacement_rate=1.0)
    assert units.step(1, 2) == [0]
    units.cbp.maturity_threshold = 100
    units.cbp.age["0"].fill_(0)
    assert units.step(1, 2) == []
    assert units.pending == 1


@pytest.mark.parametrize(("n", "rate"), [(1, 0.5), (3, 0.5), (2, 0.15), (4, 0.25)])
def test_a_coin_decides_on_the_fraction(backend, philox, n, rate):
    units = Units(backend, n, rule=Rule.gnt(accumulate=False), replacement_rate=rate)
    due, counts, expected = rate * n, [], []
    for step in range(1, 41):
        coin = philox.unit(SEED, step, philox.stream("0", group=True), [n])[0]
        expected.append(math.floor(due) + (coin < due - math.floor(due)))
        counts.append(len(units.step(*range(n))))
        assert units.pending == 0
    assert counts == expected
    # both faces were seen, where there is a coin at all
    assert len(set(counts)) == (1 if due % 1 == 0 else 2)


# no step


@pytest.mark.parametrize("capture", ["deferred", "inline"])
@pytest.mark.parametrize("seen", ["no forward", "an empty batch"])
def test_a_step_that_sees_nothing_changes_nothing(backend, seen, capture, everything):
    units = Units(backend, 3, replacement_rate=0.9, capture=capture)
    assert units.step(1, 2, 3)
    before = everything(units.cbp, units.incoming, units.reader)
    if seen == "an empty batch":
        feed(units.reader, torch.empty(0, 3))
    units.cbp.step()
    after = everything(units.cbp, units.incoming, units.reader)
    changed = {key.split()[1].split(".", 1)[1] for key in before if after.get(key) != before[key]}
    assert changed == {"num_chosen", "last_replaced.0"}
    assert units.cbp.last_replaced["0"].tolist() == []


def test_steps_with_a_forward_are_counted(backend):
    units = Units(backend, 1)
    for _ in range(3):
        units.step(1)
    assert units.cbp.state_dict()["step"] == 3


def test_a_group_that_was_not_reached_stands_still(backend):
    one, other = [(linear([[1.0]] * 2), linear([[1.0] * 2])) for _ in range(2)]
    cbp = attach(backend, one, other, replacement_rate=0.25, rule=Rule.gnt("zero_contribution"))
    for _, reader in (one, other):
        feed(reader, [[1, 2]])
    cbp.step()
    before = cbp.state_dict()["groups"]["1"]
    feed(one[1], [[1, 2]])
    cbp.step()
    after = cbp.state_dict()["groups"]["1"]
    assert {k: v if isinstance(v, (int, float)) else v.tolist() for k, v in after.items()} == {
        k: v if isinstance(v, (int, float)) else v.tolist() for k, v in before.items()
    }
    assert cbp.age["0"].tolist().count(0) == 1  # while its neighbour went on and replaced a unit
