"""The edges of the compiled backend's blocks, strides that mean nothing, every number of 16 bits."""

import numpy as np
import pytest
import torch
from group_cases import DTYPES, NAMES, Chain, Numbers, assert_same_bits
from torch import nn

from cbp_fast import ContinualBackprop, Rule, UnitGroup


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("transposed", [False, True], ids=["dense", "transposed"])
@pytest.mark.parametrize(
    ("outputs", "inputs"),
    [(511, 2047), (512, 2048), (513, 2049), (3, 4097), (1, 1023), (515, 1024), (4, 1025), (1030, 5)],
    ids=str,
)
def test_edges_of_blocks(outputs, inputs, transposed, dtype):
    results = {}
    for backend in ("cpp", "reference"):
        chain = Chain(backend, inputs, outputs, dtype)
        if transposed:
            middle = chain.model[1]
            middle.weight = nn.Parameter(middle.weight.detach().T.contiguous().T)
        numbers = Numbers(0).whole
        chain.fill(numbers)
        results[backend] = chain.step(numbers, 512)
    assert_same_bits(results)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    "order",
    [(0, 1, 2, 3), (0, 2, 3, 1), (2, 3, 0, 1), (1, 0, 2, 3)],
    ids=["dense", "channels last", "batch late", "channels first"],
)
@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 16, 33, 63), (65, 5, 1, 128), (4, 2, 2049, 1)], ids=str)
def test_edges_of_runs_along_the_positions_of_a_convolution(shape, order, dtype):
    # whole numbers, and powers of two of them: exact
    h = Numbers(0).whole(shape).to(dtype).permute(order).contiguous().permute(tuple(np.argsort(order)))
    results = {}
    for backend in ("cpp", "reference"):
        model = nn.Sequential(nn.Conv2d(1, shape[1], 1), nn.Conv2d(shape[1], 1, 1))
        options = {"replacement_rate": 0.0, "decay_rate": 0.0, "capture": "inline", "backend": backend}
        cbp = ContinualBackprop(model, rule=Rule.nature(transfer_bias=True), **options)
        cbp._engine.record(0, h)
        state = cbp._engine.state
        results[backend] = {name: getattr(state, name).clone() for name in ("count", "activation", "feature")}
    assert_same_bits(results)


@pytest.mark.parametrize("stride", [0, 1, 7])
def test_stride_of_an_axis_of_length_one_means_nothing(backend, stride):
    # numpy gives a new axis the stride 0
    weight = torch.arange(24.0).as_strided((8, 1, 3), (3, stride, 1))
    incoming, reader = nn.Conv1d(2, 1, 1), nn.Conv1d(1, 8, 3)
    reader.weight = nn.Parameter(weight)
    options = {"replacement_rate": 0.0, "decay_rate": 0.0, "backend": backend}
    cbp = ContinualBackprop(nn.Sequential(incoming, reader), groups=[UnitGroup("g", [incoming], [reader])], **options)
    cbp._engine.record(0, torch.ones(1, 1, 5))
    cbp.step()
    assert cbp.utility["g"].item() == 23 * 24 / 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=NAMES.get)
@pytest.mark.parametrize("step", [1, 2], ids=["dense", "every other"])
def test_every_number_of_16_bits_is_read_right(every_isa, dtype, step):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    h = values.repeat_interleave(step)[::step]
    model = nn.Sequential(nn.Linear(1, len(h)), nn.Linear(len(h), 1))
    cbp = ContinualBackprop(model, backend="cpp", capture="inline")
    state = cbp._engine.state

    def read():
        cbp._engine.forget_forwards()
        cbp._engine.record(0, h)
        return state.activation.clone()

    for name, sums in every_isa(read).items():
        torch.testing.assert_close(sums, values.double().abs(), rtol=0, atol=0, equal_nan=True, msg=name)
