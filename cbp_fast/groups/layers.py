"""The kinds of layers that units can lie in: which axis of a weight is theirs, and how many entries each unit has."""

from __future__ import annotations

from typing import Any

from torch import nn

# number of spatial axes after the units of a layer; 0: the units are the last axis
_HF_CONV1D = "transformers.Conv1D"
LAYERS = {"Linear": 0, "Conv1d": 1, "Conv2d": 2, "Conv3d": 3}


LAYERS |= {"ConvTranspose1d": 1, "ConvTranspose2d": 2, "ConvTranspose3d": 3, "Embedding": 0, _HF_CONV1D: 0}


# layers of other packages, not imported, since few have them; transformers' is linear with a weight [in, out]
_FOREIGN = {
    ("transformers.pytorch_utils", "Conv1D"): _HF_CONV1D,
    ("torch_geometric.nn.dense.linear", "Linear"): "Linear",
}
_FEATURE_NORMS = ("LayerNorm", "RMSNorm")
NORMS = (
    *(f"{kind}Norm{d}d" for kind in ("Batch", "Instance") for d in (1, 2, 3)),
    *("SyncBatchNorm", "GroupNorm", *_FEATURE_NORMS),
)


def names_of(model: nn.Module) -> dict[nn.Module, str]:
    """The modules of a model with their names."""
    return {module: name for name, module in model.named_modules()}


def inside(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and DistributedDataParallel."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def check_model(model: nn.Module) -> None:
    """Checks that a model is a module, and not wrapped."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, not {type(model).__name__}")
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner = "module" if parallel else "_orig_mod" if hasattr(model, "_orig_mod") else None
    if inner:
        raise ValueError(f"{type(model).__name__} wraps the model: pass the model itself, model.{inner}")


def label(name: str, module: nn.Module) -> str:
    """A module as messages call it."""
    return f"'{name}' ({type(module).__name__})"


def kind(module: nn.Module) -> str:
    """Name of the torch.nn class whose forward() the module runs unchanged, or an empty string."""
    forward = getattr(module.forward, "__func__", None)
    for cls in type(module).__mro__:
        name: str = cls.__name__
        if getattr(nn, name, None) is cls and getattr(cls, "forward", None) is forward:
            return name.removeprefix("Lazy")
        foreign = _FOREIGN.get((cls.__module__, name))
        if foreign and vars(cls).get("forward") is forward:
            return foreign
    return ""


def norm_kind(module: nn.Module | None) -> str:
    """Name of the norm of torch.nn that a module is, also where its forward() adds something; or an empty string."""
    names = (cls.__name__ for cls in type(module).__mro__ if getattr(nn, cls.__name__, None) is cls)
    return next((name for name in names if name in NORMS), "")


def out_axis(layer: nn.Module) -> int:
    """The axis of a layer's weight along which its outputs lie; its inputs lie along the other one of the first two."""
    layer_kind = kind(layer)
    return int(layer_kind in ("Embedding", _HF_CONV1D) or layer_kind.startswith("ConvTranspose"))


def spatial_axes(layer: nn.Module) -> int:
    """Number of axes after the features in a layer's input; 0: the features are the last axis."""
    return LAYERS[kind(layer)]


def make_width(layer: nn.Module) -> int:
    """How many features a layer makes."""
    return layer.get_parameter("weight").shape[out_axis(layer)]


def read_width(layer: nn.Module) -> int:
    """How many features a layer reads."""
    return layer.get_parameter("weight").shape[1 - out_axis(layer)] * getattr(layer, "groups", 1)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of every channel by itself."""
    return getattr(layer, "groups", 1) == read_width(layer) > 1


def norm_shape(norm: Any) -> tuple[int, ...]:
    """The shape of a norm's entries."""
    if hasattr(norm, "normalized_shape"):
        return tuple(norm.normalized_shape)
    return (norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features,)


def rows_per_unit(name: str, layer: nn.Module, n: int, first: str) -> int:
    """Rows of a producer for each of the n units that `first` makes: several only for a depthwise convolution."""
    width = make_width(layer)
    if width != n and not (is_depthwise(layer) and width % n == 0):
        raise ValueError(f"'{first}' makes {n} units but '{name}' makes {width}")
    return width // n


def columns_per_unit(name: str, reader: nn.Module, n: int, spatial: int) -> int:
    """Columns of a reader for each of n units that have `spatial` axes."""
    width, where = read_width(reader), label(name, reader)
    if is_depthwise(reader):
        raise ValueError(f"{where} is a depthwise convolution: it does not mix units, and belongs to `incoming`")
    flattens = spatial > 0 and spatial_axes(reader) == 0
    if width != n and not (flattens and width % n == 0):
        multiple = ", of which that is no multiple" if flattens else ""
        raise ValueError(f"{where} reads {width} features but the group has {n} units{multiple}")
    return width // n


def entries_per_unit(name: str, norm: nn.Module, n: int, p: int, spatial: int) -> int:
    """Entries of a norm for each of n units with p columns each."""
    shape = norm_shape(norm)
    of_features = norm_kind(norm) in _FEATURE_NORMS
    if shape != (n,) and not (of_features and (shape == (n * p,) or (shape[0] == n and len(shape) == 1 + spatial))):
        size = shape[0] if len(shape) == 1 else shape
        raise ValueError(f"{label(name, norm)} normalises {size} features but the group has {n} units")
    return shape[0] // n
