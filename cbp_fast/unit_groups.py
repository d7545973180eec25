"""Which layers of a model make, normalise and read the same units: unit groups, given by hand or found in a trace."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import operator
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate

# number of spatial axes after the units of a layer; 0: the units are the last axis
_HF_CONV1D = "transformers.Conv1D"
_LAYERS = {"Linear": 0, "Conv1d": 1, "Conv2d": 2, "Conv3d": 3}
_LAYERS |= {"ConvTranspose1d": 1, "ConvTranspose2d": 2, "ConvTranspose3d": 3, "Embedding": 0, _HF_CONV1D: 0}
_TRACED = {kind: _LAYERS[kind] for kind in ("Linear", "Conv1d", "Conv2d", "Conv3d")}
_FEATURE_NORMS = ("LayerNorm", "RMSNorm")
_NORMS = (
    *(f"{kind}Norm{d}d" for kind in ("Batch", "Instance") for d in (1, 2, 3)),
    *("SyncBatchNorm", "GroupNorm", *_FEATURE_NORMS),
)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# operations by name, without case and underscores: modules, functions and tensor methods, in place or not
_POOL = re.compile(r"(?:adaptive)?(?:max|avg|lp)pool([123])d")
_ELEMENTWISE_NAMES = """relu relu6 leakyrelu prelu rrelu elu celu selu gelu silu mish sigmoid logsigmoid tanh softplus
    softsign softshrink hardshrink tanhshrink hardtanh hardsigmoid hardswish threshold identity dropout dropout1d
    dropout2d dropout3d alphadropout featuredropout featurealphadropout clamp clip abs neg exp expm1 log log1p sqrt
    rsqrt square pow reciprocal sin cos erf add sub mul div truediv truedivide iadd isub imul itruediv clone detach
    contiguous to type float double half bfloat16 cpu cuda"""
_ELEMENTWISE = frozenset(_ELEMENTWISE_NAMES.split())
_RESHAPES = ("flatten", "view", "reshape", "squeeze")


@dataclass(frozen=True)
class Part:
    """Some indices along a layer's axis: those of unit j are start + j * unit_stride + p * position_stride.

    Attributes:
        layer: The layer or its qualified name.
        start: Index of the first one of unit 0.
        per_unit: How many there are for each unit (p < per_unit).
        unit_stride: From one unit to the next; None is `per_unit`.
        position_stride: From one index of a unit to its next.
    """

    layer: str | nn.Module
    start: int = 0
    per_unit: int = 1
    unit_stride: int | None = None
    position_stride: int = 1


@dataclass(frozen=True)
class UnitGroup:
    """The layers that share one axis of N hidden units.

    A layer is given by its qualified name (``"features.0"``) or as the module itself; lists become tuples. A
    :class:`Part` stands for a layer of which only some rows, columns or entries belong to the group.

    Attributes:
        name: Name of the group, unique in a model.
        incoming: Layers that make the units: a unit is one row of each weight. A depthwise convolution of the units
            is one of them.
        outgoing: Layers that read the units: a unit is one column of each weight, or a block of columns where a
            linear layer reads a flattened convolution.
        norms: Normalisation layers in between.
        num_units: N; needed only where every incoming layer is a `Part`.
    """

    name: str
    incoming: Sequence[str | nn.Module | Part]
    outgoing: Sequence[str | nn.Module | Part]
    norms: Sequence[str | nn.Module | Part] = ()
    num_units: int | None = None

    def __post_init__(self) -> None:
        for role in ("incoming", "outgoing", "norms"):
            layers = getattr(self, role)
            # a lone name would fall apart into its letters
            layers = (layers,) if isinstance(layers, (str, nn.Module, Part)) else tuple(layers)
            object.__setattr__(self, role, layers)


class Block(NamedTuple):
    """The indices along an axis that belong to unit j: start + j * unit_stride + p * position_stride, p < per_unit."""

    start: int
    unit_stride: int
    per_unit: int
    position_stride: int

    def indices(self, num_units: int) -> range | list[int]:
        """All of them, for all units."""
        if self.unit_stride == self.per_unit and self.position_stride == 1:
            return range(self.start, self.start + num_units * self.per_unit)
        return [
            self.start + j * self.unit_stride + p * self.position_stride
            for j in range(num_units)
            for p in range(self.per_unit)
        ]


class Member(NamedTuple):
    """A layer in its role in a group, and which indices along its axis belong to the units."""

    name: str
    module: nn.Module
    block: Block


@dataclass(frozen=True)
class ResolvedGroup:
    """A unit group that was checked, with its modules.

    Attributes:
        name: Name of the group.
        num_units: N, the rows of every incoming weight.
        columns_per_unit: P, the columns of every outgoing weight that read one unit: the number of positions where
            linear layers read a flattened convolution, else 1.
        incoming: The layers that make the units.
        outgoing: The layers that read them.
        norms: The normalisation layers in between.
        preceding: The layers that make the units which the incoming layers read; only the rule "clarena" looks at
            them, and whoever has all groups sets them.
    """

    name: str
    num_units: int
    columns_per_unit: int
    incoming: tuple[Member, ...]
    outgoing: tuple[Member, ...]
    norms: tuple[Member, ...]
    preceding: tuple[Member, ...] = ()

    def unit_group(self) -> UnitGroup:
        """The group by names."""
        parts: list[list[str | Part]] = []
        for members in (self.incoming, self.outgoing, self.norms):
            parts.append([])
            for name, module, block in members:
                width = (make_width, read_width, lambda norm: _norm_shape(norm)[0])[len(parts) - 1](module)
                start, unit_stride, per_unit, position_stride = block
                whole = block == (0, per_unit, per_unit, 1) and width == self.num_units * per_unit
                parts[-1].append(name if whole else Part(name, start, per_unit, unit_stride, position_stride))
        named = any(isinstance(part, str) for part in parts[0])
        incoming, outgoing, norms = parts
        return UnitGroup(self.name, incoming, outgoing, norms, None if named else self.num_units)


def resolve(model: nn.Module, group: UnitGroup) -> ResolvedGroup:
    """Looks up the modules of a unit group and checks that they fit together.

    Args:
        model: The model that holds the layers.
        group: A group, found or given by hand.

    Raises:
        TypeError: If a layer is of a kind that is not supported in its role.
        ValueError: If a layer is not in the model, is frozen, tied, lazy or computed, or if widths do not match.
    """
    if not isinstance(group, UnitGroup):
        raise TypeError(f"a unit group must be a UnitGroup, not {type(group).__name__}")
    _check_model(model)
    try:
        return _resolve(model, group)
    except (TypeError, ValueError) as error:
        raise type(error)(f"unit group '{group.name}': {error}") from None


def check_disjoint(groups: Iterable[ResolvedGroup]) -> None:
    """Checks that group names are unique and that no part of a layer has the same role in two groups.

    Raises:
        ValueError: If not; the message names the layer and both groups.
    """
    names: set[str] = set()
    owners: dict[tuple[str, str], list[tuple[ResolvedGroup, Block]]] = defaultdict(list)
    for group in groups:
        if group.name in names:
            raise ValueError(f"two unit groups are called '{group.name}'")
        names.add(group.name)
        for role in ("incoming", "outgoing", "norms"):
            for layer, _, block in getattr(group, role):
                for other, theirs in owners[role, layer]:
                    if not set(block.indices(group.num_units)).isdisjoint(theirs.indices(other.num_units)):
                        raise ValueError(
                            f"'{layer}' is in `{role}` of two unit groups, '{other.name}' and '{group.name}'"
                            if other is not group
                            else f"'{layer}' is named twice in `{role}` of unit group '{group.name}' for the same units"
                        )
                owners[role, layer].append((group, block))


def find_unit_groups(model: nn.Module, example_inputs: Any = None) -> list[UnitGroup]:
    """Finds the unit groups of a model in one symbolic trace of its forward().

    The units of every linear and convolution layer are followed through operations known to keep them apart
    (activations, dropout, norms, pooling, flattening) to the layers that read them. A group is found only if all
    of its paths are understood and end at a reader; :func:`explain` says why a layer is left out. forward() is
    traced without hooks, in the mode the model is in and with optional arguments at their defaults; the model, its
    buffers and the random generators stay as they were.

    Without `example_inputs` inputs are taken to have a batch axis, and features that enter a batch or group norm to
    be ``[batch, features]``. With them shapes are computed (on fake tensors, no arithmetic): this is then checked, and
    any ``view``, ``reshape`` or ``squeeze`` that amounts to a flatten is accepted.

    Args:
        model: The model itself, not wrapped by `DataParallel` or `torch.compile`.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments of forward().

    Returns:
        The groups in the order of forward(), each called after the layer that makes its units; may be empty.

    Raises:
        ValueError: If forward() cannot be traced or does not run on `example_inputs`.
    """
    return _discover(model, example_inputs)[0]


def explain(model: nn.Module, example_inputs: Any = None) -> str:
    """Two tables to print: the groups that :func:`find_unit_groups` finds, and why every other layer is left out."""
    groups, left_out = _discover(model, example_inputs)
    rows = [("unit group", "units", "columns", "outgoing", "norms")]
    for found in (resolve(model, group) for group in groups):
        outgoing, norms = (", ".join(member.name for member in part) for part in (found.outgoing, found.norms))
        rows.append(
            (found.name, str(found.num_units), str(found.num_units * found.columns_per_unit), outgoing, norms or "-")
        )
    lines = _align(rows) if groups else ["no unit group found"]
    if left_out:
        lines += ["", *_align([("left out", "because"), *left_out.items()])]
    return "\n".join(lines)


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip() for row in rows]


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = "module" if parallel else "_orig_mod" if hasattr(model, "_orig_mod") else None
    if inner:
        raise ValueError(f"{type(model).__name__} wraps the model: pass the model itself, model.{inner}")


def _label(name: str, module: nn.Module) -> str:
    return f"'{name}' ({type(module).__name__})"


def _kind(module: nn.Module) -> str:
    """Name of the torch.nn class whose forward() the module runs unchanged, or an empty string."""
    forward = getattr(module.forward, "__func__", None)
    for cls in type(module).__mro__:
        name: str = cls.__name__
        if getattr(nn, name, None) is cls and getattr(cls, "forward", None) is forward:
            return name.removeprefix("Lazy")
        # a linear layer whose weight is [in, out]; not imported, since few have it
        if (cls.__module__, name) == ("transformers.pytorch_utils", "Conv1D") and vars(cls).get("forward") is forward:
            return _HF_CONV1D
    return ""


def _resolve(model: nn.Module, group: UnitGroup) -> ResolvedGroup:
    names = {module: name for name, module in model.named_modules()}
    members = {
        role: [(part, _look_up(model, names, part.layer if isinstance(part, Part) else part)) for part in parts]
        for role, parts in (("incoming", group.incoming), ("outgoing", group.outgoing), ("norms", group.norms))
    }
    for role in ("incoming", "outgoing"):
        if not members[role]:
            raise ValueError(f"`{role}` names no layer")
    roles: dict[str, str] = {}
    for role, layers in members.items():
        for part, module in layers:
            name = names[module]
            if roles.setdefault(name, role) != role or (
                not isinstance(part, Part) and [m for _, m in layers].count(module) > 1
            ):
                raise ValueError(f"'{name}' is named twice; a layer has one role in a group")
            if role == "norms":
                if _kind(module) not in _NORMS:
                    raise TypeError(
                        f"{_label(name, module)} is not supported as a norm: it must be one of {', '.join(_NORMS)}"
                    )
            else:
                _check_layer(name, module, role)
            _check_parameters(name, module, names)
            if role != "norms" and not cast(torch.Tensor, module.weight).numel():
                raise ValueError(f"{_label(name, module)} has a weight without elements")

    n = _num_units(group, members["incoming"], names)
    spatial = min(spatial_axes(module) for _, module in members["incoming"])
    first = names[members["incoming"][0][1]]
    incoming = _members(
        members["incoming"], names, n, make_width, lambda name, module: _rows_per_unit(name, module, n, first)
    )
    outgoing = _members(
        members["outgoing"], names, n, read_width, lambda name, module: _columns_per_unit(name, module, n, spatial)
    )
    first, p = outgoing[0].name, outgoing[0].block.per_unit
    for name, module, block in outgoing:
        if block.per_unit != p:
            raise ValueError(f"'{first}' reads {p} columns of each unit but '{name}' reads {block.per_unit}")
        if block[1:] != (p, p, 1) and block[1:] != (1, p, n):
            raise ValueError(
                f"the features of {_label(name, module)} that read the group must lie side by side, unit by unit or "
                "position by position"
            )
    norms = _members(
        members["norms"],
        names,
        n,
        lambda module: _norm_shape(module)[0],
        lambda name, module: _entries_per_unit(name, module, n, p, spatial),
    )
    return ResolvedGroup(group.name, n, p, incoming, outgoing, norms)


def _num_units(
    group: UnitGroup, incoming: Sequence[tuple[str | nn.Module | Part, nn.Module]], names: dict[nn.Module, str]
) -> int:
    """N, by the first incoming layer that is given whole, and is not depthwise if another one is not."""
    whole = [module for part, module in incoming if not isinstance(part, Part)]
    whole.sort(key=_is_depthwise)
    n = make_width(whole[0]) if whole else group.num_units
    if n is None:
        raise ValueError("num_units must be given where every incoming layer is a Part")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"num_units is {n!r}, must be a positive integer")
    if group.num_units not in (None, n):
        raise ValueError(f"num_units is {group.num_units} but '{names[whole[0]]}' makes {n} units")
    return n


def _members(
    layers: Sequence[tuple[str | nn.Module | Part, nn.Module]],
    names: dict[nn.Module, str],
    n: int,
    width: Callable[[nn.Module], int],
    per_unit: Callable[[str, nn.Module], int],
) -> tuple[Member, ...]:
    """Every layer with its block along an axis of `width`; `per_unit` checks a layer that is given whole."""
    members = []
    for part, module in layers:
        name = names[module]
        if not isinstance(part, Part):
            own = per_unit(name, module)
            members.append(Member(name, module, Block(0, own, own, 1)))
            continue
        unit_stride = part.per_unit if part.unit_stride is None else part.unit_stride
        block = Block(part.start, unit_stride, part.per_unit, part.position_stride)
        if any(not isinstance(x, int) or isinstance(x, bool) for x in block) or min(block[1:]) < 1 or block.start < 0:
            raise ValueError(f"{part} must have whole numbers, start at least 0 and the others at least 1")
        indices = block.indices(n)
        if max(indices) >= width(module):
            raise ValueError(
                f"the part of {_label(name, module)} reaches index {max(indices)} of an axis of {width(module)}"
            )
        if len(set(indices)) < len(indices):
            raise ValueError(f"the part of {_label(name, module)} gives one index to two units")
        members.append(Member(name, module, block))
    return tuple(members)


def _look_up(model: nn.Module, names: dict[nn.Module, str], layer: str | nn.Module) -> nn.Module:
    if isinstance(layer, nn.Module):
        if layer not in names:
            raise ValueError(f"the {type(layer).__name__} given is not a module of the model")
        return layer
    if not isinstance(layer, str):
        raise TypeError(f"a layer must be given as a module or its name, not as {type(layer).__name__}")
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if layer not in modules:
        close = difflib.get_close_matches(layer, modules, n=1)
        raise ValueError(f"the model has no module '{layer}'" + (f"; did you mean '{close[0]}'?" if close else ""))
    return modules[layer]


def _check_layer(name: str, module: nn.Module, role: str) -> None:
    kind = _kind(module)
    if kind == "Embedding" and role == "outgoing":
        raise TypeError(f"{_label(name, module)} reads indices, not units; an embedding can only be incoming")
    if kind.startswith("ConvTranspose") and cast(Any, module).groups > 1:
        raise TypeError(f"{_label(name, module)}: transposed convolutions with groups are not supported")
    if kind in _LAYERS:
        return
    if isinstance(module, tuple(getattr(nn, layer, ()) for layer in _LAYERS)):
        raise TypeError(f"{_label(name, module)} overrides forward(), so what its weight means is not known")
    raise TypeError(f"{_label(name, module)} is not supported as a layer: it must be one of {', '.join(_LAYERS)}")


def _check_parameters(name: str, module: nn.Module, modules: Iterable[nn.Module]) -> None:
    if "weight" not in module._parameters:
        raise ValueError(f"the weight of {_label(name, module)} is computed (parametrized, pruned), not a parameter")
    for key, parameter in module._parameters.items():
        if parameter is None:
            continue
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(f"{_label(name, module)} is lazy and has no {key} yet: run the model once")
        if type(parameter) is not nn.Parameter:
            raise ValueError(f"'{name}.{key}' is a {type(parameter).__name__}, not a plain nn.Parameter")
        if parameter.dtype not in _DTYPES:
            raise ValueError(f"'{name}.{key}' is {parameter.dtype}, not float32, float64, bfloat16 or float16")
        if not parameter.requires_grad:
            raise ValueError(f"'{name}.{key}' is frozen (requires_grad is False)")
        if sum(parameter is other for owner in modules for other in owner._parameters.values()) > 1:
            raise ValueError(f"'{name}.{key}' is tied: two modules of the model share it")


def out_axis(layer: nn.Module) -> int:
    """The axis of a layer's weight along which its outputs lie; its inputs lie along the other one of the first two."""
    kind = _kind(layer)
    return int(kind in ("Embedding", _HF_CONV1D) or kind.startswith("ConvTranspose"))


