"""The Triton backend on a GPU: `make gpu`. One process, under eight minutes with benchmarks/gpu.py."""

import copy
import itertools
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cbp_fast import ContinualBackprop, Rule

pytestmark = pytest.mark.gpu
RULES = {
    "nature": Rule.nature(),
    "clarena": Rule.clarena(),
    "contribution": Rule.gnt(),
    "weight": Rule.gnt("weight"),
    "adaptation": Rule.gnt("adaptation"),
    "coin": Rule.gnt(accumulate=False),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def mlp(widths=(64, 256, 256, 256, 10), dtype=torch.float32):
    torch.manual_seed(0)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, dtype=dtype), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convolutions():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(64 * 36, 128), nn.ReLU(), nn.Linear(128, 10))


def attach(model, optimizer, **options):
    options = {"replacement_rate": 0.01, "maturity_threshold": 2, "seed": 7, "rule": "nature", **options}
    return ContinualBackprop(model, optimizer, **options)


def train(model, steps, device, backend=None, inputs=None, **options):
    """A short run on a device; the model, the object, and what was chosen in each step."""
    model = copy.deepcopy(model).to(device)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    cbp = attach(model, optimizer, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    chosen = []
    for _ in range(steps):
        x = torch.randn(inputs or (32, 64), generator=generator).to(device, dtype)
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
        chosen.append({name: units.tolist() for name, units in cbp.last_replaced.items()})
    return model, cbp, chosen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_one_step_is_that_of_the_reference(rule, dtype):
    """Same inputs, same choice, and the same bits drawn: activations are whole numbers, so that sums are exact."""
    results = []
    for device, backend in (("cuda", "triton"), ("cpu", "reference")):
        model = mlp((256, 256, 256, 256, 10), dtype)
        for p in model.parameters():
            p.data.copy_(torch.randint(-3, 4, p.shape, generator=torch.Generator().manual_seed(p.numel())))
        model.to(device)
        cbp = attach(model, None, rule=RULES[rule], backend=backend, replacement_rate=0.1, maturity_threshold=0)
        for i, slot in enumerate(cbp._engine.state.slots):
            h = torch.randint(-3, 4, (16, slot.features), generator=torch.Generator().manual_seed(i))
            cbp._engine.record(i, h.to(device, dtype))
        cbp.step()
        state = cbp._engine.state
        fields = [state.utility, state.age, state.num_chosen, state.step, *cbp.last_replaced.values()]
        results.append([t.detach().cpu() for t in (*fields, *model.parameters())])
    assert int(results[0][2].sum()) > 3 or rule in ("clarena", "coin")
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_choose_as_the_reference(channels_last):
    model = convolutions().double()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    options = {"inputs": (8, 3, 16, 16), "steps": 20, "device": "cuda", "replacement_rate": 0.02}
    mine, theirs = (train(model, backend=backend, **options)[2] for backend in ("triton", "reference"))
    assert any(units for step in mine for units in step.values())
    assert mine == theirs


def test_a_group_of_131072_units():
    results = []
    for device, backend in (("cuda", "triton"), ("cpu", "reference")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 2**17), nn.Linear(2**17, 1))
        model[1].weight.data.copy_(torch.randint(-50, 50, model[1].weight.shape))
        h = torch.randint(-9, 10, (4, 2**17)).float()
        cbp = attach(model.to(device), None, backend=backend, replacement_rate=0.5, maturity_threshold=0)
        cbp._engine.record(0, h.to(device))
        cbp.step()
        results.append([t.detach().cpu() for t in (*cbp.last_replaced.values(), *model.parameters())])
    assert len(results[0][0]) == 2**16
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


def test_activations_past_two_to_the_31():
    model = nn.Sequential(nn.Linear(1, 16), nn.Linear(16, 1)).to("cuda", torch.float16)
    cbp = attach(model, None, replacement_rate=0.0, decay_rate=0.0)
    samples = 2**31 // 16 + 64
    h = torch.zeros(samples, 16, dtype=torch.float16, device="cuda")
    h[-32:] = 1
    cbp._engine.record(0, h)
    cbp.step()
    expected = 32 / samples * model[1].weight.float().abs().sum(0)
    torch.testing.assert_close(cbp.utility["0"], expected, rtol=1e-6, atol=0)


def test_a_hundred_steps_read_nothing_back():
    model = mlp().cuda()
    optimizer = torch.optim.Adam(model.parameters(), fused=False, foreach=True)
    cbp = attach(model, optimizer)
    x = torch.randn(32, 64, device="cuda")

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cbp.backend == "triton"
    assert sum(cbp.num_replaced.values()) > 0


def test_two_kernels_a_step():
    model = mlp((64, *[128] * 12, 10)).cuda()
    cbp = attach(model, None)
    for _ in range(3):
        model(torch.randn(32, 64, device="cuda"))
        cbp.step()
    model(torch.randn(32, 64, device="cuda"))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        cbp.step()
        torch.cuda.synchronize()
    kernels = [event.name for event in found.events() if not event.name.startswith(("Mem", "cuda"))]
    assert sorted(kernels) == ["reinit", "select"]


def test_graph_replays_are_eager_steps():
    """The same inputs step by step, once by a captured graph and once without."""
    results = []
    for graphed in (True, False):
        model = mlp().cuda()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        cbp = attach(model, optimizer, capture="deferred")
        x = torch.zeros(32, 64, device="cuda")

        def step(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad(set_to_none=False)
            model(x).square().mean().backward()
            optimizer.step()

        generator = torch.Generator().manual_seed(0)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                x.copy_(torch.randn(x.shape, generator=generator))
                step()
        torch.cuda.current_stream().wait_stream(side)
        run = step
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
        for _ in range(20):
            x.copy_(torch.randn(x.shape, generator=generator))
            run()
        results.append([*cbp.utility.values(), *cbp.age.values(), *model.parameters()])
        assert sum(cbp.num_replaced.values()) > 0
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_state_moves_between_devices():
    """Saved on the GPU and loaded on the CPU, the next step chooses the same units."""
    model, cbp, _ = train(mlp(), 10, "cuda")
    saved = cbp.state_dict()
    moved = copy.deepcopy(mlp())
    moved.load_state_dict({key: value.cpu() for key, value in model.state_dict().items()})
    theirs = attach(moved, None)
    theirs.load_state_dict({**saved})
    for name, utility in cbp.utility.items():
        assert torch.equal(utility.cpu(), theirs.utility[name])
    x = torch.ones(8, 64)
    model(x.cuda())
    moved(x)
    cbp.step()
    theirs.step()
    for name, units in cbp.last_replaced.items():
        assert units.tolist() == theirs.last_replaced[name].tolist()


CHECKER = shutil.which("compute-sanitizer")


@pytest.mark.skipif(CHECKER is None, reason="NVIDIA's compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    """The step under NVIDIA's checker."""
    program = (
        "import torch; from cbp_fast import ContinualBackprop\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.Linear(40, 4)).cuda()\n"
        "cbp = ContinualBackprop(model, replacement_rate=0.5, maturity_threshold=0)\n"
        "for _ in range(3): model(torch.randn(8, 8, device='cuda')); cbp.step()\n"
        "torch.cuda.synchronize()\n"
    )
    command = [CHECKER, "--tool", tool, "--error-exitcode", "1", sys.executable, "-c", program]
    # freed memory stays with the caching allocator, which would hide an access to it
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
