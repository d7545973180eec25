"""When it steps: after the optimizer, after the last of several, when told, and not when an update was skipped."""

import math

import torch
from stream import EAGER, Stream, mlp, momentum

from cbp_fast import ContinualBackprop


def test_it_steps_after_the_optimizer(backend):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    cbp = ContinualBackprop(model, optimizer, replacement_rate=1, maturity_threshold=0, backend=backend)
    Stream(model, optimizer).train()
    # the update would have moved the zeroed weights away
    assert (model[5].weight == 0).all()
    assert cbp.state_dict()["step"] == 1


def test_without_an_optimizer_it_steps_when_told(backend, everything):
    results = []
    for hooked in (True, False):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        cbp = ContinualBackprop(model, optimizer if hooked else None, backend=backend, **EAGER)
        stream = Stream(model, optimizer)
        for _ in range(5):
            stream.train()
            if not hooked:
                cbp.step()
        results.append(everything(model, cbp))
    assert results[0] == results[1]


def test_of_several_optimizers_the_last_to_step_is_followed(backend):
    model = mlp()
    optimizers = [torch.optim.SGD(model[i:].parameters(), 0.0) for i in (0, 2, 5)]
    optimizers[0].param_groups[0]["params"] = list(model[:2].parameters())
    cbp = ContinualBackprop(model, optimizers, backend=backend)
    steps = []
    for i in (0, 0, 2, 0, 1, 2, 1, 1, 0):
        model(torch.randn(4, 6))
        optimizers[i].step()
        steps.append(cbp.state_dict()["step"])
    assert steps == [0, 0, 0, 0, 1, 1, 1, 1, 2]


def test_an_optimizer_given_twice_is_one(backend):
    model = mlp()
    optimizer = momentum(model)
    cbp = ContinualBackprop(model, [optimizer, optimizer], backend=backend)
    Stream(model, optimizer).train(3)
    assert cbp.state_dict()["step"] == 3


def test_state_of_several_optimizers_is_reset(backend):
    model = mlp()
    optimizers = [torch.optim.Adam(model[:2].parameters()), torch.optim.SGD(model[2:].parameters(), 0.1, momentum=0.9)]
    cbp = ContinualBackprop(model, optimizers, replacement_rate=1, maturity_threshold=0, backend=backend)
    Stream(model, None).loss().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert cbp.num_replaced == {"0": 16, "2": 16}
    assert (optimizers[0].state[model[0].weight]["exp_avg"] == 0).all()
    assert (optimizers[1].state[model[2].weight]["momentum_buffer"] == 0).all()


def test_a_step_skipped_by_a_grad_scaler_is_no_step(backend, everything):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    cbp = ContinualBackprop(model, optimizer, backend=backend, **EAGER)
    stream = Stream(model, optimizer)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(stream.loss() * (math.inf if step == 4 else 1)).backward()
        before = everything(model, optimizer, cbp)
        scaler.step(optimizer)
        assert (everything(model, optimizer, cbp) == before) is (step == 4)
        scaler.update()
    assert cbp.state_dict()["step"] == 5
