"""The utility of each rule, worked out by hand in comments, on both backends."""

import pytest
import torch
from by_hand import INF, NAN, Units, attach, feed, linear, near
from torch import nn

from cbp_fast import Rule

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
