"""Every way of spreading a model over processes gives what one process gives."""

from dataclasses import replace

import pytest
import torch
from processes import run
from training import CONVOLUTIONS, ONE_PROCESS, Run, differences, train

from cbp_fast import Rule

SHORT = [("fsdp", 2, (10, 7)), ("tp", 2, (12, 8)), ("ddp x tp", 4, (12, 8))]
WAYS = [
    ("ddp", 2, (12, 8)),
    ("fsdp", 2, (12, 8)),
    ("fsdp", 4, (10, 7)),
    ("fsdp", 2, CONVOLUTIONS),
    ("hsdp", 4, (10, 7)),
    ("tp", 2, (12, 8)),
    ("ddp x tp", 4, (12, 8)),
    ("fsdp x tp", 4, (12, 8)),
]
CENTRED = Rule.gnt("adaptable_contribution")


def compare(size, plan, folder):
    """Without learning, nothing but what is drawn anew moves: what is summed in parts must lead to the same units."""
    alone, log = train(0, 1, replace(plan, way=ONE_PROCESS))
    assert sum(len(units) for step in log for units in step.values()) > plan.steps // 2
    for theirs, their_log in run(size, train, plan, folder=folder):
        assert their_log == log
        # sums and gradients are rounded in another order
        rounded = [name for name in differences(alone, theirs) if "exp_avg" not in name]
        assert all(name.endswith(("utility", "running_mean")) for name in rounded)
        torch.testing.assert_close(theirs, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("way", "size", "model"), SHORT, ids=str)
def test_without_learning_all_parameters_are_those_of_one_process(way, size, model, tmp_path):
    compare(size, Run(way, model, steps=12, learning_rate=0.0), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Rule.nature(), CENTRED], ids=lambda rule: rule.utility)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("way", "size", "model"), WAYS, ids=str)
def test_without_learning_in_every_way(way, size, model, backend, rule, tmp_path):
    compare(size, Run(way, model, learning_rate=0.0, backend=backend, rule=rule), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "size", "model"), WAYS, ids=str)
def test_the_same_units_are_replaced_as_in_one_process(way, size, model, tmp_path):
    plan = Run(way, model, learning_rate=0.01)
    _, log = train(0, 1, replace(plan, way=ONE_PROCESS))
    assert [theirs for _, theirs in run(size, train, plan, folder=tmp_path)] == [log] * size
