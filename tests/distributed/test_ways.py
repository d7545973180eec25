"""Every way of spreading a model over processes gives what one process gives."""

from dataclasses import replace

import pytest
import torch
from processes import run
from training import ONE_PROCESS, Run, differences, train

WAYS = [
    ("ddp", 2, (12, 8)),
    ("fsdp", 2, (12, 8)),
    ("fsdp", 4, (10, 7)),
    ("hsdp", 4, (10, 7)),
    ("tp", 2, (12, 8)),
    ("ddp x tp", 4, (12, 8)),
    ("fsdp x tp", 4, (12, 8)),
]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(("way", "size", "hidden"), WAYS, ids=str)
def test_without_learning_all_parameters_are_those_of_one_process(way, size, hidden, backend, tmp_path):
    plan = Run(way, hidden, learning_rate=0.0, backend=backend)
    alone, log = train(0, 1, replace(plan, way=ONE_PROCESS))
    assert sum(len(units) for step in log for units in step.values()) > 20
    for theirs, their_log in run(size, train, plan, folder=tmp_path):
        assert their_log == log
        utilities = [name for name in differences(alone, theirs) if not name.endswith("utility")]
        # moments are of gradients, which ranks average
        assert [name for name in utilities if "exp_avg" not in name] == []
        torch.testing.assert_close(theirs, alone, rtol=1e-4, atol=1e-6)
