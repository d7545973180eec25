"""Whether unit groups are right, told by running the model alone: an oracle for discovery that shares no code with it.

Of a unit that may be re-initialised two statements hold:

- A: with its columns in all outgoing layers at zero, its rows, biases and norm entries do not reach the output, nor a
  buffer, but its own entries.
- B: with its rows and biases at zero and its norm entries at their defaults, its columns in all outgoing layers see the
  same whatever the input is.

Norms of torch.nn.functional over features couple all units by their statistics. That is allowed, so that here they
scale and shift only.
"""

import copy
import dataclasses
import functools

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from cbp_fast.groups.layers import out_axis, spatial_axes
from cbp_fast.groups.resolving import resolve

_DEFAULTS = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
# float64, and what does not reach the output moves it by nothing at all
_TOLERANCE = 1e-10
# says nothing of a tensor's values
_ABOUT = ("shape", "size", "dim", "ndim", "dtype", "device", "requires_grad", "numel", "__len__")


def wrong_groups(model, groups, inputs, seed=0, draws=4):
    """Why groups are wrong, by name; an empty dictionary if all are right.

    Args:
        model: the model; a copy of it is looked at, in float64 and with random weights.
        groups: of :func:`cbp_fast.find_unit_groups`, or given by hand.
        inputs: tuples of arguments, at least two of the same shapes that differ in every sample.
        seed: of weights, and of what the model draws.
        draws: how many other rows are tried for a unit, each on one of the inputs.
    """
    model = copy.deepcopy(model).double()
    generator = torch.Generator().manual_seed(seed)
    inputs = [tree_map(_double, args) for args in inputs]
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            _randomise(model, name, tensor, generator)
        found = {}
        for group in groups:
            resolved = resolve(model, group)
            for unit in range(resolved.num_units):
                why = _why(model, resolved, unit, inputs, generator, draws)
                if why:
                    found[group.name] = f"unit {unit}: {why}"
                    break
    return found


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _random(like, generator, scale=1.0):
    return torch.randn(like.shape, generator=generator, dtype=torch.float64) * scale


def _randomise(model, name, tensor, generator):
    owner = model.get_submodule(name.rpartition(".")[0])
    key = name.rpartition(".")[2]
    norm = hasattr(owner, "running_var") or isinstance(owner, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm))
    if key == "running_var" or (norm and key == "weight"):
        tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    elif isinstance(tensor, nn.Parameter) or key == "running_mean":
        fan_in = tensor[0].numel() if tensor.dim() > 1 else 4
        tensor.copy_(_random(tensor, generator, 1.2 / fan_in**0.5))


class _Plain(TorchFunctionMode):
    """Norms over features scale and shift; whatever takes one of the watched tensors is told to `seen`."""

    def __init__(self, watched=(), seen=None):
        super().__init__()
        self.watched, self.seen = watched, seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        name = func.__self__.__name__ if name == "__get__" else name
        if self.seen is not None and any(t is w for t in tree_leaves((args, kwargs)) for w in self.watched):
            self.seen(name)
        if name in ("layer_norm", "rms_norm", "group_norm", "native_layer_norm") and isinstance(args[0], torch.Tensor):
            weight, bias = (kwargs.get(k, args[i] if len(args) > i else None) for i, k in ((2, "weight"), (3, "bias")))
            bias = None if name == "rms_norm" else bias
            x = args[0]
            if name == "group_norm":
                weight, bias = (t if t is None else t.reshape(-1, *[1] * (x.dim() - 2)) for t in (weight, bias))
            x = x.clone() if weight is None else x * weight
            x = x if bias is None else x + bias
            return (x, x, x) if name == "native_layer_norm" else x
        return func(*args, **kwargs)


def _indices(member, unit):
    start, unit_stride, per_unit, position_stride = member.block
    return torch.tensor([start + unit * unit_stride + p * position_stride for p in range(per_unit)])


def _entries(group, unit):
    """(tensor with its units along the first axis, their indices, what a reset sets them to)."""
    for member in group.incoming:
        index, module = _indices(member, unit), member.module
        yield module.weight.data.movedim(out_axis(module), 0), index, 0.0
        if getattr(module, "bias", None) is not None:
            yield module.bias.data, index, 0.0
    for member in group.norms:
        for key, default in _DEFAULTS.items():
            if getattr(member.module, key, None) is not None:
                yield getattr(member.module, key).data, _indices(member, unit), default


