"""What one step does, worked out by hand in comments, on both backends."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cbp_fast import ContinualBackprop, Rule, UnitGroup

NAN, INF = math.nan, math.inf
SEED = 2**63 + 12345


def linear(weight, bias=None, dtype=torch.float64):
    """A layer with these numbers; of three axes or more a convolution."""
    weight = torch.tensor(weight, dtype=dtype)
    if weight.dim() == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    else:
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[weight.dim() - 3]
        layer = conv(weight.shape[1], weight.shape[0], weight.shape[2:], bias=bias is not None)
    layer.to(dtype).weight.data.copy_(weight)
    if bias is not None:
        layer.bias.data.copy_(torch.tensor(bias))
    return layer


def attach(backend, *groups, optimizer=None, **options):
    """A ContinualBackprop on groups "0", "1", ... of (incoming, outgoing, norms), each a layer or several."""
    groups = [UnitGroup(str(i), *group) for i, group in enumerate(groups)]
    model = nn.ModuleList(dict.fromkeys(m for g in groups for m in (*g.incoming, *g.norms, *g.outgoing)))
    options = {"maturity_threshold": 0, "decay_rate": 0.5, "replacement_rate": 0.0, "seed": SEED, **options}
    return ContinualBackprop(model, optimizer, groups=groups, backend=backend, **options)


def feed(layer, h):
    layer(torch.as_tensor(h, dtype=layer.weight.dtype))


def near(*numbers):
    """These numbers, to a few roundings of float64."""
    return pytest.approx(np.array(numbers), rel=1e-14, abs=1e-300, nan_ok=True)


class Units:
    """N units whose y is the h fed: one reader with one row of ones, decay 0, all of them mature after one step."""

    def __init__(self, backend, n, dtype=torch.float64, **options):
        self.incoming, self.reader = linear([[1.0]] * n, [0.0] * n, dtype), linear([[1.0] * n], None, dtype)
        self.cbp = attach(backend, (self.incoming, self.reader), **{"decay_rate": 0.0, **options})

    def step(self, *h):
        """One step with one sample: which units it replaces."""
        with torch.no_grad():
            self.reader.weight.fill_(1.0)
        feed(self.reader, [h])
        self.cbp.step()
        return self.cbp.last_replaced["0"].tolist()

    @property
    def pending(self):
        return self.cbp.state_dict()["groups"]["0"]["pending"]


# the utility of each rule


@pytest.mark.parametrize(
    ("rule", "y"),
    [
        (Rule.nature(), [2 * 3, 3 * 4]),
        (Rule.gnt("contribution"), [2 * 1.5, 3 * 2]),
        (Rule.gnt("zero_contribution"), [1 * 1.5, 3 * 2]),
        (Rule.gnt("adaptable_contribution"), [1 * 1.5 / 1, 3 * 2 / 2]),
        (Rule.gnt("feature_by_input"), [1 / 1, 3 / 2]),
        (Rule.gnt("weight"), [1.5, 2]),
        (Rule.gnt("adaptation"), [1 / 1, 1 / 2]),
        (Rule.gnt("random"), [0, 0]),
        # products 2 * 4 and 3 * 8, of which the least gives 0
        (Rule.clarena(), [0, 16 / (16 + 1e-8)]),
    ],
    ids=lambda value: f"{value.name}-{value.utility}" if isinstance(value, Rule) else "",
)
def test_utility(backend, rule, y):
    incoming = linear([[1, -1, 2, 0], [4, -2, 0, 2]])  # sums 4, 8; means 1, 2
    reader = linear([[1, -3], [2, 1]])  # sums of columns 3, 4; means 1.5, 2
    cbp = attach(backend, (incoming, reader), rule=rule)
    # mean abs(h) 2, 3; mean h 2, -1 is h_hat in the first step; mean abs(h - h_hat) 1, 3
    feed(reader, [[1, -4], [3, 2]])
    cbp.step()
    # decay 1 / 2, from 0
    assert cbp.utility["0"].numpy() == near(*(value / 2 for value in y))
    assert cbp.age["0"].tolist() == [1, 1]


def test_utility_decays(backend):
    units = Units(backend, 2, decay_rate=0.75)
    units.step(8, 0)
    units.step(4, 16)
    # 8 / 4 = 2, then 3 / 4 * 2 + 4 / 4; 16 / 4
    assert units.cbp.utility["0"].numpy() == near(2.5, 4)


def test_no_decay_forgets_at_once(backend):
    units = Units(backend, 2, decay_rate=0.0)
    units.step(8, 0)
    units.step(4, 16)
    assert units.cbp.utility["0"].tolist() == [4, 16]


def test_centred_utility_in_the_second_step(backend):
    incoming, reader = linear([[1.0]]), linear([[1.0]])
    cbp = attach(backend, (incoming, reader), rule=Rule.gnt("zero_contribution"))
    feed(reader, [[2.0], [6.0]])  # mean 4, distance 2: u = 1, m_h = 2
    cbp.step()
    # mean 10; h_hat = (2 / 2 + 10 / 2) / (1 - 1 / 4) = 8; distances 0 and 4: y = 2
    feed(reader, [[8.0], [12.0]])
    cbp.step()
    assert cbp.utility["0"].numpy() == near(1 / 2 + 2 / 2)
    assert cbp.state_dict()["groups"]["0"]["running_mean"].numpy() == near(2 / 2 + 10 / 2)


def test_centred_utility_uses_the_mean_so_far(backend):
    incoming, reader = linear([[1.0]]), linear([[1.0]])
    cbp = attach(backend, (incoming, reader), rule=Rule.gnt("zero_contribution"))
    feed(reader, [[2.0]])  # mean 2, distance 0
    feed(reader, [[6.0], [7.0]])  # mean 5, distances 1 and 2
    cbp.step()
    assert cbp.utility["0"].numpy() == near((0 + 1 + 2) / 3 / 2)
    assert cbp.state_dict()["groups"]["0"]["running_mean"].numpy() == near(5 / 2)


def test_mean_that_is_not_finite_is_not_averaged(backend):
    incoming, reader = linear([[1.0]] * 2), linear([[1.0] * 2])
    cbp = attach(backend, (incoming, reader), rule=Rule.gnt("zero_contribution"))
    feed(reader, [[4.0, 4.0]])
    cbp.step()
    feed(reader, [[INF, 4.0]])
    cbp.step()
    assert cbp.state_dict()["groups"]["0"]["running_mean"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("rule", "y"),
    [
        (Rule.nature(), [2 * 2 + 4 * 3, 2 * 2 + 2 * 4]),
        (Rule.gnt("contribution"), [(2 * 1 + 4 * 1.5) / 2, (2 * 1 + 2 * 2) / 2]),
        (Rule.gnt("zero_contribution"), [(1 * 1 + 1 * 1.5) / 2, (2 * 1 + 2 * 2) / 2]),
        (Rule.gnt("adaptable_contribution"), [(1 * 1 + 1 * 1.5) / 2 / 2, (2 * 1 + 2 * 2) / 2 / 8]),
        (Rule.gnt("feature_by_input"), [1 / 2, 2 / 8]),
        (Rule.gnt("weight"), [(1 + 1.5) / 2, (1 + 2) / 2]),
    ],
    ids=lambda value: f"{value.name}-{value.utility}" if isinstance(value, Rule) else "",
)
def test_utility_of_a_flattened_convolution(backend, rule, y):
    conv = linear([[[2]], [[-8]]])
    reader = linear([[1, 0, 2, 1], [1, 3, 0, -3]])  # sums of columns 2, 3 | 2, 4
    cbp = attach(backend, (conv, reader), rule=rule)
    # mean abs(h) 2, 4 | 2, 2; mean h 2, 4 | 0, 2, over the unit 3 | 1; distances from that 1, 1 | 2, 2
    feed(reader, [[1, 3, -2, 0], [3, 5, 2, 4]])
    cbp.step()
    assert cbp.utility["0"].numpy() == near(*(value / 2 for value in y))


def test_every_sample_of_a_sequence_counts(backend):
    incoming, reader = linear([[1.0]] * 2), linear([[1.0] * 2])
    cbp = attach(backend, (incoming, reader), decay_rate=0.0)
    feed(reader, [[[1, 2], [3, 4]], [[5, 6], [7, 8]]])
    cbp.step()
    assert cbp.utility["0"].tolist() == [(1 + 3 + 5 + 7) / 4, (2 + 4 + 6 + 8) / 4]


def test_a_sample_without_a_batch_axis(backend):
    incoming, reader = linear([[1.0]] * 2), linear([[1.0] * 2])
    cbp = attach(backend, (incoming, reader), decay_rate=0.0)
    feed(reader, [3, -4])
    cbp.step()
    assert cbp.utility["0"].tolist() == [3, 4]


def test_every_position_of_a_convolution_counts(backend):
    conv = linear(torch.ones(2, 1, 1, 1).tolist())
    reader = linear([[[[1, 2]], [[0, 3]]], [[[1, 0]], [[4, -5]]]])  # sums 4, 12; means 1, 3
    cbp = attach(backend, (conv, reader), rule=Rule.gnt(), decay_rate=0.0)
    feed(reader, [[[[1, 2], [3, 6]], [[-1, -1], [1, 1]]]])  # means 3, 1
    cbp.step()
    assert cbp.utility["0"].tolist() == [3 * 1, 1 * 3]


def test_a_convolution_without_a_batch_axis(backend):
    conv, reader = linear([[[1]], [[1]]]), linear([[[1], [1]]])
    cbp = attach(backend, (conv, reader), decay_rate=0.0)
    feed(reader, [[1, 2, 3], [-4, 5, 6]])
    cbp.step()
    assert cbp.utility["0"].tolist() == [2, 5]


def test_columns_of_a_grouped_convolution_belong_to_its_groups(backend):
    conv = linear([[[1.0]]] * 4)
    reader = nn.Conv1d(4, 4, 1, groups=2, bias=False).double()
    # units 0 and 1 are read by rows 0 and 1, units 2 and 3 by rows 2 and 3
    reader.weight.data.copy_(torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]]).view(4, 2, 1))
    cbp = attach(backend, (conv, reader), decay_rate=0.0)
    feed(reader, [[[1.0], [1.0], [1.0], [1.0]]])
    cbp.step()
    assert cbp.utility["0"].tolist() == [1 + 3, 2 + 4, 5 + 7, 6 + 8]


@pytest.mark.parametrize(
    ("rule", "y"),
    [
        (Rule.nature(), [2 * 1 + 4 * 3, 1 * 2 + 3 * 6]),
        # 1 element of the one reader and 3 of the other, pooled
        (Rule.gnt(), [(2 * 1 + 4 * 3) / 4, (1 * 2 + 3 * 6) / 4]),
        (Rule.gnt("weight"), [(1 + 3) / 4, (2 + 6) / 4]),
    ],
    ids=lambda value: f"{value.name}-{value.utility}" if isinstance(value, Rule) else "",
)
def test_utility_of_two_readers(backend, rule, y):
    incoming, one, three = linear([[1], [1]]), linear([[1, 2]]), linear([[1, 1], [1, 1], [1, -4]])
    cbp = attach(backend, (incoming, [one, three]), rule=rule, decay_rate=0.0)
    feed(one, [[2, 1]])
    feed(three, [[4, 3], [-4, -3]])
    cbp.step()
    assert cbp.utility["0"].numpy() == near(*y)


@pytest.mark.parametrize("rule", [Rule.nature(), Rule.gnt(), Rule.gnt("weight")], ids=lambda r: f"{r.name}-{r.utility}")
def test_a_reader_that_did_not_run_does_not_count(backend, rule):
    incoming, one, three = linear([[1], [1]]), linear([[1, 2]]), linear([[1, 1], [1, 1], [1, -4]])
    cbp = attach(backend, (incoming, [one, three]), rule=rule, decay_rate=0.0)
    feed(one, [[1, 1]])
    cbp.step()
    assert cbp.utility["0"].tolist() == [1, 2]


def test_clarena_pools_the_samples_of_its_readers(backend):
    incoming, one, other = linear([[1], [1], [1]]), linear([[1, 1, 1]]), linear([[1, 1, 1]])
    cbp = attach(backend, (incoming, [one, other]), rule="clarena", decay_rate=0.0)
    feed(one, [[4, 0, 0]])
    feed(other, [[0, 0, 8], [0, 4, 8]])
    cbp.step()
    # means over three samples: 4 / 3, 4 / 3, 16 / 3; the distance from least to greatest is 4
    assert cbp.utility["0"].numpy() == near(0, 0, 4 / (4 + 1e-8))


def test_incoming_weights_of_two_producers_are_pooled(backend):
    # 1 + 3 + 4 over 4 elements, 2 + 2 + 12 over 4
    one, other, reader = linear([[1], [2]]), linear([[3, 4, 0], [2, 12, 0]]), linear([[1, 1]])
    cbp = attach(backend, ([one, other], reader), rule=Rule.gnt("adaptation"), decay_rate=0.0)
    feed(reader, [[1, 1]])
    cbp.step()
    assert cbp.utility["0"].numpy() == near(4 / 8, 4 / 16)


def test_uneven_forwards_are_pooled(backend):
    units = Units(backend, 1)
    feed(units.reader, [[3.0]])
    feed(units.reader, [[1.0], [1.0]])
    units.cbp.step()
    # the mean of three samples, not of two means
    assert units.cbp.utility["0"].numpy() == near(5 / 3)


# y that is not finite


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_unit_without_a_finite_utility_is_held(backend, bad):
    units = Units(backend, 2, decay_rate=0.5)
    units.step(8, 8)
    units.step(bad, 4)
    assert units.cbp.utility["0"].tolist() == [4, 4]
    assert units.cbp.age["0"].tolist() == [1, 2]


def test_a_dead_weight_times_an_overflowed_activation_holds_the_unit(backend):
    incoming, reader = linear([[1], [1]]), linear([[0.0, 1.0]])
    cbp = attach(backend, (incoming, reader))
    feed(reader, [[INF, 1.0]])
    cbp.step()
    assert cbp.age["0"].tolist() == [0, 1]


def test_a_dead_incoming_row_holds_the_unit_of_a_rule_that_divides(backend):
    incoming, reader = linear([[0.0], [1.0]]), linear([[1.0, 1.0]])
    cbp = attach(backend, (incoming, reader), rule=Rule.gnt("adaptation"))
    feed(reader, [[1.0, 1.0]])
    cbp.step()
    assert cbp.age["0"].tolist() == [0, 1]


def test_float32_overflow_of_the_utility_holds_the_unit(backend):
    units = Units(backend, 2, torch.float32)
    with torch.no_grad():
        units.reader.weight.fill_(2e38)
    feed(units.reader, [[1.0, 2.0]])
    units.cbp.step()
    assert units.cbp.age["0"].tolist() == [1, 0]


def test_a_unit_that_never_had_a_finite_utility_is_never_chosen(backend):
    units = Units(backend, 2, replacement_rate=1.0)
    for _ in range(5):
        assert units.step(NAN, 1) == [1]


def test_a_held_unit_can_be_chosen_by_what_it_had(backend):
    units = Units(backend, 2)
    units.step(1, 2)
    units.cbp.replacement_rate = 0.5
    assert units.step(NAN, 2) == [0]


def test_units_that_are_not_finite_take_no_part_in_clarenas_minimum_and_maximum(backend):
    units = Units(backend, 5, rule="clarena")
    units.step(2, INF, 6, 4, NAN)
    assert units.cbp.utility["0"].numpy() == near(0, 0, 4 / (4 + 1e-8), 2 / (4 + 1e-8), 0)
    assert units.cbp.age["0"].tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("h", [(3,), (3, 3, 3), (0, 0)], ids=str)
def test_clarena_gives_0_to_one_unit_and_to_equal_units(backend, h):
    units = Units(backend, len(h), rule="clarena")
    units.step(*h)
    assert units.cbp.utility["0"].tolist() == [0] * len(h)
    assert units.cbp.age["0"].tolist() == [1] * len(h)


def test_clarena_with_no_finite_utility_at_all(backend):
    units = Units(backend, 2, rule="clarena", replacement_rate=1.0)
    assert units.step(NAN, INF) == []
    assert units.cbp.age["0"].tolist() == [0, 0]


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


# what belongs to a unit


def whole(layer_or_norm):
    return {key: value.clone() for key, value in layer_or_norm.state_dict().items()}


def test_everything_of_a_unit_is_set_and_nothing_else(backend, philox):
    incoming, reader = nn.Linear(5, 4), nn.Linear(4, 3)
    cbp = attach(backend, (incoming, reader), replacement_rate=0.25)
    feed(reader, [[3, 2, 1, 4]])
    with torch.no_grad():
        reader.weight.fill_(1.0)
    before_in, before_out = whole(incoming), whole(reader)
    cbp.step()
    assert cbp.last_replaced["0"].tolist() == [2]
    # row 2 of 5 columns: elements 10 to 14
    new = philox.uniform(SEED, 1, philox.stream("0.weight"), range(10, 15), math.sqrt(2) * math.sqrt(3 / 5))
    before_in["weight"][2], before_in["bias"][2] = torch.from_numpy(new), 0
    before_out["weight"][:, 2] = 0
    torch.testing.assert_close(whole(incoming), before_in, rtol=0, atol=0)
    torch.testing.assert_close(whole(reader), before_out, rtol=0, atol=0)
    assert [cbp.utility["0"][2].item(), cbp.age["0"].tolist()] == [0, [1, 1, 0, 1]]


def test_running_mean_of_a_replaced_unit_is_cleared(backend):
    conv, reader = linear([[[1.0]]] * 2), linear([[1.0] * 4])
    cbp = attach(backend, (conv, reader), rule=Rule.gnt("zero_contribution"), replacement_rate=0.5)
    feed(reader, [[1, 1, 1, 1], [3, 3, 2, 2]])
    cbp.step()
    assert cbp.last_replaced["0"].tolist() == [1]
    assert cbp.state_dict()["groups"]["0"]["running_mean"].tolist() == [1, 1, 0, 0]


def test_a_weight_between_two_replaced_units_is_drawn_not_zero(backend, philox):
    first, middle, last = linear([[1.0]] * 2, [1.0] * 2), linear([[1.0] * 2] * 3, [1.0] * 3), linear([[1.0] * 3])
    cbp = attach(backend, (first, middle), (middle, last), replacement_rate=0.5)
    feed(middle, [[2, 1]])
    feed(last, [[3, 1, 2]])
    cbp.step()
    assert [units.tolist() for units in cbp.last_replaced.values()] == [[1], [1]]
    bound = math.sqrt(2) * math.sqrt(3 / 2)
    drawn = philox.uniform(SEED, 1, philox.stream("1.weight"), [2, 3], bound).astype(np.float64)
    np.testing.assert_array_equal(middle.weight.detach(), [[1, 0], drawn, [1, 0]])
    assert (drawn != 0).all()


def test_the_order_in_which_groups_are_given_does_not_matter(backend):
    first, middle, last = linear([[1.0]] * 2), linear([[1.0] * 2] * 3), linear([[1.0] * 3])
    cbp = attach(backend, (middle, last), (first, middle), replacement_rate=0.5)
    feed(middle, [[2, 1]])
    feed(last, [[3, 1, 2]])
    cbp.step()
    assert [units.tolist() for units in cbp.last_replaced.values()] == [[1], [1]]
    # as it is in the order of the forward: drawn after the column was cleared
    assert (middle.weight == 0).tolist() == [[False, True], [False, False], [False, True]]


def test_all_groups_choose_before_any_is_changed(backend):
    first, middle, last = linear([[1.0]] * 2), linear([[1.0, 2.0]] * 3), linear([[1.0] * 3])
    cbp = attach(backend, (first, middle), (middle, last), rule=Rule.gnt("adaptation"), replacement_rate=0.5)
    feed(middle, [[1, 1]])
    feed(last, [[1, 1, 1]])
    cbp.step()
    # a column of `middle` is 0 by now, but y was 1 / 1.5 in all of its rows
    assert cbp.utility["1"].numpy() == near(0, 1 / 3, 1 / 3)


def test_each_producer_is_drawn_with_its_own_bound_and_each_reader_zeroed(backend, philox):
    producers, readers = [nn.Linear(2, 2), nn.Linear(8, 2)], [nn.Linear(2, 1), nn.Linear(2, 3)]
    for reader in readers:
        nn.init.ones_(reader.weight)
    cbp = attach(backend, (producers, readers), replacement_rate=0.5)
    for reader in readers:
        feed(reader, [[2, 1]])
    cbp.step()
    assert cbp.last_replaced["0"].tolist() == [1]
    for i, (producer, fan_in) in enumerate(zip(producers, (2, 8), strict=True)):
        elements = range(fan_in, 2 * fan_in)
        new = philox.uniform(SEED, 1, philox.stream(f"{i}.weight"), elements, math.sqrt(2) * math.sqrt(3 / fan_in))
        np.testing.assert_array_equal(producer.weight[1].detach(), new)
        assert producer.bias[1] == 0
    for reader in readers:
        assert [(column == 0).all().item() for column in reader.weight.T] == [False, True]


def test_all_columns_of_a_flattened_unit_are_zeroed(backend):
    conv, reader = linear([[[1.0]]] * 3), linear([[1.0] * 6] * 2)
    cbp = attach(backend, (conv, reader), replacement_rate=1 / 3 + 1e-9)
    feed(reader, [[3, 3, 1, 1, 2, 2]])
    cbp.step()
    assert reader.weight.tolist() == [[1, 1, 0, 0, 1, 1]] * 2


def test_columns_of_a_grouped_convolution_are_zeroed_in_its_group(backend):
    conv, reader = linear([[[1.0]]] * 4), nn.Conv1d(4, 6, 2, groups=2).double()
    nn.init.ones_(reader.weight)
    cbp = attach(backend, (conv, reader), replacement_rate=0.25)
    feed(reader, torch.tensor([4.0, 3, 2, 1])[None, :, None].expand(1, 4, 5))
    cbp.step()
    assert cbp.last_replaced["0"].tolist() == [3]
    # unit 3 is column 1 of rows 3, 4 and 5
    expected = torch.ones(6, 2, 2)
    expected[3:, 1] = 0
    assert torch.equal(reader.weight, expected.double())


def test_batch_norm_of_a_unit_starts_afresh(backend):
    norm = nn.BatchNorm1d(3).double()
    incoming, reader = linear([[1.0]] * 3), linear([[1.0] * 3])
    for i, tensor in enumerate((norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var)):
        tensor.copy_(torch.tensor([5.0, 6.0, 7.0]) + 10 * i)
    norm.num_batches_tracked.fill_(9)
    cbp = attach(backend, (incoming, reader, norm), replacement_rate=0.4)
    feed(reader, [[2, 1, 3]])
    cbp.step()
    assert {key: value.tolist() for key, value in norm.state_dict().items()} == {
        "weight": [5, 1, 7],
        "bias": [15, 0, 17],
        "running_mean": [25, 0, 27],
        "running_var": [35, 1, 37],
        "num_batches_tracked": 9,
    }


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm], ids=["LayerNorm", "RMSNorm"])
def test_all_entries_of_a_flattened_unit_are_reset_in_a_norm(backend, kind):
    norm = kind(6).double()
    for parameter in norm.parameters():
        parameter.data.fill_(7)
    conv, reader = linear([[[1.0]]] * 3), linear([[1.0] * 6])
    cbp = attach(backend, (conv, reader, norm), replacement_rate=0.4)
    feed(reader, [[2, 2, 1, 1, 3, 3]])
    cbp.step()
    assert norm.weight.tolist() == [7, 7, 1, 1, 7, 7]
    if kind is nn.LayerNorm:
        assert norm.bias.tolist() == [7, 7, 0, 0, 7, 7]


def test_norms_of_a_convolution(backend):
    group, layer = nn.GroupNorm(1, 2).double(), nn.LayerNorm((2, 3)).double()
    for norm in (group, layer):
        for parameter in norm.parameters():
            parameter.data.fill_(7)
    conv, reader = linear([[[1.0]]] * 2), linear([[[1.0], [1.0]]])
    cbp = attach(backend, (conv, reader, [group, layer]), replacement_rate=0.5)
    feed(reader, [[[1, 1, 1], [2, 2, 2]]])
    cbp.step()
    assert (group.weight.tolist(), group.bias.tolist()) == ([1, 7], [0, 7])
    assert (layer.weight.tolist(), layer.bias.tolist()) == ([[1] * 3, [7] * 3], [[0] * 3, [7] * 3])


def test_clarena_draws_the_row_and_the_column_before_it_and_touches_nothing_else(backend, philox):
    layers = [nn.Linear(4, 3), nn.Linear(3, 4), nn.Linear(4, 2)]
    norm = nn.BatchNorm1d(4)
    nn.init.constant_(norm.weight, 7)
    for layer in layers:
        nn.init.ones_(layer.weight)
    groups = (layers[0], layers[1]), (layers[1], layers[2], norm)
    optimizer = torch.optim.SGD([p for layer in layers for p in layer.parameters()], 0.0, momentum=0.9)
    cbp = attach(backend, *groups, rule="clarena", replacement_rate=1.0, optimizer=optimizer)
    model = nn.ModuleList([layers[0], layers[1], norm, layers[2]])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    expected = whole(model)
    feed(layers[1], [[2, 1, 3]])
    feed(layers[2], [[2, 3, 4, 1]])
    optimizer.step()
    assert [units.tolist() for units in cbp.last_replaced.values()] == [[1], [3]]

    names = {id(module): name for name, module in cbp._model.named_modules()}
    stream = [philox.stream(f"{names[id(layer)]}.weight") for layer in layers]

    def draw(layer, elements):
        return torch.from_numpy(philox.unit(SEED, 1, stream[layer], elements))

    expected["0.weight"][1] = draw(0, range(4, 8))  # the first group has only its row
    expected["0.weight"][:, 3] = draw(0, [3, 7, 11])  # unit 3 of the second group: column 3 of the layer before
    expected["1.weight"][3] = draw(1, range(9, 12))
    torch.testing.assert_close(whole(model), expected, rtol=0, atol=0)
    for state in optimizer.state.values():
        assert (state["momentum_buffer"] == 1).all()


def test_clarenas_preceding_layer_is_the_one_before_whatever_is_left_out(backend):
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)]
    model = nn.Sequential(*layers)
    options = {"replacement_rate": 1.0, "maturity_threshold": 0, "backend": backend}
    cbp = ContinualBackprop(model, rule="clarena", include="2", **options)
    before = [layer.weight.detach().clone() for layer in layers]
    model(torch.ones(1, 4))
    cbp.step()
    changed = [(layer.weight != old).sum().item() for layer, old in zip(layers, before, strict=True)]
    assert changed == [0, 4, 4, 0]


# transfer_bias


@pytest.mark.parametrize("make", [Rule.nature, Rule.gnt])
def test_bias_transfer(backend, make):
    incoming, reader = linear([[1], [1]]), linear([[1, 3], [2, -1]], [10, 20])
    cbp = attach(backend, (incoming, reader), rule=make(transfer_bias=True), replacement_rate=0.5)
    # abs sums 3, 4; y 12, 8. The mean of unit 1 is 2 (m_h = 1, divided by 1 - 1 / 2)
    feed(reader, [[4, 1], [4, 3]])
    cbp.step()
    assert reader.bias.tolist() == [10 + 3 * 2, 20 - 1 * 2]
    assert reader.weight.tolist() == [[1, 0], [2, 0]]


def test_bias_transfer_of_all_units_and_readers(backend):
    incoming, one, other = linear([[1], [1]]), linear([[1, 3]], [10]), linear([[2, -1]], [20])
    cbp = attach(backend, (incoming, [one, other]), rule=Rule.nature(transfer_bias=True), replacement_rate=1)
    feed(one, [[4, 2]])
    feed(other, [[5, 3]])
    cbp.step()
    # each reader with the h it saw
    assert (one.bias.item(), other.bias.item()) == (10 + 4 + 6, 20 + 10 - 3)


def test_bias_transfer_skips_a_reader_without_a_bias(backend):
    incoming, one, other = linear([[1], [1]]), linear([[1, 3]]), linear([[2, -1]], [20])
    cbp = attach(backend, (incoming, [one, other]), rule=Rule.nature(transfer_bias=True), replacement_rate=1)
    feed(one, [[4, 2]])
    feed(other, [[5, 3]])
    cbp.step()
    assert other.bias.item() == 20 + 10 - 3


def test_bias_transfer_of_a_flattened_unit_takes_each_column_by_itself(backend):
    conv, reader = linear([[[1.0]]] * 2), linear([[1, 2, 9, 9], [-1, 3, 9, 9]], [10, 20])
    cbp = attach(backend, (conv, reader), rule=Rule.nature(transfer_bias=True), replacement_rate=0.5)
    feed(reader, [[4, 5, 6, 7]])
    cbp.step()
    assert reader.bias.tolist() == [10 + 1 * 4 + 2 * 5, 20 - 1 * 4 + 3 * 5]


def test_bias_transfer_into_a_convolution_sums_its_positions(backend):
    conv, reader = linear([[[1.0]]] * 2), linear([[[1, 2], [9, 9]], [[-1, 4], [9, 9]]], [10, 20])
    cbp = attach(backend, (conv, reader), rule=Rule.nature(transfer_bias=True), replacement_rate=0.5)
    feed(reader, [[[4, 4, 4], [9, 9, 9]]])
    cbp.step()
    assert reader.bias.tolist() == [10 + (1 + 2) * 4, 20 + (-1 + 4) * 4]


def test_bias_transfer_into_a_grouped_convolution_stays_in_the_group(backend):
    conv, reader = linear([[[1.0]]] * 4), nn.Conv1d(4, 4, 1, groups=2).double()
    reader.weight.data.copy_(torch.tensor([[5, 5], [5, 5], [5, 1], [5, 2]]).view(4, 2, 1))
    reader.bias.data.copy_(torch.tensor([10, 20, 30, 40]))
    cbp = attach(backend, (conv, reader), rule=Rule.nature(transfer_bias=True), replacement_rate=0.25)
    feed(reader, [[[4.0], [4.0], [4.0], [3.0]]])
    cbp.step()
    assert cbp.last_replaced["0"].tolist() == [3]
    assert reader.bias.tolist() == [10, 20, 30 + 1 * 3, 40 + 2 * 3]


def test_bias_of_a_replaced_unit_is_zero_whatever_was_transferred(backend):
    first, middle, last = linear([[1.0]] * 2, [1.0] * 2), linear([[1.0] * 2] * 2, [10.0, 20.0]), linear([[1.0] * 2])
    rule = Rule.nature(transfer_bias=True)
    cbp = attach(backend, (first, middle), (middle, last), rule=rule, replacement_rate=0.5)
    feed(middle, [[1, 2]])
    feed(last, [[2, 1]])
    cbp.step()
    assert [units.tolist() for units in cbp.last_replaced.values()] == [[0], [1]]
    assert middle.bias.tolist() == [10 + 1, 0]


def test_a_transfer_that_is_not_finite_adds_nothing(backend):
    incoming, reader = linear([[1], [1]]), linear([[1, 3], [2, 1]], [10, 20])
    cbp = attach(backend, (incoming, reader), rule=Rule.nature(transfer_bias=True))
    feed(reader, [[4, 2]])
    cbp.step()
    with torch.no_grad():
        reader.weight[0, 1] = INF
    cbp.replacement_rate = 0.5
    # unit 1 is held at age 1, but its mean goes on: 2 / 2 / 2 + 2 / 2 = 1.5, and h_hat = 1.5 / (1 - 1 / 2)
    feed(reader, [[4, 2]])
    cbp.step()
    assert cbp.last_replaced["0"].tolist() == [1]
    assert reader.bias.tolist() == [10, 20 + 1 * 3]


def test_a_transfer_that_overflows_the_bias_adds_nothing(backend):
    incoming = linear([[1], [1]], dtype=torch.float16)
    reader = linear([[1, 100], [1, 1]], [60000, 1], dtype=torch.float16)
    cbp = attach(backend, (incoming, reader), rule=Rule.nature(transfer_bias=True), replacement_rate=0.5)
    # 60000 + 100 * 100 is beyond float16
    feed(reader, [[30000, 100]])
    cbp.step()
    assert cbp.last_replaced["0"].tolist() == [1]
    assert reader.bias.tolist() == [60000, 1 + 100]


@pytest.mark.parametrize("steps", [1, 3])
def test_bias_correction_is_exact_for_a_slow_decay(backend, steps):
    incoming, reader = linear([[1]]), linear([[1]], [0])
    cbp = attach(backend, (incoming, reader), rule=Rule.nature(transfer_bias=True), decay_rate=0.99999)
    for step in range(steps):
        cbp.replacement_rate = float(step == steps - 1)
        feed(reader, [[3.0]])
        cbp.step()
    # the mean is 3 from the beginning, so h_hat is; 1 - 0.99999 ** age loses 3 digits more in float32
    assert reader.bias.item() == pytest.approx(3, rel=1e-13)


# optimizer state

OPTIMIZERS = {
    "SGD momentum": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "RMSprop centered": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=1.0),
}


def train(model, optimizer, generator):
    # large targets: no gradient is 0 by accident, and none small enough to vanish when squared
    x = torch.randn(8, 5, generator=generator)
    model(x).sub(100).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("reset", [True, False], ids=["reset", "kept"])
def test_optimizer_state_of_a_unit_is_zeroed_and_no_other(backend, make, reset):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Softplus(), nn.Linear(4, 3))
    optimizer = make(model.parameters())
    before = {}
    optimizer.register_step_post_hook(
        lambda *_: before.update({p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()})
    )
    cbp = ContinualBackprop(
        model,
        optimizer,
        rule=Rule.gnt(reset_optimizer=reset),
        replacement_rate=0.3,
        maturity_threshold=2,
        backend=backend,
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        train(model, optimizer, generator)
    (unit,) = cbp.last_replaced["0"].tolist()

    rows = {model[0].weight, model[0].bias, model[1].weight, model[1].bias}
    for parameter, slots in optimizer.state.items():
        mine = torch.zeros_like(parameter, dtype=torch.bool)
        if parameter in rows:
            mine[unit] = True
        elif parameter is model[3].weight:
            mine[:, unit] = True
        assert any(slot.shape == parameter.shape for slot in slots.values())
        for key, slot in slots.items():
            expected = before[parameter][key]
            if reset and slot.shape == parameter.shape:
                if parameter is not model[0].bias:  # a bias before a batch norm has no gradient but noise
                    assert (expected[mine] != 0).all()
                expected = expected.masked_fill(mine, 0)
            assert torch.equal(slot, expected), key


def test_optimizer_state_between_two_replaced_units_is_zero(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
    cbp = ContinualBackprop(model, optimizer, replacement_rate=0.3, maturity_threshold=0, backend=backend)
    train(model, optimizer, torch.Generator().manual_seed(1))
    (column,), (row,) = (units.tolist() for units in cbp.last_replaced.values())
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[row], expected[:, column] = True, True
    assert torch.equal(optimizer.state[model[2].weight]["momentum_buffer"] == 0, expected)
