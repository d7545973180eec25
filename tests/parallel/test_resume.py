"""Runs that stop and go on: through torch.distributed.checkpoint, on as many processes or others, and after a kill."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from processes import launch, run
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from training import Run, attach, batches, differences, everything, network, spread


class _Training:
    """A run that torch.distributed.checkpoint can save: model and optimizer as its helpers have them."""

    def __init__(self, size, way):
        self.model, self.parts, self.part = spread(network((10, 7)), way, size)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        self.cbp = attach(self.model, self.optimizer, Run())

    def state_dict(self):
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def step(self, x, y):
        self.optimizer.zero_grad()
        nn.functional.mse_loss(self.model(x.chunk(self.parts)[self.part]), y.chunk(self.parts)[self.part]).backward()
        self.optimizer.step()

    def everything(self):
        return everything(self.model, self.optimizer, self.cbp)


def _save_and_go_on(rank, size, folder):
    training = _Training(size, "fsdp")
    found = []
    for step, (x, y) in enumerate(batches(14)):
        training.step(x, y)
        if step == 9:
            checkpoint.save({"training": training, "cbp": training.cbp}, checkpoint_id=folder)
            found.append(training.everything())
    return *found, training.everything()


def _resume(rank, size, folder):
    training = _Training(size, "fsdp")
    checkpoint.load({"training": training, "cbp": training.cbp}, checkpoint_id=folder)
    found = training.everything()
    for x, y in list(batches(14))[10:]:
        training.step(x, y)
    return found, training.everything()


@pytest.mark.slow
def test_saved_by_four_and_resumed_by_four_two_and_one(tmp_path):
    folder = str(tmp_path / "checkpoint")
    ((at_10, at_14), *_) = run(4, _save_and_go_on, folder, folder=tmp_path / "save")
    assert at_10["0 num_replaced"] > 2
    for size in (4, 2, 1):
        for resumed, end in run(size, _resume, folder, folder=tmp_path / str(size)):
            assert differences(at_10, resumed) == []
            assert end["step"] == 14
            if size == 4:
                assert differences(at_14, end) == []


def _train_and_die(rank, size, folder, kill):
    model = network((12, 8))
    wrapped = nn.parallel.DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    cbp = attach(wrapped, optimizer, Run())
    path = f"{folder}/checkpoint"
    start = 0
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        start = saved["step"]
        for part, state in zip((model, optimizer, cbp), saved["states"], strict=True):
            part.load_state_dict(state)
    for step, (x, y) in enumerate(batches(40)):
        if step < start:
            continue
        if step == 33 and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        nn.functional.mse_loss(wrapped(x.chunk(size)[rank]), y.chunk(size)[rank]).backward()
        optimizer.step()
        if step == 29 and kill:
            if rank == 0:
                torch.save({"step": 30, "states": [part.state_dict() for part in (model, optimizer, cbp)]}, path)
            dist.barrier()
    return start, everything(wrapped, optimizer, cbp)


@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_run_goes_on_bit_for_bit(size, tmp_path):
    whole = run(size, _train_and_die, str(tmp_path), False, folder=tmp_path / "whole")
    assert launch(size, _train_and_die, str(tmp_path), True, folder=tmp_path / "killed") == [None] * size
    resumed = run(size, _train_and_die, str(tmp_path), False, folder=tmp_path / "resumed")
    for (_, expected), (start, found) in zip(whole, resumed, strict=True):
        assert start == 30
        assert differences(expected, found) == []