def _zero_columns(group, unit):
    for member in group.outgoing:
        weight, index = member.module.weight.data, _indices(member, unit)
        groups = getattr(member.module, "groups", 1)
        if out_axis(member.module):
            weight[index] = 0
        elif groups == 1:
            weight[:, index] = 0
        else:
            rows, each = weight.shape[0] // groups, weight.shape[1]
            for i in index.tolist():
                at = i // each
                weight[at * rows : (at + 1) * rows, i % each] = 0


def _why(model, group, unit, inputs, generator, draws):
    buffers = list(model.buffers())
    state = [(t, t.clone()) for t in (*(p.data for p in model.parameters()), *buffers)]
    entries = list(_entries(group, unit))
    own = [(t, index) for t, index, _ in entries if any(t.data_ptr() == b.data_ptr() for b in buffers)]

    def restore():
        for tensor, value in state:
            tensor.copy_(value)

    def outputs(args, look=_run):
        """What a run shows, and all that it leaves in buffers, where that is not the unit's own."""
        before = [b.clone() for b in buffers]
        result = look(model, args)
        for tensor, index in own:
            tensor[index] = 0
        result += [b.clone() for b in buffers]
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        return result

    try:
        _zero_columns(group, unit)
        before = [outputs(args) for args in inputs]
        for draw in range(draws):
            for tensor, index, default in entries:
                place = tensor[index]
                value = _random(place, generator, 0.5 + 0.5 * draw)
                tensor[index] = value if default == 0 else value.abs() + 0.1
            at = draw % len(inputs)
            how = _difference(before[at], outputs(inputs[at]))
            if how:
                return f"A: its rows, biases or norm entries reach the output past its columns ({how})"
        restore()
        for tensor, index, default in entries:
            tensor[index] = default
        strange = []
        look = functools.partial(_features, group=group, unit=unit, strange=strange)
        first, *others = (outputs(args, look)[: -len(buffers) or None] for args in inputs)
        if strange:
            return f"B: {strange[0]} reads its columns outside their layer's own call"
        for other in others:
            how = _difference(first, other)
            if how:
                return f"B: its columns see more than the unit ({how})"
    finally:
        restore()
    return ""


def _run(model, args, watched=(), seen=None):
    # dropout and whatever else is drawn are the same in all runs; nothing may be written into the arguments
    args = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
    torch.default_generator.manual_seed(0)
    with _Plain(watched, seen):
        result = model(*args)
    return [t.detach().clone() for t in _tensors(result)]


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        value = value.values()
    return (
        [t for entry in value for t in _tensors(entry)] if isinstance(value, (list, tuple, type({}.values()))) else []
    )


def _features(model, args, group, unit, strange):
    """What the columns see in one run; functions that read them in another way are added to `strange`."""
    seen, inside = [], []
    handles = []
    for member in group.outgoing:

        def enter(module, args, kwargs, member=member):
            x = args[0] if args else kwargs["input"]
            inside.append(module)
            seen.append(x.movedim(x.dim() - 1 - spatial_axes(module), -1)[..., _indices(member, unit)].clone())

        handles.append(member.module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(member.module.register_forward_hook(lambda *_: inside.pop() and None))
    watched = [member.module.weight for member in group.outgoing]
    try:
        _run(model, args, watched, lambda name: inside or name in _ABOUT or strange.append(name))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _difference(first, second):
    """How two lists of results differ, or an empty string; what is not finite shows nothing."""
    if [t.shape for t in first] != [t.shape for t in second]:
        # another path, or as many rows as the data says: the least and the greatest still say what a column sees
        first, second = ([torch.stack([t.amin(), t.amax()]) for t in ts if t.numel()] for ts in (first, second))
        size = min(len(first), len(second))
        first, second = first[:size], second[:size]
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"number {i} is {int((a != b).sum())} times another"
            continue
        both = a.isfinite() & b.isfinite()
        gap = torch.where(both, a - b, 0.0).abs().amax().item() if a.numel() else 0.0
        if gap > _TOLERANCE * max(1.0, torch.where(both, a, 0.0).abs().amax().item() if a.numel() else 0.0):
            return f"number {i} by {gap:.3g}"
    return ""