def spatial_axes(layer: nn.Module) -> int:
    """Number of axes after the features in a layer's input; 0: the features are the last axis."""
    return _LAYERS[_kind(layer)]


def make_width(layer: nn.Module) -> int:
    """How many features a layer makes."""
    return layer.get_parameter("weight").shape[out_axis(layer)]


def read_width(layer: nn.Module) -> int:
    """How many features a layer reads."""
    return layer.get_parameter("weight").shape[1 - out_axis(layer)] * getattr(layer, "groups", 1)


def _is_depthwise(layer: nn.Module) -> bool:
    return getattr(layer, "groups", 1) == read_width(layer) > 1


def _norm_shape(norm: Any) -> tuple[int, ...]:
    if hasattr(norm, "normalized_shape"):
        return tuple(norm.normalized_shape)
    return (norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features,)


def _rows_per_unit(name: str, layer: nn.Module, n: int, first: str) -> int:
    """Rows of a producer for each of the n units that `first` makes; more than one only of a depthwise convolution."""
    width = make_width(layer)
    if width != n and not (_is_depthwise(layer) and width % n == 0):
        raise ValueError(f"'{first}' makes {n} units but '{name}' makes {width}")
    return width // n


def _columns_per_unit(name: str, reader: nn.Module, n: int, spatial: int) -> int:
    """Columns of a reader for each of n units that have `spatial` axes."""
    width, label = read_width(reader), _label(name, reader)
    if _is_depthwise(reader):
        raise ValueError(f"{label} is a depthwise convolution: it does not mix units, and belongs to `incoming`")
    flattens = spatial > 0 and spatial_axes(reader) == 0
    if width != n and not (flattens and width % n == 0):
        multiple = ", of which that is no multiple" if flattens else ""
        raise ValueError(f"{label} reads {width} features but the group has {n} units{multiple}")
    return width // n


