"""The Triton kernels' programs in any order give the same bits, and a step that was stopped leaves nothing behind."""

import itertools
import random

import pytest
import torch
from group_cases import RULES
from interleaved import Interleaved
from torch import nn
from triton_runs import engine_of

from cbp_fast import Part
from cbp_fast.backends.triton import launching

pytestmark = pytest.mark.usefixtures("interpreter")


def test_sums_that_are_split_among_programs():
    """A long sum is divided; whoever comes last puts the parts together, in their order."""
    for shape in ((600, 40), (3, 50, 7, 40), (2, 40, 9, 301)):
        spatial = len(shape) == 4 and shape[1] == 40
        results = []
        for backend in ("triton", "reference"):
            torch.manual_seed(0)
            reader = nn.Conv2d(40, 2, 1) if spatial else nn.Linear(40, 2)
            with torch.no_grad():
                reader.weight.copy_(torch.randint(-4, 5, reader.weight.shape))
            producer = nn.Conv2d(1, 40, 1) if spatial else nn.Linear(1, 40)
            cbp = engine_of([([producer], [reader])], backend=backend, replacement_rate=0.0)
            h = torch.randint(-4, 5, shape).float()
            cbp._engine.record(0, h)
            # two more, of another type and with a stride between samples
            cbp._engine.record(0, h[::2].half())
            cbp.step()
            results.append(cbp.utility["g0"])
        assert torch.equal(*results)


@pytest.mark.parametrize("change", [pytest.param(0.0, marks=pytest.mark.slow), 0.3], ids=["shuffled", "interleaved"])
def test_any_order_of_programs_gives_the_same_bits(change, monkeypatch):
    """Sums that round, several groups, splits: partial sums are combined in one order, whoever comes last."""

    def run():
        torch.manual_seed(0)
        layers = [nn.Linear(5, 140), nn.Linear(140, 30), nn.Linear(30, 300)]
        groups = [([layers[0]], [layers[1]]), ([layers[1]], [layers[2]])]
        cbp = engine_of(groups, backend="triton", replacement_rate=0.04)
        cbp._engine.record(0, torch.randn(300, 140))
        cbp._engine.record(1, torch.randn(3, 30, dtype=torch.float64))
        cbp.step()
        return [
            *cbp.utility.values(),
            *cbp.last_replaced.values(),
            *(p for layer in layers for p in layer.parameters()),
        ]

    expected = run()
    for seed in range(3):
        monkeypatch.setattr(launching, "launch", Interleaved(random.Random(seed), change).launch)
        for a, b in zip(run(), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["nature", "weight", "clarena"])
def test_the_halves_of_a_step_in_several_processes(rule, monkeypatch):
    """A slot seen twice, and with samples along more axes than a sum has: no two programs may add to one column."""
    results = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        layers = [nn.Linear(40, 5), nn.Linear(5, 40), nn.Linear(40, 2)]
        for layer in layers:
            layer.weight.data = torch.randint(-4, 5, layer.weight.shape).float()
        groups = [([layers[0]], [layers[1]]), ([layers[1]], [layers[2]])]
        cbp = engine_of(groups, RULES[rule], backend=backend, replacement_rate=0.3)
        engine = cbp._engine
        # no two axes of the first one are neighbours in memory
        h = torch.randint(-4, 5, (2, 3, 2, 2, 3, 5)).float().permute(3, 1, 4, 0, 2, 5)[..., ::2, :]
        held = [h, torch.randint(-4, 5, (300, 40)).float(), h.half()]
        weights = [ref.get().detach() for ref in engine.state.weights]
        with monkeypatch.context() as patch:
            patch.setattr(launching, "launch", Interleaved(random.Random(0), 0.3).launch)
            engine._functions.sum_(engine.state, [], held, [0, 1, 0])
            chosen = engine._functions.choose_(engine.state, weights)
        results.append([engine.state.utility, engine.state.age, *cbp.last_replaced.values(), engine.state.count])
        assert chosen == (1 if rule == "clarena" else 13)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_an_aborted_launch_does_not_poison_the_next(monkeypatch):
    results = []
    for abort in (False, True):
        torch.manual_seed(0)
        layers = [nn.Linear(5, 140), nn.Linear(140, 300)]
        cbp = engine_of([([layers[0]], [layers[1]])], backend="triton", replacement_rate=0.04)
        cbp._engine.record(0, torch.randn(400, 140))
        # half a launch is possible in an interpreter only
        cbp._engine.keep()
        if abort:
            stopped = launching.launch

            def launch(kernel, grid, args, meta, stopped=stopped):
                stopped(kernel, (grid[0] // 2,), args, meta)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(launching, "launch", launch)
                with pytest.raises(KeyboardInterrupt):
                    cbp.step()
            cbp._engine.restore()
        cbp.step()
        results.append((cbp.utility["g0"], cbp.last_replaced["g0"]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("orders", list(itertools.permutations(["unit by unit", "position by position"])), ids=str)
def test_readers_of_a_group_lie_in_orders_of_their_own(orders, monkeypatch):
    """A block of units waits for what each of its readers has of it, in whatever order the programs run."""
    units, positions = 40, 20
    strides = {"unit by unit": (positions, 1), "position by position": (1, units)}

    def run(backend):
        torch.manual_seed(0)
        producer, *readers = nn.Conv2d(3, units, 1), nn.Linear(units * positions, 3), nn.Linear(units * positions, 3)
        for layer in (producer, *readers):
            layer.weight.data.copy_(torch.randint(-3, 4, layer.weight.shape))
        read = [Part(layer, 0, positions, *strides[order]) for layer, order in zip(readers, orders, strict=True)]
        cbp = engine_of([([producer], read)], backend=backend, replacement_rate=0.1)
        for slot in range(2):
            cbp._engine.record(slot, torch.randint(-2, 3, (4, units * positions)).float())
        cbp.step()
        return [cbp.utility["g0"], cbp.last_replaced["g0"], producer.weight, *(layer.weight for layer in readers)]

    expected = run("reference")
    for seed in range(2):
        monkeypatch.setattr(launching, "launch", Interleaved(random.Random(seed), 0.0).launch)
        for a, b in zip(run("triton"), expected, strict=True):
            assert torch.equal(a, b)
