"""One small training run, in one process or spread over several in any of PyTorch's ways."""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from cbp_fast import ContinualBackprop, Rule
from cbp_fast.parallel import processes as distributed

IN, OUT, BATCH = 6, 3, 16
ONE_PROCESS = "one process"
CONVOLUTIONS = "convolutions"


@dataclass(frozen=True)
class Run:
    """What is trained, and how it is spread."""

    way: str = "ddp"
    model: tuple[int, int] | str = (12, 8)  # hidden widths, or CONVOLUTIONS
    steps: int = 40
    learning_rate: float = 0.05
    rule: Rule = field(default_factory=Rule.nature)
    backend: str = "cpp"
    seed: int | None = 7
    replacement_rate: float = 0.08
    capture: str = "auto"


def network(model):
    torch.manual_seed(1)
    if model == CONVOLUTIONS:
        # the depthwise one is split between its groups, the norm lies on the units
        return nn.Sequential(
            nn.Unflatten(1, (1, IN)),
            nn.Conv1d(1, 6, 2),
            nn.ReLU(),
            nn.Conv1d(6, 6, 2, groups=6),
            nn.Conv1d(6, 7, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(7 * (IN - 3), 9),
            nn.LayerNorm(9),
            nn.Tanh(),
            nn.Linear(9, OUT),
        )
    first, second = model
    return nn.Sequential(nn.Linear(IN, first), nn.ReLU(), nn.Linear(first, second), nn.Tanh(), nn.Linear(second, OUT))


def batches(steps):
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        yield torch.randn(BATCH, IN, generator=generator), torch.randn(BATCH, OUT, generator=generator)


def _replicate(model, mesh):
    from torch.distributed._composable.replicate_with_fsdp import replicate

    replicate(model, mesh=mesh)


def _fully_shard(model, mesh):
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def spread(model, way, size):
    """The model spread over the processes, how many parts a batch has, and which of them is this process's."""
    if way == ONE_PROCESS:
        return model, 1, 0
    rank = dist.get_rank()
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(model), size, rank
    if way == "fsdp":
        _fully_shard(model, init_device_mesh("cpu", (size,)))
        return model, size, rank
    if way == "hsdp":
        _fully_shard(model, init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard")))
        return model, size, rank
    columns_and_rows = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if way == "tp":
        parallelize_module(model, init_device_mesh("cpu", (size,)), columns_and_rows)
        return model, 1, 0
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], columns_and_rows)
    {"fsdp x tp": _fully_shard, "ddp x tp": _replicate}[way](model, mesh["data"])
    return model, 2, mesh.get_coordinate()[0]


def whole(tensor):
    """The whole of a tensor, as a plain one."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().clone()


def everything(model, optimizer, cbp):
    """All that a run has come to, by name: parameters, the optimizer's state and continual backprop's."""
    model = distributed.unwrapped(model)
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = whole(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"{name} {key}"] = whole(value)
    state = cbp.state_dict()
    for name, group in state["groups"].items():
        found.update({f"{name} {key}": torch.as_tensor(value) for key, value in group.items()})
    return {**found, "step": torch.tensor(state["step"]), "seed": torch.tensor(state["seed"])}


def differences(one, other):
    """Names of what is not the same bit for bit."""
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def attach(model, optimizer, run):
    return ContinualBackprop(
        model,
        optimizer,
        replacement_rate=run.replacement_rate,
        maturity_threshold=3,
        decay_rate=0.9,
        rule=run.rule,
        backend=run.backend,
        seed=run.seed,
        capture=run.capture,
        example_inputs=torch.zeros(2, IN),
    )


def train(rank, size, run):
    """Everything at the end, and the units replaced in every step."""
    model, parts, part = spread(network(run.model), run.way, size)
    optimizer = torch.optim.Adam(model.parameters(), lr=run.learning_rate)
    cbp = attach(model, optimizer, run)
    if run.way == ONE_PROCESS:
        # a centred rule as several processes have it
        state = cbp._engine.state
        state.previous_mean = run.rule.centred
        state.plan = state._packed()
    log = []
    for x, y in batches(run.steps):
        loss = nn.functional.mse_loss(model(x.chunk(parts)[part]), y.chunk(parts)[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append({name: units.tolist() for name, units in cbp.last_replaced.items()})
    return everything(model, optimizer, cbp), log
