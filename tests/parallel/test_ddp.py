"""DistributedDataParallel: the copies of the model stay equal bit for bit."""

import contextlib
import os
import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from processes import launch, run
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from training import IN, ONE_PROCESS, OUT, Run, attach, batches, differences, everything, network, spread, train

from cbp_fast import CBPLinear, ContinualBackprop, Rule, UnitGroup
from cbp_fast.parallel import processes as distributed

RULES = {
    "nature": Rule.nature(transfer_bias=True),
    "centred": Rule.gnt("adaptable_contribution", transfer_bias=True),
    "coin": Rule.gnt("random", accumulate=False),
    "clarena": Rule.clarena(),
}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("rule", RULES)
def test_ranks_are_equal_bit_for_bit(rule, backend, tmp_path):
    # the units due in a step are truncated by one of the rules
    plan = Run(rule=RULES[rule], backend=backend, replacement_rate=0.2, model=(12, 6))
    (one, log), (other, _) = run(2, train, plan, folder=tmp_path)
    assert sum(len(units) for step in log for units in step.values()) > 20
    assert differences(one, other) == []


def test_four_ranks_choose_as_one_process(tmp_path):
    _, alone = train(0, 1, Run(way=ONE_PROCESS))
    (one, log), *others = run(4, train, Run(), folder=tmp_path)
    assert log == alone
    assert all(differences(one, other) == [] for other, _ in others)


class _Nothing:
    def wait(self):
        """Nothing was asked of the others."""


@pytest.mark.parametrize("rule", ["nature", "clarena"])
def test_one_launch_more_with_triton(rule, tmp_path):
    # in Triton's interpreter, which is slow
    plan = Run(rule=RULES[rule] if rule == "clarena" else Rule.nature(), backend="triton", model=(7, 5), steps=8)
    plan = replace(plan, replacement_rate=0.2)
    (one, log), (other, _) = run(2, train, plan, folder=tmp_path)
    assert differences(one, other) == []
    (_, compiled), _ = run(2, train, replace(plan, backend="cpp"), folder=tmp_path / "compiled")
    assert log == compiled
    assert sum(len(units) for step in log for units in step.values()) > 3


def _train_apart(rank, size, plan):
    distributed.Processes.reduce_ = lambda processes, flat: _Nothing()
    return train(rank, size, plan)


def test_without_the_reduction_ranks_drift_apart(tmp_path):
    (one, log), (other, other_log) = run(2, _train_apart, Run(), folder=tmp_path)
    assert log != other_log
    assert "0.weight" in differences(one, other)


OPTIONS = {
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "views of buckets": {"gradient_as_bucket_view": True},
}


def _train_wrapped(rank, size, options, when, accumulate, capture):
    plan = Run(capture=capture)
    model = network(plan.model)
    ddp = DistributedDataParallel(model, **options) if when == "after" else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    cbp = attach(ddp, optimizer, plan)
    if when == "before":
        ddp = DistributedDataParallel(model, **options)
    for step, (x, y) in enumerate(batches(20)):
        last = step % 2 == 1 or not accumulate
        with contextlib.nullcontext() if last else ddp.no_sync():
            # ranks have batches of different sizes
            part = slice(0, 5) if rank == 0 else slice(5, None)
            nn.functional.mse_loss(ddp(x[part]), y[part]).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    assert sum(cbp.num_replaced.values()) > (5 if accumulate else 15)
    return everything(ddp, optimizer, cbp)


@pytest.mark.parametrize("capture", ["deferred", "inline"])
@pytest.mark.parametrize(
    ("options", "when", "accumulate"),
    [("static graph", "before", False), ("unused parameters", "after", True), ("views of buckets", "after", False)],
)
def test_options_of_the_wrapper(options, when, accumulate, capture, tmp_path):
    one, other = run(2, _train_wrapped, OPTIONS[options], when, accumulate, capture, folder=tmp_path)
    assert differences(one, other) == []


def _train_from_different_weights(rank, size):
    model = network((12, 8))
    torch.manual_seed(rank)
    for layer in model[::2]:
        layer.reset_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cbp = attach(model, optimizer, Run(rule=Rule.nature(init="as_attached")))
    # gives all ranks the weights of the first
    ddp = DistributedDataParallel(model)
    for x, y in batches(12):
        optimizer.zero_grad()
        nn.functional.mse_loss(ddp(x.chunk(size)[rank]), y.chunk(size)[rank]).backward()
        optimizer.step()
    assert sum(cbp.num_replaced.values()) > 5
    return everything(ddp, optimizer, cbp)