def _entries_per_unit(name: str, norm: nn.Module, n: int, p: int, spatial: int) -> int:
    """Entries of a norm for each of n units with p columns each."""
    shape = _norm_shape(norm)
    of_features = _kind(norm) in _FEATURE_NORMS
    if shape != (n,) and not (of_features and (shape == (n * p,) or (shape[0] == n and len(shape) == 1 + spatial))):
        size = shape[0] if len(shape) == 1 else shape
        raise ValueError(f"{_label(name, norm)} normalises {size} features but the group has {n} units")
    return shape[0] // n


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Puts back what Python code of forward() may change: attributes, containers among them, and random states."""
    held = [c for m in model.modules() for c in (vars(m), *vars(m).values()) if isinstance(c, (dict, list, set))]
    saved = [list(c.items() if isinstance(c, dict) else c) for c in held]
    state = random.getstate()
    with torch.random.fork_rng(sorted({p.device.index for p in model.parameters() if p.is_cuda})):
        try:
            yield
        finally:
            random.setstate(state)
            for container, content in zip(held, saved, strict=True):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)


class _Tracer(fx.Tracer):
    """Records forward() with the modules of torch.nn as single operations; hooks of the user's do not run."""

    # else `self.counter += 1` on a buffer would be carried out
    proxy_buffer_attributes = True

    def __init__(self, example_inputs: Any) -> None:
        super().__init__()
        self.example_inputs = example_inputs
        self.tensors: list[torch.Tensor] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # a subclass that only adds to a layer is the layer
        return _kind(m) in (*_TRACED, *_NORMS) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return super().call_module(m, m.forward, args, kwargs)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        signature = inspect.signature(self.root.forward)
        if self.example_inputs is None:
            bound = signature.bind_partial()
            for name, parameter in signature.parameters.items():
                starred = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
                if not starred and parameter.default is parameter.empty:
                    bound.arguments[name] = self.create_proxy("placeholder", name, (), {})
        else:
            inputs = map_aggregate(self.example_inputs, self._placeholder)
            inputs = inputs if isinstance(inputs, (tuple, list, dict)) else (inputs,)
            bound = signature.bind(**inputs) if isinstance(inputs, dict) else signature.bind(*inputs)
        # not root_fn: a forward() set on the instance is the one that runs
        return lambda: self.root.forward(*bound.args, **bound.kwargs), []

    def _placeholder(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        self.tensors.append(value)
        return self.create_proxy("placeholder", f"input_{len(self.tensors)}", (), {})


class _Shapes(fx.Interpreter):
    """Runs a traced graph on fake tensors and on copies of its modules, and notes the shape of every value."""

    def __init__(self, model: nn.Module, graph: fx.Graph, mode: FakeTensorMode) -> None:
        super().__init__(model, graph=graph)
        self.extra_traceback = False
        self.mode = mode
        self.shapes: dict[fx.Node, torch.Size] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n] = value.shape
        return value

    def fetch_attr(self, target: str) -> Any:
        return self._fake(super().fetch_attr(target))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.fetch_attr(target).forward(*args, **kwargs)

    def _fake(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.mode.from_tensor(value)
        if not isinstance(value, nn.Module):
            return value
        copy = object.__new__(type(value))
        vars(copy).update(vars(value), _forward_hooks={}, _forward_pre_hooks={})
        for part in ("_parameters", "_buffers", "_modules"):
            vars(copy)[part] = {key: self._fake(entry) for key, entry in getattr(value, part).items()}
        return copy


def _trace(model: nn.Module, example_inputs: Any) -> tuple[fx.Graph, dict[fx.Node, torch.Size]]:
    """The traced forward() and, with example inputs, the shapes of its values."""
    forward, instead = f"{type(model).__name__}.forward()", "pass groups=[UnitGroup(...)] instead"
    tracer = _Tracer(example_inputs)
    with _untouched(model):
        states = random.getstate(), torch.get_rng_state()
        try:
            with torch.enable_grad():
                graph = tracer.trace(model)
        except Exception as error:  # the user's code may raise anything
            raise ValueError(f"{forward} cannot be traced ({error}); {instead}") from error
        if states[0] != random.getstate() or not torch.equal(states[1], torch.get_rng_state()):
            raise ValueError(f"{forward} draws random numbers, so one trace may not show every path; {instead}")
        if example_inputs is None:
            return graph, {}
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        interpreter = _Shapes(model, graph, mode)
        try:
            with mode, torch.no_grad():
                interpreter.run(*map(mode.from_tensor, tracer.tensors), enable_io_processing=False)
        except Exception as error:
            raise ValueError(f"{forward} does not run on the example_inputs given: {error}") from error
        return graph, interpreter.shapes


def _discover(model: nn.Module, example_inputs: Any) -> tuple[list[UnitGroup], dict[str, str]]:
    """The groups of a model and, by its label, why each other layer is left out."""
    _check_model(model)
    walk = _Walk(model, *_trace(model, example_inputs))
    order = {name: position for position, name in enumerate(walk.calls)}
    layers = [name for name, module in walk.modules.items() if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))]
    groups, left_out = [], {}
    for name in sorted(layers, key=lambda name: order.get(name, len(order))):
        group = UnitGroup(name, [name], walk.readers[name], walk.norms[name])
        reason = walk.refusal(group)
        if reason is None:
            groups.append(group)
        else:
            left_out[_label(name, walk.modules[name])] = reason
    return groups, left_out


