"""The Triton backend on a GPU; `make gpu` runs it. In Triton's interpreter the same tests run on the CPU, small."""

import contextlib
import copy
import itertools

import pytest
import torch
import triton
from torch import nn
from torch.profiler import ProfilerActivity, profile

from cbp_fast import CBPLinear, ContinualBackprop, Part, Rule, UnitGroup

# the interpreter cannot read a GPU's memory; without it and without a GPU, attaching says what is missing
SMALL = bool(triton.knobs.runtime.interpret)
DEVICE = "cuda" if torch.cuda.is_available() and not SMALL else "cpu"
pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs CUDA")

RULES = {
    "nature": Rule.nature(),
    "clarena": Rule.clarena(),
    "contribution": Rule.gnt(),
    "weight": Rule.gnt("weight"),
    "adaptation": Rule.gnt("adaptation"),
    "coin": Rule.gnt(accumulate=False),
    "normal": Rule.gnt(init="normal"),
    "zero_contribution": Rule.gnt("zero_contribution"),
    "adaptable_contribution": Rule.gnt("adaptable_contribution"),
    "feature_by_input": Rule.gnt("feature_by_input"),
    "random": Rule.gnt("random"),
    "transfer": Rule.nature(transfer_bias=True),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FIRST = "run a step with inputs of the same shape before each capture of a CUDA graph"


def sizes(full, small):
    return small if SMALL else full


def wide(*ends):
    """Three hidden layers between these."""
    return (ends[0], *[sizes(256, 16)] * 3, ends[1])


def mlp(widths=None, dtype=torch.float32):
    torch.manual_seed(0)
    widths = widths or wide(64, 10)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, dtype=dtype), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convolutions():
    torch.manual_seed(0)
    a, b = sizes((32, 64), (4, 4))
    body = [nn.Conv2d(3, a, 3), nn.ReLU(), nn.Conv2d(a, b, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(b * 36, 4 * a), nn.ReLU(), nn.Linear(4 * a, 10))


def attach(model, optimizer, **options):
    options = {"replacement_rate": 0.01, "maturity_threshold": 2, "seed": 7, "backend": "triton", **options}
    return ContinualBackprop(model, optimizer, **options)


def train(model, steps, device=DEVICE, inputs=None, **options):
    """A short run on a device; the model, the object, and what was chosen in each step."""
    model = copy.deepcopy(model).to(device)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    cbp = attach(model, optimizer, **options)
    generator = torch.Generator().manual_seed(1)
    chosen = []
    for step in range(steps):
        shape = inputs[step % len(inputs)] if isinstance(inputs, list) else inputs or (32, 64)
        x = torch.randn(shape, generator=generator).to(device, dtype)
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
        chosen.append({name: units.tolist() for name, units in cbp.last_replaced.items()})
    return model, cbp, chosen


def whole(shape, seed):
    """Whole numbers, whose sums are exact in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed))


def steps_on_whole_numbers(model, backend, device, shapes, activations=None, steps=2, **options):
    """What some steps leave, the last thing first: the units chosen, the state, and the parameters.

    Parameters are whole numbers before every step, and averages fall by halves. A mean that activations are centred by
    is that of one step, as its division by 1 - decay_rate^age would not be exact.
    """
    model = copy.deepcopy(model).to(device)
    decay = 0.0 if Rule.make(options.get("rule", "nature")).centred else 0.5
    options = {"replacement_rate": 0.1, "maturity_threshold": 0, "decay_rate": decay, "backend": backend, **options}
    cbp = attach(model, None, **options)
    found = []
    for step in range(steps):
        for i, p in enumerate(model.parameters()):
            p.data.copy_(whole(p.shape, 100 * step + i))
        for slot, shape in enumerate(shapes):
            h = whole(shape, 100 * step + slot).to(device, activations or next(model.parameters()).dtype)
            cbp._engine.record(slot, h)
        cbp.step()
        state = cbp._engine.state
        fields = [state.num_chosen, state.utility, state.age, state.step, *cbp.last_replaced.values()]
        found.append([t.detach().cpu().clone() for t in (*fields, *model.parameters())])
    return found


def check_whole_numbers(model, shapes, at_least=1, **options):
    """Triton's steps are the reference's, bit for bit."""
    mine = steps_on_whole_numbers(model, "triton", DEVICE, shapes, **options)
    theirs = steps_on_whole_numbers(model, "reference", "cpu", shapes, **options)
    for a, b in zip(mine, theirs, strict=True):
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one, other)
    assert sum(int(step[0].sum()) for step in mine) >= at_least


@contextlib.contextmanager
def nothing_waits():
    """On a GPU, whatever makes the host wait for it is an error."""
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_one_step_is_that_of_the_reference(rule, dtype):
    widths = wide(sizes(256, 16), 16)
    shapes = [(16, n) for n in widths[1:-1]]
    at_least = 0 if rule in ("clarena", "coin") else 3
    check_whole_numbers(mlp(widths, dtype), shapes, at_least, rule=RULES[rule])


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_activations_of_another_type_than_the_weights(dtype):
    widths = wide(64, 16)
    check_whole_numbers(mlp(widths), [(16, n) for n in widths[1:-1]], 3, activations=dtype)


@pytest.mark.parametrize("capture", ["deferred", "inline"])
@pytest.mark.parametrize("samples", [1, 7, 4096])
def test_few_and_many_samples(samples, capture):
    """Sums of one tile, of a part of one, and split among programs."""
    samples = min(samples, sizes(4096, 300))
    widths = (8, 48, 33, 16)
    check_whole_numbers(mlp(widths), [(samples, n) for n in widths[1:-1]], 3, capture=capture)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("rule", ["nature", "adaptable_contribution", "transfer"])
def test_a_flattened_layer(rule, channels_last):
    a, b = sizes((64, 128), (4, 16))
    model = nn.Sequential(nn.Conv2d(3, a, 3), nn.Conv2d(a, a, 3), nn.Flatten(), nn.Linear(a * 36, b), nn.Linear(b, 4))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    check_whole_numbers(model, [(8, a, 8, 8), (8, a * 36), (8, b)], rule=RULES[rule])


@pytest.mark.parametrize("start", [0, 4, 8])
@pytest.mark.parametrize("rule", ["nature", "contribution", "adaptable_contribution"])
def test_a_part_of_a_grouped_convolution(rule, start):
    """Units that begin at, and inside, a group of the convolution that reads them."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(16, 8, 3, groups=2))
    groups = [UnitGroup("g", "0", Part("1", start))]
    check_whole_numbers(model, [(4, 16, 8, 8)], rule=RULES[rule], groups=groups, replacement_rate=0.3)


@pytest.mark.parametrize("rule", ["nature", "normal"])
def test_embeddings_are_drawn_normal(rule):
    """Beside layers of the rule's distribution, in one launch."""
    a, b = sizes((128, 500), (8, 20))
    model = nn.Sequential(nn.Embedding(b, a), nn.Embedding(7, 3 * a), nn.Linear(b, a), nn.Linear(a, 4))
    groups = [UnitGroup("g", ["0", Part("1", 5, 2), "2"], "3")]
    check_whole_numbers(model, [(16, a)], rule=RULES[rule], groups=groups, replacement_rate=0.3)


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_choose_as_the_reference(channels_last):
    model = convolutions().double()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    options = {"inputs": (8, 3, 16, 16), "steps": sizes(20, 4), "replacement_rate": sizes(0.02, 0.2)}
    mine, theirs = (train(model, backend=backend, **options)[2] for backend in ("triton", "reference"))
    assert any(units for step in mine for units in step.values())
    assert mine == theirs


@pytest.mark.parametrize("capture", ["deferred", "inline"])
@pytest.mark.parametrize("rule", ["nature", "adaptable_contribution", "transfer"])
def test_training_chooses_as_the_reference(rule, capture):
    options = {"steps": sizes(20, 4), "rule": RULES[rule], "capture": capture, "replacement_rate": sizes(0.01, 0.1)}
    model = mlp(dtype=torch.float64)
    mine, theirs = (train(model, backend=backend, **options)[2] for backend in ("triton", "reference"))
    assert any(units for step in mine for units in step.values())
    assert mine == theirs


def test_a_group_of_131072_units():
    units = sizes(2**17, 2**10)
    shape = (4, units)
    check_whole_numbers(mlp((1, units, 1)), [shape], units // 2, replacement_rate=0.5, steps=1)


def test_activations_past_two_to_the_31():
    samples = sizes(2**31 // 16 + 64, 2**7)
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 40 * samples:
        pytest.skip("needs 5 GB")
    model = nn.Sequential(nn.Linear(1, 16), nn.Linear(16, 1)).to(DEVICE, torch.float16)
    cbp = attach(model, None, replacement_rate=0.0, decay_rate=0.0)
    h = torch.zeros(samples, 16, dtype=torch.float16, device=DEVICE)
    h[-32:] = 1
    cbp._engine.record(0, h)
    cbp.step()
    expected = 32 / samples * model[1].weight.float().abs().sum(0)
    torch.testing.assert_close(cbp.utility["0"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("capture", ["deferred", "inline"])
def test_batches_of_many_shapes(capture):
    """Shapes that come again find their tables; twelve of them, in layers that follow each other."""
    shapes = [(samples, 64) for samples in range(3, sizes(15, 5))]
    options = {"inputs": shapes, "steps": 2 * len(shapes), "capture": capture, "replacement_rate": sizes(0.01, 0.1)}
    model = mlp(dtype=torch.float64)
    mine, theirs = (train(model, backend=backend, **options)[2] for backend in ("triton", "reference"))
    assert any(units for step in mine for units in step.values())
    assert mine == theirs
    model = mlp().to(DEVICE)
    cbp = attach(model, None, capture=capture)
    inputs = [torch.randn(shape, device=DEVICE) for shape in shapes]
    for x in inputs:
        model(x)
        cbp.step()
    with nothing_waits():
        for x in inputs:
            model(x)
            cbp.step()


def test_inline_sums_of_24_readers_build_nothing_anew():
    width = sizes(64, 8)
    model = mlp((16, *[width] * sizes(24, 18), 4)).to(DEVICE)
    one, two = (attach(copy.deepcopy(model), None, capture=capture) for capture in ("inline", "deferred"))
    for step in range(sizes(4, 2)):
        x = torch.randn(16, 16, device=DEVICE)
        with nothing_waits() if step else contextlib.nullcontext():
            for cbp in (one, two):
                cbp._model(x)
                cbp.step()
    for name, utility in one.utility.items():
        torch.testing.assert_close(utility, two.utility[name], rtol=1e-5, atol=0)
        assert torch.equal(one.age[name], two.age[name])


def test_a_hundred_steps_read_nothing_back():
    model = mlp().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), fused=False, foreach=True)
    cbp = attach(model, optimizer, replacement_rate=sizes(0.01, 0.1), backend="triton" if DEVICE == "cpu" else None)
    x = torch.randn(32, 64, device=DEVICE)

    def step():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    step()
    with nothing_waits():
        for _ in range(sizes(100, 4)):
            step()
    assert cbp.backend == "triton"
    assert sum(cbp.num_replaced.values()) > 0


@needs_cuda
@pytest.mark.parametrize(
    ("rule", "expected"), [("nature", ["reinit", "select"]), ("clarena", ["reinit", "score", "select"])]
)
def test_two_kernels_a_step(rule, expected):
    model = mlp((64, *[128] * 12, 10)).to(DEVICE)
    cbp = attach(model, None, rule=rule)
    for _ in range(3):
        model(torch.randn(32, 64, device=DEVICE))
        cbp.step()
    model(torch.randn(32, 64, device=DEVICE))
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        cbp.step()
        torch.cuda.synchronize()
    # calls of the driver are among the events, and copies among what the device did
    names = [event.name for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(name for name in names if not name.startswith("Mem")) == expected


@needs_cuda
@pytest.mark.parametrize("capture", ["deferred", "inline"])
@pytest.mark.parametrize("rule", ["nature", "clarena", "adaptable_contribution", "transfer"])
def test_graph_replays_are_eager_steps(rule, capture):
    """The same inputs step by step, once by a captured graph and once without."""
    results = []
    for graphed in (True, False):
        model = mlp().to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        cbp = attach(model, optimizer, rule=RULES[rule], capture=capture)
        x = torch.zeros(32, 64, device=DEVICE)

        def step(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad(set_to_none=False)
            model(x).square().mean().backward()
            optimizer.step()

        generator = torch.Generator().manual_seed(0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
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
        assert sum(cbp.num_replaced.values()) > 0 or rule == "clarena"
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def captured_forward(cbp, x):
    """A graph of the forward alone, after a step; what it leaves is `x`'s."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        cbp._model(x)
        cbp.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cbp._model(x)
    return graph


@needs_cuda
def test_inline_sums_are_in_a_graph_of_the_forward():
    results = []
    for graphed in (True, False):
        model = mlp().to(DEVICE)
        cbp = attach(model, None, capture="inline")
        x = torch.ones(32, 64, device=DEVICE)
        if graphed:
            run = captured_forward(cbp, x).replay
        else:
            model(x)
            cbp.step()

            def run(model=model, x=x):
                model(x)

        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            x.copy_(torch.randn(x.shape, generator=generator))
            run()
            cbp.step()
        results.append([*cbp.utility.values(), *cbp.age.values(), *model.parameters()])
        assert sum(cbp.num_replaced.values()) > 0
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@needs_cuda
@pytest.mark.parametrize("capture", ["auto", "deferred"])
def test_a_graph_of_the_forward_needs_inline_sums(capture):
    """Its replays call no hook; that nothing would be replaced ever again is said."""
    model = mlp().to(DEVICE)
    cbp = attach(model, None, capture=capture)
    captured_forward(cbp, torch.ones(32, 64, device=DEVICE)).replay()
    with pytest.raises(RuntimeError, match='capture="inline"'):
        cbp.step()


@needs_cuda
def test_a_graph_needs_a_step_before_it():
    model = mlp().to(DEVICE)
    cbp = attach(model, None, capture="deferred")
    x = torch.ones(32, 64, device=DEVICE)
    with torch.no_grad():
        model(x)
    said = []
    graph = torch.cuda.CUDAGraph()
    # what was forbidden may have ended the capture
    with contextlib.suppress(RuntimeError), torch.cuda.graph(graph):
        model(x)
        try:
            cbp.step()
        except RuntimeError as error:
            said.append(str(error))
    assert any(FIRST in text for text in said), said
    # and nothing is broken by it
    model(x)
    cbp.step()
    assert all((age == 1).all() for age in cbp.age.values())


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    """The host runs ahead by as many steps as it likes; activations lie elsewhere in every step."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        model = mlp().to(device)
        cbp = attach(model, None, capture="deferred")
        kept = []
        with torch.cuda.device("cuda:0"):
            for step in range(50):
                kept.append([whole((32, 256), 3 * step + i).to(device).float() for i in range(3)])
                for slot, h in enumerate(kept[-1]):
                    cbp._engine.record(slot, h)
                cbp.step()
        results.append([t.cpu() for t in (*cbp.utility.values(), *cbp.age.values(), *model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@needs_cuda
def test_addresses_that_change_in_every_step():
    """The host is many steps ahead of a GPU that is busy, and no step reads another one's activations."""
    results = []
    for busy in (False, True):
        model = mlp().to(DEVICE)
        cbp = attach(model, None, capture="deferred")
        kept = [[whole((32, 256), 3 * step + i).to(DEVICE).float() for i in range(3)] for step in range(40)]
        torch.cuda.synchronize()
        if busy:
            torch.cuda._sleep(100_000_000)
        for held in kept:
            for slot, h in enumerate(held):
                cbp._engine.record(slot, h)
            cbp.step()
            if not busy:
                torch.cuda.synchronize()
        results.append([*cbp.utility.values(), *cbp.age.values(), *model.parameters()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", ["nature", "adaptable_contribution"])
def test_state_moves_between_devices(rule):
    """Saved on the GPU and loaded on the CPU, the next step chooses the same units."""
    options = {"rule": RULES[rule], "replacement_rate": sizes(0.01, 0.1)}
    model, cbp, _ = train(mlp(), sizes(10, 3), **options)
    moved = mlp()
    moved.load_state_dict({key: value.cpu() for key, value in model.state_dict().items()})
    theirs = attach(moved, None, backend="cpp", **options)
    theirs.load_state_dict(cbp.state_dict())
    for name, utility in cbp.utility.items():
        assert torch.equal(utility.cpu(), theirs.utility[name])
    x = torch.ones(8, 64)
    model(x.to(DEVICE))
    moved(x)
    cbp.step()
    theirs.step()
    for name, units in cbp.last_replaced.items():
        assert units.tolist() == theirs.last_replaced[name].tolist()


@needs_cuda
def test_a_model_moves_with_its_state():
    """To the CPU and back: the backends change, and the run goes on."""
    model = mlp().to(DEVICE)
    cbp = attach(model, None, backend=None, replacement_rate=0.02)
    backends = []
    for device in (DEVICE, "cpu", DEVICE):
        model.to(device)
        cbp.to(device)
        for _ in range(3):
            model(torch.ones(8, 64, device=device))
            cbp.step()
        backends.append(cbp.backend)
    assert backends == ["triton", "cpp", "triton"]
    assert int(cbp._engine.state.step) == 9


@needs_cuda
def test_an_optimizer_from_before_a_move_is_left_alone():
    """Its state is on the other device."""
    torch.manual_seed(0)
    fc1, fc2, fc3 = nn.Linear(4, 20), nn.Linear(20, 12), nn.Linear(12, 2)
    options = {"replacement_rate": 1.0, "maturity_threshold": 0}
    model = nn.Sequential(fc1, nn.ReLU(), CBPLinear(fc1, fc2, **options), fc2, nn.ReLU(), fc3)
    for device in ("cpu", DEVICE):
        optimizer = torch.optim.Adam(model.to(device).parameters())
        for _ in range(3):
            model(torch.randn(5, 4, device=device)).square().sum().backward()
            optimizer.step()
    assert model[2].num_replaced >= 5 * 8
