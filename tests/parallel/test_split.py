"""Models whose parameters are split: what is reset where, and what is refused."""

import pytest
import torch
from processes import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from training import Run, attach, batches, differences, everything, network, spread, whole

from cbp_fast import ContinualBackprop, Rule, UnitGroup


def _check_reset(model, cbp, state):
    """Moments of what belongs to replaced units are zero, and so are the columns that no other group drew anew."""
    first, second, last = (layer for layer in model if isinstance(layer, nn.Linear))
    units, later = cbp.last_replaced["0"], cbp.last_replaced["2"]
    kept = torch.ones(second.weight.shape[0], dtype=torch.bool)
    kept[later] = False
    assert not whole(second.weight)[kept][:, units].any()
    assert not whole(last.weight)[:, later].any()
    for layer, rows, columns in ((first, units, []), (second, later, units), (last, [], later)):
        for key in ("exp_avg", "exp_avg_sq"):
            moment = whole(state[layer.weight][key])
            assert moment.any()
            assert not moment[rows].any()
            assert not moment[:, columns].any()
            assert not whole(state[layer.bias][key])[rows].any()
    return len(units) + len(later)


OPTIONS = {
    "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)},
    "kept whole after the forward": {"reshard_after_forward": False},
    "accumulation": {},
    "split by column": {"shard_placement_fn": lambda p: Shard(p.dim() - 1)},
}


def _train_fsdp(rank, size, name):
    model = network((12, 8))
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, **OPTIONS[name])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    cbp = attach(model, optimizer, Run(replacement_rate=0.2))
    replaced = 0
    for step, (x, y) in enumerate(batches(14)):
        last = name != "accumulation" or step % 2 == 1
        model.set_requires_gradient_sync(last)
        # parameters that stay whole between two backward passes are not those that the optimizer holds
        model.set_reshard_after_backward(last)
        nn.functional.mse_loss(model(x.chunk(size)[rank]).float(), y.chunk(size)[rank]).backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
            replaced += _check_reset(model, cbp, optimizer.state)
    assert replaced > 3
    return everything(model, optimizer, cbp)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_fully_shard(options, tmp_path):
    one, other = run(2, _train_fsdp, options, folder=tmp_path)
    assert differences(one, other) == []


def _train_and_check(rank, size, way):
    model, parts, part = spread(network((12, 8)), way, size)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    cbp = attach(model, optimizer, Run(replacement_rate=0.2))
    replaced = 0
    for x, y in batches(6):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x.chunk(parts)[part]), y.chunk(parts)[part]).backward()
        optimizer.step()
        replaced += _check_reset(model, cbp, optimizer.state)
    return replaced


@pytest.mark.parametrize(("way", "size"), [("fsdp", 2), ("tp", 2)])
def test_moments_of_what_was_replaced_are_zero(way, size, tmp_path):
    assert min(run(size, _train_and_check, way, folder=tmp_path)) > 5


def _train_zero(rank, size):
    # its import warns
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = DistributedDataParallel(network((12, 8)))
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.05)
    cbp = attach(model, optimizer, Run())
    for x, y in batches(12):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x.chunk(size)[rank]), y.chunk(size)[rank]).backward()
        optimizer.step()
        first, weight = cbp.last_replaced["0"], model.module[0].weight
        moments = optimizer.optim.state.get(weight)
        assert moments is None or not moments["exp_avg"][first].any()
    return {name: whole(p) for name, p in model.named_parameters()}, moments is not None, cbp.num_replaced["0"]


def test_an_optimizer_whose_state_is_spread_over_the_ranks(tmp_path):
    (one, has, replaced), (other, other_has, _) = run(2, _train_zero, folder=tmp_path)
    assert has != other_has
    assert replaced > 3
    assert differences(one, other) == []


def _attach_first(rank, size, how):
    model = network((12, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cbp = ContinualBackprop(model, optimizer)
    mesh = init_device_mesh("cpu", (size,))
    if how == "fully_shard":
        fully_shard(model, mesh=mesh)
    else:
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    model(torch.ones(2, 6)).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"became a DTensor after .* attached; first fully_shard or parallelize_module"
    ):
        cbp.step()


@pytest.mark.parametrize("how", ["fully_shard", "parallelize_module"])
def test_attached_before_the_parameters_were_split(how, tmp_path):
    run(2, _attach_first, how, folder=tmp_path)


MESSAGES = {
    "a flat parameter": "keeps parameters in a flat one; use torch.distributed.fsdp.fully_shard",
    "a grouped convolution": "2.weight is split inside a convolution group of 2 rows",
    "another optimizer": "made from its present parameters, after fully_shard or parallelize_module",
    "an optimizer in the backward pass": "overlap_with_ddp=True steps within the backward pass",
    "a transfer": r"transfer_bias needs \d.(bias|weight) whole in every process, and it is split",
}


def _refused(rank, size, what):
    model, options = network((12, 8)), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if what == "a flat parameter":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif what == "a grouped convolution":
        model = nn.Sequential(nn.Conv1d(3, 6, 1), nn.ReLU(), nn.Conv1d(6, 6, 1, groups=3))
        options = {"groups": UnitGroup("g", "0", "2")}
        fully_shard(model)
    elif what == "an optimizer in the backward pass":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        model = DistributedDataParallel(model)
        options = {"optimizer": ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, overlap_with_ddp=True)}
    else:
        fully_shard(model)
    if what == "another optimizer":
        options = {"optimizer": optimizer}
    elif what == "a transfer":
        options = {"rule": Rule.nature(transfer_bias=True)}
    with pytest.raises(ValueError, match=MESSAGES[what]):
        ContinualBackprop(model, **options)


@pytest.mark.parametrize("what", MESSAGES)
def test_what_is_refused(what, tmp_path):
    run(2, _refused, what, folder=tmp_path)
