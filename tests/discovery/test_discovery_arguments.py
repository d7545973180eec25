"""Units that go into any tensor argument of any operation: each is followed, or refused, never lost.

PyTorch's own samples say how an operation is called. One tensor of a sample at a time is made of hidden units, which a
layer also reads in the usual way, and the others depend on the input; what the operation returns is an output, or goes
through another layer. A group that is found then must be right, by the oracle.
"""

import functools
import itertools
import sys
import types
import unittest
import warnings
import zlib

import pytest
import torch
from networks import Net
from oracle import wrong_groups
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from cbp_fast.discovery import find_unit_groups

# PyTorch's, of its own samples
pytestmark = pytest.mark.filterwarnings("ignore")

_ROWS, _UNITS = 4, 5
# of all operations, tests that run beside each other take these parts, and make test one of so many
_PARTS, _SOME = 8, 12


@functools.cache
def _operations():
    """All operations that PyTorch keeps samples of."""
    if "expecttest" not in sys.modules:
        # of which PyTorch's test utilities want a base class
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_methods_invocations as known

        names = ("unary", "binary", "pointwise", "reduce", "other")
        foreach = [op for kind in names for op in getattr(known, f"foreach_{kind}_op_db", ())]
        return [op for op in (*known.op_db, *foreach) if op.dtypes]


