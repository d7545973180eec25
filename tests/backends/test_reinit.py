"""What of a chosen unit is set, drawn and zeroed, and that nothing else is, on both backends."""

import math

import numpy as np
import pytest
import torch
from by_hand import SEED, attach, feed, linear, near
from torch import nn

from cbp_fast import ContinualBackprop, Rule

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