def test_new_weights_have_the_spread_of_those_of_the_first_rank(tmp_path):
    one, other = run(2, _train_from_different_weights, folder=tmp_path)
    assert differences(one, other) == []


def _one_step(rank, size, sizes):
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -2.0]]))
    model = nn.Sequential(nn.Linear(3, 2), layer)
    cbp = ContinualBackprop(model, groups=UnitGroup("g", "0", "1"), decay_rate=0.0)
    if sizes[rank]:
        layer(torch.full((sizes[rank], 2), float(rank + 1)))
    cbp.step()
    return cbp.utility["g"].tolist(), cbp.age["g"].tolist()


@pytest.mark.parametrize("sizes", [(1, 3), (0, 2), (0, 0)], ids=str)
def test_the_mean_is_over_the_samples_of_all_ranks(sizes, tmp_path):
    samples = sum(sizes)
    mean = (sizes[0] * 1 + sizes[1] * 2) / max(samples, 1)
    # a step without a sample anywhere is none
    expected = ([mean * 0.5, mean * 2.0], [1, 1]) if samples else ([0.0, 0.0], [0, 0])
    assert run(2, _one_step, sizes, folder=tmp_path) == [expected, expected]


def _train_branches(rank, size):
    torch.manual_seed(1)
    branches = nn.ModuleDict({name: nn.Sequential(nn.Linear(IN, 6), nn.ReLU(), nn.Linear(6, OUT)) for name in "ab"})

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = branches

        def forward(self, x, names):
            return sum(self.branches[name](x) for name in names)

    model = Branches()
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    groups = [UnitGroup(name, f"branches.{name}.0", f"branches.{name}.2") for name in "ab"]
    cbp = ContinualBackprop(ddp, optimizer, groups=groups, replacement_rate=0.0)
    for step, (x, y) in enumerate(batches(9)):
        # b is used by the second rank alone, and in every third step
        names = "ab" if rank == 1 and step % 3 == 0 else "a"
        optimizer.zero_grad()
        nn.functional.mse_loss(ddp(x, names), y).backward()
        optimizer.step()
    return everything(ddp, optimizer, cbp)


def test_a_layer_that_some_ranks_use_in_some_steps(tmp_path):
    one, other = run(2, _train_branches, folder=tmp_path)
    assert differences(one, other) == []
    assert one["a age"].tolist() == [9] * 6
    assert one["b age"].tolist() == [3] * 6


def _train_uneven(rank, size, enabled):
    model = network((12, 8))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    cbp = attach(ddp, optimizer, Run())
    cbp.enabled = enabled
    with Join([ddp, cbp]):
        for x, y in batches(10 if rank == 0 else 14):
            optimizer.zero_grad()
            nn.functional.mse_loss(ddp(x), y).backward()
            optimizer.step()
    return everything(ddp, optimizer, cbp)


@pytest.mark.parametrize("enabled", [True, False])
def test_processes_that_run_out_of_data_at_different_times(enabled, tmp_path):
    one, other = run(2, _train_uneven, enabled, folder=tmp_path)
    assert one["step"] == (14 if enabled else 0)
    assert differences(one, other) == []


def _count(rank, size):
    calls, reduce = [], dist.all_reduce

    def counted(tensor, **options):
        calls.append((tensor.dtype, tensor.numel()))
        return reduce(tensor, **options)

    dist.all_reduce = counted
    _, log = train(rank, size, Run(steps=10))
    assert any(units for step in log for units in step.values())
    return calls


def test_a_step_takes_one_collective(tmp_path):
    # a count for each of two readers, a sum for each of 12 + 8 units; every rank has all weights
    assert run(2, _count, folder=tmp_path) == [[(torch.float64, 22)] * 10] * 2


