"""Discovery takes a moment."""

import time

import networks
import pytest
import torch
from torch import nn

from cbp_fast.discovery import find_unit_groups


def seconds(function):
    best = []
    for _ in range(5):
        start = time.process_time()
        function()
        best.append(time.process_time() - start)
    return min(best)


def test_discovery_is_fast():
    model = nn.Sequential(nn.Linear(784, 2000), nn.ReLU(), nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 10))
    assert len(find_unit_groups(model)) == 2
    assert seconds(lambda: find_unit_groups(model, torch.zeros(2, 784))) < 0.1
    assert seconds(lambda: find_unit_groups(model)) < 0.2


@pytest.mark.slow
def test_discovery_of_large_networks_is_fast():
    resnet, gpt = networks.resnet18(64), networks.GPT(1000, 768, 12, 12, 64)
    assert seconds(lambda: find_unit_groups(resnet, torch.zeros(2, 3, 32, 32), include_coupled=True)) < 2
    assert seconds(lambda: find_unit_groups(gpt, torch.zeros(2, 16, dtype=torch.int64), include_coupled=True)) < 2
