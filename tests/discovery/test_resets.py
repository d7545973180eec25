"""Replacing units that nothing reads does not move a network's output, for every network that discovery knows."""

import pytest
import torch
from known_networks import ZOO

from cbp_fast import ContinualBackprop, find_unit_groups
from cbp_fast.discovery.running.forwards import forwards
from cbp_fast.discovery.running.holding import tensors_in
from cbp_fast.discovery.verification.members import columns_of
from cbp_fast.discovery.verification.watching import Uncoupled
from cbp_fast.groups.resolving import resolve
from cbp_fast.hooks.observing import unobserved


def outputs(model, runs):
    """In eval mode, so that nothing is random; norms over features, through which units feel each other, left out."""
    model.eval()
    with torch.no_grad(), Uncoupled():
        return [tensor for run in runs for _, tensor in tensors_in(run(model))]


@pytest.mark.parametrize("name", [name for name, (_, _, groups) in ZOO.items() if groups])
def test_the_output_stays_where_it_was(name, backend):
    torch.manual_seed(0)
    make, inputs, _ = ZOO[name]
    model, runs = make(), forwards(inputs)
    # llama's own norm, which is written out, lets the units of its stream feel each other
    groups = find_unit_groups(model, inputs, include_coupled=name != "llama")
    # half of the units of every group are read by no one, so they are of least utility, and half are replaced
    with torch.no_grad():
        for group in (resolve(model, group) for group in groups):
            for member in group.outgoing:
                weight, index = columns_of(member, torch.arange(group.num_units // 2))
                weight[index] = 0
    model.train()
    cbp = ContinualBackprop(
        model, groups=groups, replacement_rate=0.5, maturity_threshold=0, decay_rate=0.5, backend=backend
    )
    for run in runs:
        run(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = outputs(model, runs)
    cbp.step()
    replaced = {group: sorted(units.tolist()) for group, units in cbp.last_replaced.items()}
    for group, units in replaced.items():
        num_units = len(cbp.age[group])
        assert len(units) == num_units // 2
    assert any(replaced.values())
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with unobserved():
        torch.testing.assert_close(outputs(model, runs), expected, rtol=1e-4, atol=1e-5)
