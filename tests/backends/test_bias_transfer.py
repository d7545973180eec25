"""What a replaced unit gave on average goes into the biases of its readers, worked out by hand, on both backends."""

import pytest
import torch
from by_hand import INF, attach, feed, linear
from torch import nn

from cbp_fast import Rule


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