def _overlapped(rank, size, how):
    model = network((12, 8))
    ddp = DistributedDataParallel(model)
    # SGD keeps nothing that a step by hand would not reset
    halves = [list(model[i].parameters()) for i in (0, 2, 4)]
    if how == "two optimizers":
        optimizers = [torch.optim.SGD(part, lr=0.05) for part in (halves[0], halves[1] + halves[2])]
    else:
        optimizers = [torch.optim.SGD(ddp.parameters(), lr=0.05, fused=how == "skipped")]
    cbp = attach(ddp, None if how == "by hand" else optimizers, Run())
    early, reduce = [], dist.all_reduce

    def observed(tensor, **options):
        # weights after the backward pass are those before the update
        early.append(torch.equal(model[2].weight, before))
        return reduce(tensor, **options)

    dist.all_reduce = observed
    for step, (x, y) in enumerate(batches(20)):
        before = model[2].weight.detach().clone()
        x, y = x.chunk(size)[rank], y.chunk(size)[rank]

        def loss(x=x, y=y):
            ddp.zero_grad()
            value = nn.functional.mse_loss(ddp(x), y)
            value.backward()
            return value

        if how == "closure":
            optimizers[0].step(loss)
            continue
        loss()
        if step == 5 and (how == "failing" or (how == "failing alone" and rank == 0)):
            hook = optimizers[0].register_step_pre_hook(lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                optimizers[0].step()
            hook.remove()
        if how == "skipped" and step == 5:
            # as GradScaler does where a gradient was not finite
            optimizers[0].grad_scale, optimizers[0].found_inf = torch.ones(()), torch.ones(())
            optimizers[0].step()
            del optimizers[0].grad_scale, optimizers[0].found_inf
            # its forward counts for nothing, and the batch is tried again
            loss()
        for optimizer in optimizers:
            optimizer.step()
        if how == "by hand":
            cbp.step()
    return early, everything(ddp, optimizers[0], cbp)


def test_sums_are_reduced_while_the_optimizer_works(tmp_path):
    results = {}
    for how in ("by hand", "overlapped", "closure", "two optimizers", "failing", "failing alone", "skipped"):
        (early, one), (_, other) = run(2, _overlapped, how, folder=tmp_path / how)
        assert differences(one, other) == []
        # the first of two optimizers does not move this weight
        assert early == [how not in ("by hand", "closure")] * (20 + (how == "skipped"))
        results[how] = one
    assert results["by hand"]["0 num_replaced"] > 10
    for how in results:
        assert differences(results["by hand"], results[how]) == [], how


def _after_a_skipped_step(rank, size, backend, capture, then):
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -2.0]]))
    model = nn.Sequential(nn.Linear(3, 2), layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)
    options = {"decay_rate": 0.0, "backend": backend, "capture": capture}
    cbp = ContinualBackprop(model, optimizer, groups=UnitGroup("g", "0", "1"), **options)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    layer(torch.full((2, 2), 1.0))
    optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.ones(())
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    layer(torch.full((2, 2), 3.0))
    {"step": optimizer.step, "closure": lambda: optimizer.step(lambda: None), "by hand": cbp.step}[then]()
    return cbp.utility["g"].tolist()


@pytest.mark.parametrize("then", ["step", "closure", "by hand"])
@pytest.mark.parametrize(("backend", "capture"), [("cpp", "deferred"), ("cpp", "inline"), ("reference", "deferred")])
def test_forwards_of_a_skipped_step_do_not_count(backend, capture, then, tmp_path):
    assert run(2, _after_a_skipped_step, backend, capture, then, folder=tmp_path) == [[1.5, 6.0]] * 2


def _fail_to_reset(rank, size, backend, begun):
    model = network((12, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cbp = attach(model, optimizer, Run(backend=backend, replacement_rate=0.3))
    for x, y in batches(6):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    nn.functional.mse_loss(model(x), y).backward()
    before = everything(model, optimizer, cbp)
    weight = model[0].weight
    optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight).to_sparse()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="must be dense"):
        optimizer.step() if begun else cbp.step()
    del optimizer.state[weight]["momentum_buffer"]
    changed = differences(before, everything(model, optimizer, cbp))
    replaced = sum(cbp.num_replaced.values())
    cbp.step()
    return changed, sum(cbp.num_replaced.values()) - replaced


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_step_that_cannot_reset_leaves_its_forwards_for_the_next(backend, begun, tmp_path):
    for changed, replaced in run(2, _fail_to_reset, backend, begun, folder=tmp_path):
        assert changed == []
        assert replaced > 0


def _replaced_moments(rank, size):
    model, *_ = spread(network((12, 8)), "ddp", size)
    optimizer = torch.optim.Adam(model.parameters())
    cbp = attach(model, optimizer, Run())
    replaced = 0
    for x, y in batches(8):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        layers = model.module
        for units, incoming, outgoing in (
            (cbp.last_replaced[g.name], layers[i], layers[i + 2]) for i, g in ((0, cbp.groups[0]), (2, cbp.groups[1]))
        ):
            for key in ("exp_avg", "exp_avg_sq"):
                assert not optimizer.state[incoming.weight][key][units].any()
                assert not optimizer.state[incoming.bias][key][units].any()
                assert not optimizer.state[outgoing.weight][key][:, units].any()
                assert optimizer.state[outgoing.weight][key].any()
            replaced += len(units)
    return replaced