def _spread(units, shape):
    """Units [4, 5] laid out in a shape: along the last axis that has their number, or else one after the other."""
    axes = [i for i, size in enumerate(shape) if size == _UNITS]
    count = shape.numel()
    if not axes:
        return units.flatten().repeat(-(-count // units.numel()) or 1)[:count].reshape(shape)
    rows = count // _UNITS
    rest = [size for i, size in enumerate(shape) if i != axes[-1]]
    return units.repeat(-(-rows // _ROWS), 1)[:rows].reshape(*rest, _UNITS).movedim(-1, axes[-1])


def _made_of(units, like, how):
    """A tensor made of units in the place of another one."""
    spread = _spread(units, like.shape)
    if like.dtype == torch.bool:
        return spread > 0
    if not like.is_floating_point() and not like.is_complex():
        low, high = (int(like.min()), int(like.max())) if like.numel() else (0, 0)
        return (low + spread.sigmoid() * (high - low + 1)).floor().clamp(low, high).to(like.dtype)
    if how == "scaled":
        return like * (0.5 + spread.sigmoid())
    spread = spread if how == "plain" else 0.1 + 0.8 * spread.sigmoid()
    return torch.complex(spread, 1 - spread) if like.is_complex() else spread


def _network(function, sample, fed, how, read, writes=False):
    """hidden -> head, and hidden -> one tensor of a sample -> function -> an output, or another layer."""
    leaves, spec = tree_flatten((sample.input, tuple(sample.args), dict(sample.kwargs)))
    leaves = [t.detach() if isinstance(t, torch.Tensor) else t for t in leaves]

    def results(m, x):
        units = m.hidden(x)
        factor = 0.75 + 0.2 * x.mean().tanh()
        given = [
            _made_of(units, leaf, how)
            if i == fed
            else leaf * factor
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            else leaf.clone()
            if isinstance(leaf, torch.Tensor)
            else leaf
            for i, leaf in enumerate(leaves)
        ]
        first, args, kwargs = tree_unflatten(given, spec)
        result = function(first, *args, **kwargs)
        # a number that Python has is a result too; a condition is a path
        made = [
            torch.tensor(float(t)) if type(t) in (int, float) else t
            for t in tree_leaves(first if writes else result)
            if type(t) in (int, float) or (isinstance(t, torch.Tensor) and t.numel())
        ]
        return m.head(units), [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in made]

    def forward(m, x):
        head, made = results(m, x)
        if not read:
            return head, made
        return head, [
            layer(t.double().reshape(-1, layer.in_features)) for layer, t in zip(m.readers, made, strict=True)
        ]

    model = Net(forward, hidden=nn.Linear(3, _UNITS), head=nn.Linear(_UNITS, 3)).double()
    _, made = results(model, torch.randn(_ROWS, 3, dtype=torch.float64))
    if not made:
        raise ValueError("it returns no tensor")
    if read:
        model.readers = nn.ModuleList(nn.Linear(t.shape[-1] if t.dim() else 1, 3) for t in made).double()
    return model


def _out(op, first, *args, **kwargs):
    """The same into memory that is given, which has no gradients."""
    with torch.no_grad():
        into = torch.utils._pytree.tree_map(torch.empty_like, op(first, *args, **kwargs))
        return op(first, *args, **kwargs, out=into)


def _forms(op):
    yield "", op.op, False
    if op.inplace_variant is not None:
        yield "_", op.inplace_variant, True
    if getattr(op, "supports_out", False):
        yield " out=", functools.partial(_out, op.op), False


def _makes_something(op, sample):
    try:
        result = op(sample.input, *sample.args, **sample.kwargs)
    except Exception:  # on this machine it cannot be called so
        return False
    return any(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)) or isinstance(
        result, (int, float)
    )


def _samples(op, count):
    """Samples of an operation that differ in the axes of their tensors, those with most axes first."""
    usual = (torch.float64, torch.float32, torch.complex128, torch.int64, torch.bool)
    dtype = next((t for t in usual if t in op.dtypes), None)
    if dtype is None:
        return []
    found = {}
    for sample in itertools.islice(op.sample_inputs("cpu", dtype), 100):
        tensors = [t for t in tree_leaves((sample.input, sample.args, sample.kwargs)) if isinstance(t, torch.Tensor)]
        axes = tuple(t.dim() for t in tensors)
        dense = all(0 < t.numel() < 20000 and t.layout == torch.strided for t in tensors)
        if tensors and dense and axes not in found and _makes_something(op, sample):
            found[axes] = sample
    return [found[axes] for axes in sorted(found, key=sum, reverse=True)][:count]


def _inputs(seed):
    return (torch.randn(_ROWS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)),)


def _repeats(model):
    """Whether the model runs, and runs alike."""
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append([t.clone() for t in tree_leaves(model(*_inputs(0)))])
    return all(torch.equal(*(t.nan_to_num() for t in pair)) for pair in zip(*results, strict=True))


def feed(op, count, forms):
    """(argument, form) pairs of an operation that could be fed; reasons why others could not; wrong groups."""
    fed, skipped, wrong = set(), [], []
    for sample in _samples(op, count):
        leaves = tree_leaves((sample.input, tuple(sample.args), dict(sample.kwargs)))
        for form, function, writes in list(_forms(op))[:forms]:
            places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
            # of long lists the ends
            for i in dict.fromkeys(places[:3] + places[-3:]):
                for read in (False, True):
                    for how in ("plain", "bounded", "scaled"):
                        try:
                            torch.manual_seed(0)
                            model = _network(function, sample, i, how, read, writes)
                            if not _repeats(model):
                                raise ValueError("what it returns is not the same the next time")
                            break
                        except Exception as error:  # whatever it says of values that it is not made for
                            model, reason = None, f"{type(error).__name__}: {error}"
                    if model is None:
                        skipped.append(f"argument {i} of {op.name}{form}: {reason.splitlines()[0][:120]}")
                        continue
                    fed.add((i, form))
                    try:
                        groups = find_unit_groups(model, _inputs(0), include_coupled=True)
                        why = wrong_groups(model, groups, [_inputs(1), _inputs(2)], draws=2)
                    except Exception as error:
                        why = f"{type(error).__name__}: {error}"
                    if why:
                        given = {k: v for k, v in sample.kwargs.items() if not isinstance(v, torch.Tensor)}
                        wrong.append(f"argument {i} of {op.name}{form} ({given}, read by a layer: {read}): {why}")
    return fed, skipped, wrong


# why an operation's sample has nothing to feed
_SKIPPED = {
    "takes no tensor": """arange broadcast_shapes empty empty_permuted empty_strided eye full linspace logspace ones
        randint randn scalar_tensor tril_indices triu_indices zeros signal.windows.bartlett signal.windows.blackman
        signal.windows.cosine signal.windows.exponential signal.windows.gaussian signal.windows.general_cosine
        signal.windows.general_hamming signal.windows.hamming signal.windows.hann signal.windows.kaiser
        signal.windows.nuttall""",
    "returns a condition, or nothing of a size": "allclose equal",
    "returns memory that nothing was written to": "empty_like new_empty new_empty_strided",
    "is not for dense tensors, or not for float64": "sparse.mm sparse.sampled_addmm to_sparse _scaled_mm _scaled_mm_v2",
    "is not there without a GPU": """jiterator_2inputs_2outputs jiterator_4inputs_with_extra_args jiterator_binary
        jiterator_binary_return_by_ref jiterator_unary""",
    "cannot have a gradient": "resize_",
}


def _chunk(part, parts, every=1):
    """Feeds one part of all operations."""
    operations = [op for op in _operations() if zlib.crc32(op.name.encode()) % every == 0]
    count, unfed, wrong = 0, [], []
    for op in operations[part::parts]:
        fed, skipped, bad = feed(op, 1, 1) if every > 1 else feed(op, 2, 3)
        count += len(fed)
        unfed += [] if fed else [f"{op.name}: {(skipped or ['it takes no tensor'])[0]}"]
        wrong += bad
    known = {name for names in _SKIPPED.values() for name in names.split()}
    return (
        count,
        [
            line
            for line in unfed
            if line.partition(":")[0].removeprefix("torch.").removeprefix("ops.aten.") not in known
        ],
        wrong,
    )


def test_units_in_any_argument_of_some_operations():
    count, unfed, wrong = _chunk(0, 1, every=_SOME)
    assert not wrong, "\n".join(wrong)
    assert not unfed, "\n".join(unfed)
    assert count > 40


@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(_PARTS))
def test_units_in_any_argument_of_all_operations(part):
    count, unfed, wrong = _chunk(part, _PARTS)
    assert not wrong, "\n".join(wrong)
    assert not unfed, "\n".join(unfed)
    assert count > 50
