"""One thread unless a test asks for more, repeatable property tests, and what several test files share."""

import hashlib
import os
import signal

# read once, when Triton is imported; what compiles its kernels does so in a process of its own
os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    import hypothesis
except ModuleNotFoundError:  # tests/gpu/test_gpu.py does without
    hypothesis = None
import numpy as np
import pytest
import torch
from layer_networks import Net, train
from stream import EAGER, Stream, mlp, momentum

from cbp_fast import _C, ContinualBackprop

# whose failures say as much as those of the tests that call them
pytest.register_assert_rewrite("group_cases", "triton_runs")

# threads would only wait for each other on small tensors
torch.set_num_threads(1)

# what a shell runs in the background ignores Ctrl-C, and so would all that the tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# the same examples every time: what fails here fails everywhere
if hypothesis is not None:
    hypothesis.settings.register_profile(
        "repeatable", derandomize=True, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption("--isa", choices=_C.isa_levels(), default=_C.get_isa(), help="instruction set of all tests")
    parser.addoption("--networks", type=int, default=1000, help="random networks of the slow test of discovery")
    parser.addoption(
        "--cases",
        type=int,
        default=1000,
        help="cases of the property test of backends with the slow ones, of which Triton has a tenth",
    )


def pytest_configure(config):
    _C.set_isa(config.getoption("--isa"))


# Random numbers are the same in every run, whatever runs beside or before: of what a file draws as it is imported, and
# of what a test draws.
def pytest_collectstart(collector):
    torch.manual_seed(0)


def pytest_runtest_setup(item):
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    return request.param


@pytest.fixture
def attached(backend):
    """A model in training, after a few steps of which some replaced units."""
    model = mlp()
    optimizer = momentum(model)
    cbp = ContinualBackprop(model, optimizer, backend=backend, **EAGER)
    stream = Stream(model, optimizer)
    stream.train(5)
    assert sum(cbp.num_replaced.values()) > 0
    return model, optimizer, cbp, stream


@pytest.fixture
def trained():
    """A model with layers of every kind, and its optimizer, after thirty steps."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, 30)
    return model, optimizer


class _Patched:
    """In the place of what puts Triton's own functions back: the fixture below does, after the test."""

    def restore(self):
        pass


@pytest.fixture
def interpreter(monkeypatch):
    """Triton's interpreter with its own functions replaced once, and not for every call: three times as quick."""
    import triton
    from triton.runtime import interpreter

    patch, patch_tensor, scopes = interpreter._patch_lang, interpreter._patch_lang_tensor, {}

    def patch_once(function):
        # what is replaced depends on which of Triton's modules a function sees
        if id(function.__globals__) not in scopes:
            scopes[id(function.__globals__)] = patch(function)
        return _Patched()

    def patch_index(tensor, scope):
        # 3.6's loops take their bounds by int(array of one element), which NumPy has refused since
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    if triton.__version__.startswith("3.6."):
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    # it computes in NumPy, which would warn of what floating point does by design
    with np.errstate(all="ignore"):
        yield
    for scope in reversed(scopes.values()):
        scope.restore()


@pytest.fixture
def every_isa():
    """Call it with a function: its result on each instruction set of this CPU, by name."""
    before = _C.get_isa()

    def run(function):
        results = {}
        for name in _C.isa_levels():
            _C.set_isa(name)
            results[name] = function()
        return results

    yield run
    _C.set_isa(before)


def _philox4x32(counter, key):
    """Philox4x32-10 (Salmon et al., SC 2011) in Python's integers: 4 and 2 words of 32 bits in, 4 out."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


class _Philox:
    """Random numbers as the specification defines them, worked out without the code under test."""

    words = staticmethod(_philox4x32)

    @staticmethod
    def stream(name, group=False):
        """Tensor id of a weight, or of a group."""
        first_31_bits = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1
        return first_31_bits + (2**31 if group else 0)

    @staticmethod
    def word(seed, step, stream, element):
        block = element // 4
        counter = (block % 2**32, block >> 32, step, stream)
        return _philox4x32(counter, (seed % 2**32, seed >> 32))[element % 4]

    @classmethod
    def unit(cls, seed, step, stream, elements):
        """U[0, 1) of each element, float32."""
        words = [cls.word(seed, step, stream, e) >> 8 for e in elements]
        return np.array(words, dtype=np.float32) * np.float32(2.0**-24)

    @classmethod
    def uniform(cls, seed, step, stream, elements, bound):
        """(2 r - 1) * bound in float32, with one rounding."""
        return (2 * cls.unit(seed, step, stream, elements) - 1) * np.float32(bound)


@pytest.fixture
def philox():
    return _Philox


def _bits(tensor):
    if tensor.is_meta:
        return tensor.shape
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensors_of(prefix, value):
    if isinstance(value, torch.Tensor):
        yield prefix, _bits(value)
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _tensors_of(f"{prefix}.{key}", entry)
    elif isinstance(value, (list, tuple)):
        for i, entry in enumerate(value):
            yield from _tensors_of(f"{prefix}.{i}", entry)
    else:
        yield prefix, value


def _state_of(thing):
    engine = getattr(thing, "_engine", None)
    if engine is None:
        return thing.state_dict()
    # beyond the units replaced last, their list holds what is left of other steps
    fields = {name: getattr(engine.state, name) for name, _, _ in engine.state._fields if name != "chosen"}
    return {**fields, "last_replaced": thing.last_replaced, **engine.hyper}


@pytest.fixture
def everything():
    """Call it with a model, an optimizer or a ContinualBackprop, or several: all they hold, bit for bit, by name."""

    def look(*things):
        found = {}
        for i, thing in enumerate(things):
            found.update(_tensors_of(f"{i} {type(thing).__name__}", _state_of(thing)))
        return found

    return look
