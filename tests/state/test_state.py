"""The state of a run: its counters at their ends, and where it is, whatever the caller is in."""

import pytest
import torch
from small_runs import RATES, Run, same
from torch import nn

from cbp_fast import ContinualBackprop


@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("rule", ["nature", "centred", "random"])
def test_counters_stay_at_their_ends(backend, rule):
    run = Run(backend, rule)
    cbp = run.cbp
    cbp.replacement_rate = 0.0
    saved = cbp.state_dict()
    saved["step"] = 2**63 - 2
    for group in saved["groups"].values():
        group["age"].fill_(2**31 - 2)
        group["num_replaced"] = 2**63 - 3
    cbp.load_state_dict(saved)
    for number in range(3):
        run.train([number])
    assert all(ages.tolist() == [2**31 - 1] * len(ages) for ages in cbp.age.values())
    cbp.load_state_dict(cbp.state_dict())
    cbp.maturity_threshold = 2**31 - 2
    cbp.replacement_rate = 1.0
    run.train([7])
    assert cbp.num_replaced == {"0": 2**63 - 1, "2": 2**63 - 1}
    assert cbp.state_dict()["step"] == 2**63 - 1
    assert {name: len(units) for name, units in cbp.last_replaced.items()} == {"0": 7, "2": 6}


def test_the_state_is_where_the_model_is_whatever_the_caller_is_in(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    expected = Run(backend).everything()

    def made(context):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
        groups = ContinualBackprop(model, backend=backend).groups
        torch.manual_seed(1)
        run = Run.__new__(Run)
        run.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
        run.optimizers = [torch.optim.Adam(run.model.parameters(), 0.01)]
        with context:
            run.cbp = ContinualBackprop(
                run.model, run.optimizers, groups=groups, backend=backend, capture="deferred", seed=3, **RATES
            )
        run.engines = [run.cbp._engine]
        run.train(range(3))
        return run

    for context in (torch.device("meta"), torch.inference_mode(), FakeTensorMode(allow_non_fake_inputs=True)):
        assert same(made(context).everything(), expected), context
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).float()
        cbp = ContinualBackprop(model, backend=backend)
    finally:
        torch.set_default_dtype(default)
    assert (cbp._engine.state.hyper.dtype, cbp.utility["0"].dtype) == (torch.float64, torch.float32)