@dataclass(frozen=True)
class _Units:
    """What a traced value holds: a layer's units on axis 1 before `spatial` axes, or (0) on the last axis."""

    layer: str
    spatial: int


class _Walk:
    """Follows the units of every layer through a traced forward(), in one pass over its operations."""

    def __init__(self, model: nn.Module, graph: fx.Graph, shapes: dict[fx.Node, torch.Size]) -> None:
        self.model = model
        self.modules: dict[Any, nn.Module] = dict(model.named_modules())
        self.shapes = shapes
        self.calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
        self.readers: dict[str, list[str]] = defaultdict(list)
        self.norms: dict[str, list[str]] = defaultdict(list)
        self.refused: dict[str, str] = {}
        # layers and norms that can be in no group, whatever their neighbours
        self.barred = {name: f"'{name}' is called {n} times in forward()" for name, n in self.calls.items() if n > 1}
        self.units: dict[fx.Node, _Units] = {}
        self.numbers: set[fx.Node] = set()
        known = (name for name, module in self.modules.items() if _kind(module) in (*_TRACED, *_NORMS))
        self.uncalled = [name for name in known if self._caller(name) is None]
        # values that map to the same node have the same first axis
        self.batch: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            self._visit(node)

    def refusal(self, group: UnitGroup) -> str | None:
        """Why the layer a group is named after makes no unit group, or None if it does."""
        name, caller = group.name, self._caller(group.name)
        if caller not in (name, None):
            return f"it is inside {_label(caller, self.modules[caller])}, which is not understood"
        barred = [self.barred[layer] for layer in (name, *group.outgoing, *group.norms) if layer in self.barred]
        try:
            _check_layer(name, self.modules[name], "incoming")
            if barred or name in self.refused:
                return self.refused.get(name) or barred[0]
            if not group.outgoing:
                return "no layer reads it" if caller else "forward() does not call it"
            resolved = _resolve(self.model, group)
        except (TypeError, ValueError) as error:
            return str(error)
        # the head of another task, or of the other mode: its columns would be forgotten
        sizes = {resolved.num_units, resolved.num_units * resolved.columns_per_unit}
        for other in self.uncalled:
            if sizes & _sizes(self.modules[other]):
                label = _label(other, self.modules[other])
                return f"{label} is not called here but has its width, and may share its units elsewhere"
        return None

    def _caller(self, name: str) -> str | None:
        """The module by whose call in the trace a module runs: itself, or one that fx does not look into."""
        return next((call for call in self.calls if f"{name}.".startswith(f"{call}.")), None)

    def _visit(self, node: fx.Node) -> None:
        inputs = [n for n in node.all_input_nodes if n not in self.numbers]
        held = {self.units[n] for n in inputs if n in self.units}
        key = self._key(node)
        if self._is_number(node):
            self.numbers.add(node)
            return
        if node.op == "get_attr":
            owner, _, _ = str(node.target).rpartition(".")
            for user in node.users:
                if not self._is_number(user):
                    self.barred.setdefault(owner, f"'{node.target}' is also used by {self._describe(user)}")
        if node.op == "output":
            for units in held:
                role = "its units are part of" if self.readers[units.layer] else "it makes"
                self.refused.setdefault(units.layer, f"{role} the model's output")
        elif held:
            try:
                self._follow(node, key, inputs, held)
            except ValueError as error:
                for units in held:
                    self.refused.setdefault(units.layer, str(error))
        if key in _TRACED:
            units = self.units[node] = _Units(str(node.target), _TRACED[key])
            if units.spatial and node in self.shapes and len(self.shapes[node]) != 2 + units.spatial:
                self.refused[units.layer] = "its input has no batch axis"
        roots = {self.batch[n] for n in inputs}
        keeps_batch = any(key in known for known in (_TRACED, _NORMS, _ELEMENTWISE)) or bool(_POOL.fullmatch(key))
        if key in _RESHAPES:
            keeps_batch = self._is_flatten(node, key, inputs[0])
        self.batch[node] = roots.pop() if keeps_batch and len(roots) == 1 else node

    def _follow(self, node: fx.Node, key: str, inputs: list[fx.Node], held: set[_Units]) -> None:
        """Takes units through one operation; raises ValueError with the reason where they cannot be followed."""
        op = self._describe(node)
        if len(held) > 1 or any(n not in self.units for n in inputs):
            raise ValueError(f"{op} combines its output with another tensor")
        (units,) = held
        source, pool = inputs[0], _POOL.fullmatch(key)
        if key in _TRACED:
            if _TRACED[key] != units.spatial:
                raise ValueError(f"{op} reads another axis of its output than that of the units")
            self.readers[units.layer].append(str(node.target))
            return
        if key in _NORMS:
            if not self._is_on_units(node, key, source, units):
                raise ValueError(f"{op} normalises another axis of its output than that of the units")
            self.norms[units.layer].append(str(node.target))
        elif key in _RESHAPES:
            units = self._reshape(node, key, source, units)
        elif pool:
            if int(pool[1]) != units.spatial:
                raise ValueError(f"{op} pools its output over other axes than the positions of a convolution")
        elif key == "prelu" and getattr(self.modules.get(node.target), "num_parameters", 1) != 1:
            raise ValueError(f"{op} has a slope for each unit, which is not supported")
        elif key not in _ELEMENTWISE:
            raise ValueError(f"its output goes into {op}, which is not understood")
        self.units[node] = units

    def _is_on_units(self, node: fx.Node, key: str, source: fx.Node, units: _Units) -> bool:
        """Whether a norm works along the axis of the units."""
        if key in _FEATURE_NORMS:
            return len(_norm_shape(self.modules[node.target])) == 1 + units.spatial
        if units.spatial > 0:
            return key[-2:] == f"{units.spatial}d" or key in ("SyncBatchNorm", "GroupNorm")
        # axis 1 is the last one in [batch, features] only
        known = key in ("BatchNorm1d", "SyncBatchNorm", "GroupNorm")
        return known and (source not in self.shapes or len(self.shapes[source]) == 2)

    def _reshape(self, node: fx.Node, key: str, source: fx.Node, units: _Units) -> _Units:
        if self._is_flatten(node, key, source):
            return _Units(units.layer, 0)
        if units.spatial == 0 and self.shapes and self.shapes[node][-1:] == self.shapes[source][-1:]:
            return units
        hint = "" if self.shapes else "; with example_inputs it may be"
        raise ValueError(f"{self._describe(node)} is not known to keep the units apart{hint}")

    def _is_flatten(self, node: fx.Node, key: str, source: fx.Node) -> bool:
        """Whether a reshape flattens all axes but the first."""
        if self.shapes:
            before, after = (self.shapes.get(n, torch.Size()) for n in (source, node))
            return after[:1] == before[:1] and after[1:] == (before[1:].numel(),)
        if key == "flatten":
            flatten = self.modules.get(node.target)
            axes = (flatten.start_dim, flatten.end_dim) if flatten else node.args[1:]
            named = (node.kwargs.get("start_dim", 0), node.kwargs.get("end_dim", -1))
            return (*axes, *named[len(axes) :]) == (1, -1)
        sizes = node.args[1:] or (node.kwargs.get("shape"),)
        sizes = tuple(sizes[0]) if isinstance(sizes[0], (tuple, list)) else sizes
        return key in ("view", "reshape") and len(sizes) == 2 and self._counted_by(sizes[0]) is self.batch[source]

    def _counted_by(self, size: Any) -> fx.Node | None:
        """The batch whose length is `size`, if that is written `x.size(0)`, `x.shape[0]` or `x.size()[0]`."""
        if not isinstance(size, fx.Node):
            return None
        args: Any = size.args
        if size.target is operator.getitem and args[1] == 0 and args[0] in self.numbers:
            return self.batch.get(args[0].args[0]) if args[0].args[1:] in ((), ("shape",)) else None
        return self.batch.get(args[0]) if size.target == "size" and args[1:] == (0,) else None

    def _is_number(self, node: fx.Node) -> bool:
        """Whether a value is a size, a dtype or a device, or is computed from those alone."""
        if node.op == "call_method":
            return node.target in ("size", "dim", "numel")
        if node.target is getattr:
            return node.args[1] in ("shape", "ndim", "dtype", "device")
        inputs = node.all_input_nodes
        of_python = getattr(node.target, "__module__", "") in ("_operator", "math")
        return of_python and bool(inputs) and self.numbers.issuperset(inputs)

    def _key(self, node: fx.Node) -> str:
        """Name of the known operation that a node calls, or an empty string."""
        if node.op == "call_module":
            name = _kind(self.modules[node.target])
            return name if name in _TRACED or name in _NORMS else name.lower()
        name = str(getattr(node.target, "__name__", node.target))
        known = any(getattr(space, name, None) is node.target for space in (torch, F, torch._C._nn, operator))
        return name.replace("_", "") if known or node.op == "call_method" else ""

    def _describe(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return _label(str(node.target), self.modules[node.target])
        return f"{node.args[1] if node.target is getattr else getattr(node.target, '__name__', node.target)}()"


def _sizes(module: nn.Module) -> set[int]:
    """Widths along which a layer or norm may touch units."""
    if _kind(module) in _NORMS:
        shape = torch.Size(_norm_shape(module))
        return {shape[0], shape.numel()}
    names = ("in_features", "out_features", "in_channels", "out_channels")
    return {getattr(module, name) for name in names if hasattr(module, name)}