def test_moments_of_what_was_replaced_are_zero(tmp_path):
    assert min(run(2, _replaced_moments, folder=tmp_path)) > 5


def _fresh_optimizer(rank, size):
    model, *_ = spread(network((12, 8)), "ddp", size)
    optimizer = torch.optim.Adam(model.parameters())
    cbp = attach(model, optimizer, Run())
    before = everything(model, optimizer, cbp)
    # initialises the optimizer's state by a step with gradients of zero
    get_optimizer_state_dict(model, optimizer)
    after = everything(model, optimizer, cbp)
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_a_step_that_only_makes_the_optimizers_state_is_none(tmp_path):
    assert run(2, _fresh_optimizer, folder=tmp_path) == [[], []]


def _attach_differently(rank, size, what):
    model = network((12, 9) if what == "network" and rank == 1 else (12, 8))
    if what == "dtype" and rank == 1:
        model.double()
    options = {"replacement_rate": 0.1}
    options |= {
        "seed": {"seed": 3 + rank},
        "default seed": {} if rank else {"seed": 3},
        "rule": {"rule": "nature" if rank == 0 else "gnt"},
        "rate": {"replacement_rate": 0.1 * (rank + 1)},
        "groups": {"exclude": "0" if rank == 0 else "2"},
    }.get(what, {})
    with pytest.raises(ValueError, match="the processes differ") as error:
        ContinualBackprop(model, **options)
    return str(error.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "network",
            r"parameters\['2.weight'\] is \(\(8, 12\), 'torch.float32'\) on rank 0 and \(\(9, 12\), .* on rank 1",
        ),
        ("dtype", r"parameters\['0.weight'\] is .*float32'\) on rank 0 and .*float64'\) on rank 1"),
        ("groups", r"parameters\['\d.weight'\] is .* on rank 0 and None on rank 1"),
        ("seed", "seed is 3 on rank 0 and 4 on rank 1"),
        ("default seed", "seed is 3 on rank 0 and None on rank 1"),
        ("rule", r"rule is Rule\(name='nature'.* on rank 0 and Rule\(name='gnt'.* on rank 1"),
        ("rate", "replacement_rate is 0.1 on rank 0 and 0.2 on rank 1"),
    ],
)
def test_a_rank_that_attached_something_else_is_named(what, message, tmp_path):
    for error in run(2, _attach_differently, what, folder=tmp_path):
        assert re.search(message, error)


def _default_seed(rank, size):
    model = network((12, 8))
    torch.manual_seed(100 + rank)
    return attach(model, None, Run(seed=None)).state_dict()["seed"]


def test_the_default_seed_is_that_of_the_first_rank(tmp_path):
    assert run(2, _default_seed, folder=tmp_path) == [100, 100]


def _alone(rank, size):
    groups = [dist.new_group([r]) for r in range(size)]
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 4 + rank), nn.ReLU(), nn.Linear(4 + rank, 2))
    cbp = ContinualBackprop(model, process_group=groups[rank])
    model(torch.ones(2, 3))
    if rank == 0:
        cbp.step()
    return cbp.age["0"].tolist()


def test_a_group_of_one_process_trains_by_itself(tmp_path):
    assert run(2, _alone, folder=tmp_path) == [[1] * 4, [0] * 5]


def _die(rank, size):
    model = network((12, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cbp = attach(model, optimizer, Run())
    for step, (x, y) in enumerate(batches(8)):
        nn.functional.mse_loss(model(x), y).backward()
        if step < 7:
            optimizer.step()
    if rank == 1:
        os._exit(1)
    before = everything(model, optimizer, cbp)
    with pytest.raises(RuntimeError) as error:
        cbp.step()
    dist.destroy_process_group()
    return str(error.value), differences(before, everything(model, optimizer, cbp))


def test_a_dead_peer_leaves_nothing_half_done(tmp_path):
    survivor, dead = launch(2, _die, folder=tmp_path)
    assert dead is None
    finished, (message, changed) = survivor
    assert finished
    assert "cbp_fast" not in message
    assert changed == []


def _layers(rank, size):
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)
    layer = CBPLinear(first, second)
    with pytest.raises(RuntimeError, match="CBPLinear works in one process; attach a ContinualBackprop instead"):
        layer(torch.ones(2, 4))


def test_layers_refuse_several_processes(tmp_path):
    run(2, _layers, folder=tmp_path)
