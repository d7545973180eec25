"""The models of zoo.py: of each library all that can be made small by rules, with inputs that they run on.

Nothing is known of single models but what the tables here say; what the rules do not fit is not built, and listed with
the first error.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import itertools
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# larger ones are not tried
MAX_PARAMETERS = 40_000_000
VOCABULARY, TOKENS, IMAGE = 128, 10, 32


class Built(NamedTuple):
    """A model that has run on the inputs; `again()` makes it anew, with the same weights, and does not run it."""

    model: nn.Module
    inputs: Any
    detail: str
    again: Callable[[], Built]


class Library(NamedTuple):
    package: str
    modules: tuple[str, ...]
    names: Callable[[], list[str]]
    build: Callable[[str], Built]


def names(library: str) -> list[str]:
    return LIBRARIES[library].names()


def build(library: str, name: str) -> Built:
    """The model, after one forward.

    Raises:
        ValueError: the first of the reasons why no way to make it led to a model that runs.
    """
    return LIBRARIES[library].build(name)


Make = Callable[[], nn.Module]


def first_that_runs(ways: Iterable[tuple[str, Make]], inputs_of: Callable[[nn.Module], Iterable[Any]]) -> Built:
    """The first way to make a model, and the first inputs, with which a forward runs, in training or else in eval()."""
    reasons: list[str] = []
    for detail, make in ways:
        try:
            model = seeded(make)
            options = list(inputs_of(model))
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
            continue
        for training in (True, False):
            for inputs in options:
                model.train(training)
                try:
                    torch.manual_seed(1)
                    # some look at their inputs' version or gradients
                    run(model, inputs)
                except Exception as error:
                    reasons.append(f"{type(error).__name__}: {error}")
                    continue
                return made(make, training, inputs, detail)
    raise ValueError(reasons[0] if reasons else "no inputs fit")


def made(make: Make, training: bool, inputs: Any, detail: str) -> Built:
    model = seeded(make).train(training)
    return Built(model, inputs, detail, lambda: made(make, training, inputs, detail))


def seeded(make: Make) -> nn.Module:
    torch.manual_seed(0)
    return make()


def run(model: nn.Module, inputs: Any) -> Any:
    if callable(inputs):
        return inputs(model)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def check_size(make: Make) -> None:
    """Raises ValueError if a model is too large to be made, as far as can be told without making it."""
    size = 0
    with contextlib.suppress(Exception), torch.device("meta"):
        size = sum(p.numel() for p in make().parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"it has {size / 1e6:.0f} million parameters")


def integers(*shape: int, high: int = VOCABULARY, low: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(0))


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


_KEYS = r"(key_value|kv|k)_heads?$|num_heads_kv|n_head_kv|multi_query"
# what numbers in a config become, by their names, at each of the levels of shrinking: the first pattern that fits
_SMALL: list[tuple[str, int, int]] = [
    # pattern, largest value, last level at which it is made small
    (r"vocab|num_embeddings|codebook_size", VOCABULARY, 3),
    (r"max_position|n_positions|max_seq|max_source|max_target|max_len|seq_len|n_ctx|context_length", 64, 2),
    (r"period|interval|freq$|every|_step$", 2, 1),
    (r"offset", 1, 0),
    (r"(^|_)(num_|n_)?(\w+_)?(layers?|blocks|depth)$|depths?$|layers_per_block|num_stages", 2, 3),
    (_KEYS, 2, 1),
    (r"heads?$|_groups$", 4, 1),
    (r"head_dim|d_kv|d_head|rotary_dim|rope_dim|attention_head_size|head_size|qk_\w+dim|v_\w+dim", 8, 1),
    (r"rank$", 8, 1),
    (r"intermediate|ffn|feed_?forward|d_ff|inner|mlp_dim|mlp_size|mlp_hidden|filter_size", 48, 2),
    (r"experts_per|top_k|topk", 2, 3),
    (r"expert", 4, 3),
    (r"image_size|sample_size|input_size|img_size", IMAGE, 2),
    (r"patch_size", 8, 2),
    (r"num_queries|num_query|num_detection|num_object|num_latents", 8, 2),
    (r"state_size|d_state|ssm_state", 8, 1),
    (r"window|chunk", 8, 1),
    (r"num_mel|mel_bins|num_channels|in_chan|out_chan|num_labels|kernel|stride|conv", 10**9, 3),
    (r"hidden|d_model|n_embd|dims?$|embed|width|channels?$|projection|_size$|features", 32, 1),
]
_TOKEN = re.compile(r"(token_id|token_index|_token|_id|_idx)$")


def small_int(name: str, value: int, level: int) -> int:
    for pattern, most, last in _SMALL:
        if re.search(pattern, name):
            return min(value, most) if level <= last else value
    return value


def small_list(name: str, value: list[Any] | tuple[Any, ...], level: int) -> Any:
    """Sizes of stages keep their ratios; numbers of layers become 1."""
    if not value or not all(type(v) is int for v in value):
        return value
    if re.search(r"depth|layers|blocks|repeats", name):
        return type(value)([1] * len(value)) if level <= 3 else value
    if re.search(r"hidden|dims?$|embed|width|channels|_size|planes", name) and level <= 1:
        by = max(min(value) // 16, 1)
        return type(value)([max(v // by, 1) for v in value])
    if re.search(r"image_size|img_size|sample_size", name):
        return type(value)([min(v, IMAGE) for v in value])
    return value


# transformers


@functools.cache
def _transformers_classes() -> dict[str, str]:
    """Model classes of all auto classes, base models first, and the model type of each."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    mappings = sorted((n for n in dir(auto) if re.fullmatch(r"MODEL_\w*MAPPING_NAMES", n)), key=len)
    found: dict[str, str] = {}
    for mapping in mappings:
        for model_type, classes in getattr(auto, mapping).items():
            for name in classes if isinstance(classes, (tuple, list)) else (classes,):
                found.setdefault(name, model_type)
    return found


def _config_class(model_type: str) -> Any:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return getattr(transformers, CONFIG_MAPPING_NAMES[model_type])


def small_config(config_class: Any, level: int, given: Any = None) -> Any:
    """A config with small numbers, and configs inside it likewise. `given` is one to take the defaults from."""
    from transformers import PreTrainedConfig

    default = config_class() if given is None else given
    names = [p for p in inspect.signature(config_class.__init__).parameters if p not in ("self", "kwargs", "args")]
    names += [n for n in vars(default) if n not in names and isinstance(getattr(default, n), PreTrainedConfig)]
    changed: dict[str, Any] = {}
    layers = {v for k, v in vars(default).items() if type(v) is int and "layer" in k}
    tokens = itertools.count(1)
    for name in names:
        try:
            value = getattr(default, name)
        except (AttributeError, RuntimeError):
            # one of those that differ from layer to layer, among others
            continue
        if isinstance(value, PreTrainedConfig):
            changed[name] = small_config(type(value), level, value).to_dict()
        elif type(value) is int:
            if _TOKEN.search(name):
                new = next(tokens)
                changed[name] = value if value < 0 else new
            else:
                changed[name] = small_int(name, value, level)
                if re.search(_KEYS, name) and level <= 1:
                    heads = getattr(default, name.replace("key_value", "attention"), 0)
                    changed[name] = min(value, 2 if value < heads else 4)
        elif isinstance(value, (list, tuple)):
            new = small_list(name, value, level)
            if "layer" in name and len(value) in layers and level <= 3:
                new = value[:2]
            changed[name] = new
        elif isinstance(value, dict) and "mrope_section" in value and level <= 1:
            changed[name] = {**value, "mrope_section": [2, 1, 1]}
    changed = {k: v for k, v in changed.items() if v != vars(default).get(k)}
    if given is not None:
        # what was not the class's own default stays
        kept = {k: v for k, v in given.to_dict().items() if k in names and k not in changed}
        changed = {**kept, **changed}
        changed.pop("layer_types", None)
    return config_class(**changed)


def _build_transformers(name: str) -> Built:
    import transformers

    model_class = getattr(transformers, name)
    config_class = _config_class(_transformers_classes()[name])

    def way(level: int) -> tuple[str, Make]:
        def make() -> nn.Module:
            config = small_config(config_class, level)
            check_size(lambda: model_class(config))
            return model_class(config)

        return f"level {level}", make

    return first_that_runs(map(way, range(4)), _transformers_inputs)


def _find(config: Any, *names: str, inside: tuple[str, ...] = ("",)) -> Any:
    """The first of the attributes that a config, or one inside it, has."""
    from transformers import PreTrainedConfig

    for name in names:
        value = getattr(config, name, None)
        if value is not None and not callable(value):
            return value
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig) and (found := _find(value, *names)) is not None:
            return found
    return None


def _transformers_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    config: Any = model.config
    takes = list(inspect.signature(model.forward).parameters)
    ids = integers(2, TOKENS, low=40)
    size = _find(config, "image_size", "img_size", "input_size", "sample_size") or IMAGE
    height, width = (
        (size, size) if isinstance(size, int) else tuple(size)[-2:] if not isinstance(size, dict) else (32, 32)
    )
    channels = _find(config, "num_channels", "in_channels", "in_chans") or 3
    channels = channels if isinstance(channels, int) else 3
    image = numbers(2, channels, height, width)
    mels = _find(config, "num_mel_bins", "input_feat_per_channel", "feature_size", "input_dim") or 80
    frames = 2 * (_find(config, "max_source_positions", "max_length") or 32)
    length = _find(config, "context_length") or 32
    lags = _find(config, "lags_sequence") or [0]
    past = length + (max(lags) if _find(config, "lags_sequence") and "past_time_features" in takes else 0)
    known: dict[str, list[Any]] = {
        "input_ids": [ids],
        "pixel_values": [image, numbers(2, 4, channels, height, width), numbers(2, 1, channels, height, width)],
        "input_features": [numbers(2, mels, frames), numbers(2, frames, mels), numbers(2, 1, 1001, 64)],
        "input_values": [numbers(2, 2000), numbers(2, 1024, 128), numbers(2, 1, 2000), numbers(2, 40, mels)],
        "decoder_input_ids": [ids],
        "bbox": [integers(2, TOKENS, 4, high=20).cumsum(-1)],
        "pixel_values_videos": [numbers(2, 4, channels, height, width)],
        "past_values": [numbers(2, past), numbers(2, length, _find(config, "num_input_channels", "input_size") or 1)],
        "past_time_features": [numbers(2, past, _find(config, "num_time_features") or 1)],
        "past_observed_mask": [torch.ones(2, past)],
        "future_values": [numbers(2, _find(config, "prediction_length") or 8)],
        "future_time_features": [
            numbers(2, _find(config, "prediction_length") or 8, _find(config, "num_time_features") or 1)
        ],
        "inputs": [ids, image],
        "states": [numbers(2, 4, _find(config, "state_dim") or 17)],
        "actions": [numbers(2, 4, _find(config, "act_dim") or 4)],
        "rewards": [numbers(2, 4, 1)],
        "returns_to_go": [numbers(2, 4, 1)],
        "timesteps": [integers(2, 4, high=4)],
        "input_points": [numbers(2, 1, 1, 2).abs()],
        "entity_ids": [ids[:, :3]],
        "visual_feats": [numbers(2, 4, _find(config, "visual_feat_dim") or 32)],
        "visual_pos": [numbers(2, 4, 4).abs()],
        "task_inputs": [ids],
        "audio_values": [numbers(2, 1, 2000)],
        "pixel_values_images": [image],
    }
    present = [n for n in known if n in takes]
    needed = [
        n
        for n, p in inspect.signature(model.forward).parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    main = getattr(model, "main_input_name", "input_ids")
    sets = [present, [n for n in present if n not in ("pixel_values_videos", "decoder_input_ids", "input_points")]]
    sets += [[main, *(n for n in needed if n != main)], [main, *needed, "decoder_input_ids"], ["input_ids"], needed]
    done = []
    for keys in sets:
        keys = [k for k in dict.fromkeys(keys) if k in known and k in takes]
        if not keys or keys in done:
            continue
        done.append(keys)
        for values in itertools.islice(itertools.product(*(known[k] for k in keys)), 6):
            inputs = dict(zip(keys, values, strict=True)) | ({"use_cache": False} if "use_cache" in takes else {})
            if "pixel_values" in keys and "input_ids" in keys:
                # as many places for the image as it has features
                token = _find(config, "image_token_id", "image_token_index")
                if token is not None:
                    for count in (1, 4, 16, 64, 17):
                        places = torch.full((2, count), int(token))
                        yield {**inputs, "input_ids": torch.cat([places, ids], 1)}
            yield inputs


# timm


# looked at in the size of their images too: what took long there
_OWN_SIZE = ("deit", "convit", "cait", "densenet", "mobilevit", "davit", "efficientformer", "byoanet", "convmixer")


def _timm_names() -> list[str]:
    import timm

    return [*timm.list_modules(), *(f"{module} in its size" for module in _OWN_SIZE)]


def _build_timm(name: str) -> Built:
    """The smallest model of a module, for small images if it takes them."""
    import timm

    module = name.split()[0]
    hints = ("test_", "atto", "nano", "pico", "femto", "tiny", "xx", "xs", "mini", "small", "_s", "lite")

    def rank(entry: str) -> tuple[int, int]:
        return next((i for i, hint in enumerate(hints) if hint in entry), len(hints)), len(entry)

    sizes = {}
    for entry in sorted(timm.list_models(module=module), key=rank)[:8]:
        with contextlib.suppress(Exception), torch.device("meta"):
            sizes[entry] = sum(p.numel() for p in timm.create_model(entry).parameters())
    entry = min(sizes, key=sizes.__getitem__)
    config = timm.get_pretrained_cfg(entry)
    own = config.input_size[-1] if config else 224
    small = min(128, own)

    def inputs_of(model: nn.Module, size: int) -> list[tuple[Tensor]]:
        return [(numbers(2, 3, size, size),)]

    ways: list[tuple[int, Make]] = [(own, lambda: timm.create_model(entry))]
    if name == module:
        ways[:0] = [(small, lambda: timm.create_model(entry, img_size=small)), (small, ways[0][1])]
    reasons: list[str] = []
    for size, make in ways:
        try:
            return first_that_runs([(f"{entry}, {size} x {size}", make)], functools.partial(inputs_of, size=size))
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(reasons[-1])


# diffusers


@functools.cache
def _diffusers_classes() -> dict[str, Any]:
    import diffusers

    found: dict[str, Any] = {}
    for name in sorted(set(dir(diffusers)) | set(dir(diffusers.models))):
        with contextlib.suppress(Exception):
            value = getattr(diffusers, name, None) or getattr(diffusers.models, name)
            if (
                isinstance(value, type)
                and issubclass(value, diffusers.ModelMixin)
                and value is not diffusers.ModelMixin
            ):
                found[value.__name__] = value
    return found


def _build_diffusers(name: str) -> Built:
    model_class = _diffusers_classes()[name]
    parameters = inspect.signature(model_class.__init__).parameters.values()

    def way(level: int) -> tuple[str, Make]:
        arguments: dict[str, Any] = {}
        for p in parameters:
            value = p.default
            if type(value) is int:
                small = small_int(p.name, value, level)
                # heads times their size is the width, in most
                small = min(value, 2) if re.search(r"heads$", p.name) and level <= 1 else small
                small = min(value, 16) if "head_dim" in p.name and level <= 1 else small
                small = value if re.search(r"norm_num_groups", p.name) else small
            elif isinstance(value, (tuple, list)):
                small = small_list(p.name, value, level)
                if "channels" in p.name and small != value:
                    # norms over 32 groups
                    small = type(value)([32 * (i // 2 + 1) for i in range(len(value))])
                if "axes_dim" in p.name and level <= 1:
                    small = type(value)([4, 6, 6][: len(value)]) if len(value) == 3 else value
            else:
                continue
            if small != value:
                arguments[p.name] = small

        def make() -> nn.Module:
            check_size(lambda: model_class(**arguments))
            return model_class(**arguments)

        return f"level {level}", make

    return first_that_runs(map(way, range(4)), _diffusers_inputs)


def _diffusers_inputs(model: nn.Module) -> Iterator[dict[str, Any]]:
    config: dict[str, Any] = dict(model.config)  # type: ignore[arg-type]

    def get(*names: str, default: int) -> int:
        for name in names:
            value = config.get(name)
            if isinstance(value, (tuple, list)) and value and isinstance(value[0], int):
                value = value[0]
            if type(value) is int and value > 0:
                return value
        return default

    inner = get("num_attention_heads", default=2) * get("attention_head_dim", default=16)
    channels = get("in_channels", "latent_channels", "in_dim", "audio_channels", default=4)
    side = min(get("sample_size", default=16), 16)
    text = get(
        "cross_attention_dim", "joint_attention_dim", "text_embed_dim", "caption_channels", "text_dim", "cap_feat_dim",
        "encoder_hid_dim", "in_channels_t", "context_dim", "text_encoder_dim", "condition_dim", default=inner,
    )  # fmt: skip
    parameters = inspect.signature(model.forward).parameters
    sequence, words = side * side // 4, 8
    shapes: list[Callable[[int], Tensor]] = [
        lambda c: numbers(2, c, side, side),
        lambda c: numbers(2, c, 4, side, side),
        lambda c: numbers(2, 4, c, side, side),
        lambda c: numbers(2, sequence, c),
        lambda c: numbers(2, c, 64),
        lambda c: numbers(2, c, 5, 32, 32),
        lambda c: numbers(2, c, 32, 32),
        lambda c: numbers(2, c, 1, 32, 32),
        lambda c: numbers(2, c, 4096),
    ]
    plain: dict[str, Any] = {
        "timestep": torch.tensor([1.0, 5.0]),
        "timesteps": torch.tensor([1, 5]),
        "r_timestep": torch.tensor([0.5, 0.7]),
        "t": torch.tensor([0.2, 0.5]),
        "encoder_hidden_states": numbers(2, words, text),
        "encoder_attention_mask": torch.ones(2, words, dtype=torch.bool),
        "encoder_mask": torch.ones(2, words, dtype=torch.bool),
        "attention_mask": torch.ones(2, words, dtype=torch.bool),
        "text_embeds": numbers(2, text),
        "pooled_projections": numbers(2, get("pooled_projection_dim", "pooled_projection_channels", default=32)),
        "class_labels": torch.tensor([0, 1]),
        "guidance": torch.tensor([1.0, 1.0]) if config.get("guidance_embeds") else None,
        "controlnet_cond": numbers(2, get("conditioning_channels", default=3), 8 * side, 8 * side),
        "input_ids": integers(2, words),
        "txt_ids": torch.zeros(words, 3),
        "img_ids": torch.zeros(sequence, 3),
        "added_time_ids": numbers(2, 3),
        "original_size": torch.tensor([[64.0, 64.0]] * 2),
        "target_size": torch.tensor([[64.0, 64.0]] * 2),
        "crop_coords": torch.tensor([[0.0, 0.0]] * 2),
        "num_frames": 4,
        "height": side // 2,
        "width": side // 2,
        "fps": torch.tensor([8, 8]),
        "clip_text": numbers(2, words, text),
        "proj_embedding": numbers(2, get("embedding_dim", default=32)),
    }
    first, *others = parameters
    needed = [n for n in others if parameters[n].default is inspect.Parameter.empty]
    usual = ("timestep", "encoder_hidden_states", "pooled_projections", "class_labels", "img_ids", "txt_ids")
    options = [needed, [*needed, *usual], [*needed, *usual[:2]], [*needed, *usual[:2], "num_frames", "height", "width"]]
    for shape in shapes:
        for c in dict.fromkeys((channels, 3, get("hidden_size", "latent_channels", default=4))):
            for keys in options:
                keys = [k for k in dict.fromkeys(keys) if k in others]
                if all(k in plain for k in keys):
                    yield {first: shape(c)} | {k: plain[k] for k in keys}


# torch-geometric


def _geometric_names() -> list[str]:
    from torch_geometric import nn as graph

    layers = [n for n in graph.conv.__all__ if n != "MessagePassing"]
    return layers + [n for n in graph.models.__all__ if isinstance(getattr(graph, n), type)]


def _geometric_arguments(function: Any, **sizes: Any) -> dict[str, Any]:
    """Arguments without a default, by name."""
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: sizes[p.name] for p in parameters if p.name in sizes and (p.default is p.empty or p.name == "edge_dim")
    }


class GraphNet(nn.Module):
    """Three graph layers with relus, and a linear one."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.last = nn.Linear(width, 5)

    def forward(self, x: Tensor, **graph: Any) -> Tensor:
        first = x
        for layer in self.layers:
            x = layer(x, **(graph | {"x_0": first} if "x_0" in graph else graph))
            x = (x[0] if isinstance(x, tuple) else x).relu()
        return self.last(x)


_EDGES = [[0, 1, 2, 3, 4, 5, 6, 7, 0, 2, 4, 6, 1, 3], [1, 2, 3, 4, 5, 6, 7, 0, 2, 4, 6, 0, 5, 7]]


def _build_geometric(name: str) -> Built:
    from torch_geometric import nn as graph

    layer_class = getattr(graph, name)
    is_layer = name in graph.conv.__all__
    edges = torch.tensor(_EDGES)
    width, dim, types = 16, 3, 4

    def mlp(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Linear(a, 24), nn.ReLU(), nn.Linear(24, b))

    def layer(into: int, out: int, factor: int) -> nn.Module:
        network = mlp(dim, into * out) if name == "NNConv" else mlp(factor * into, out)
        sizes = {
            "in_channels": into, "out_channels": out, "channels": into, "hidden_channels": width, "K": 2, "k": 3,
            "num_relations": types, "dim": dim, "kernel_size": 3, "nn": network, "alpha": 0.1, "num_layers": 2,
            "filter_size": 2, "edge_dim": dim, "space_dimensions": 3, "propagate_dimensions": 8, "first_aggr": True,
            "aggregators": ["mean", "max"], "scalers": ["identity"], "deg": torch.tensor([0, 2, 6]),
            "num_node_types": types, "num_edge_types": types, "edge_type_emb_dim": 4, "edge_attr_emb_dim": 4,
            "mlp_h": mlp(into, 3), "mlp_f": mlp(into + 3, out), "mlp_g": mlp(out, into),
            "conv": graph.GCNConv(into, out), "embedding_dim": width, "num_nodes": 8, "num_classes": 5,
            "num_blocks": 2, "num_bilinear": 4, "num_spherical": 3, "num_radial": 3, "int_emb_size": 8,
            "basis_emb_size": 4, "out_emb_channels": 8, "num_timesteps": 2, "depth": 2, "hidden_node_channels": 16,
            "hidden_edge_channels": 16, "num_rels": types, "seq_len": 3,
            "metadata": (["n"], [("n", "to", "n")]),
        }  # fmt: skip
        if name == "PointNetConv":
            return graph.PointNetConv(mlp(into + 3, out), mlp(out, out))
        return layer_class(**_geometric_arguments(layer_class.__init__, **sizes))

    def way(factor: int) -> tuple[str, Make]:
        def make() -> nn.Module:
            if not is_layer:
                return layer(width, width, factor)
            return GraphNet([layer(width, width, factor) for _ in range(3)], width)

        return f"factor {factor}", make

    given: dict[str, Any] = {
        "x": numbers(8, width), "x_0": numbers(8, width), "edge_index": edges, "edge_attr": numbers(14, dim),
        "edge_type": integers(14, high=types), "node_type": integers(8, high=types), "pos": numbers(8, 3),
        "normal": numbers(8, 3), "pseudo": numbers(14, dim).sigmoid(), "hyperedge_index": edges,
        "pos_edge_index": edges, "neg_edge_index": edges.flip(0), "batch": torch.tensor([0] * 4 + [1] * 4),
        "z": integers(8, high=9, low=1), "x_dict": {"n": numbers(8, width)},
        "edge_index_dict": {("n", "to", "n"): edges},
    }  # fmt: skip

    def inputs_of(model: nn.Module) -> Iterator[dict[str, Any]]:
        looked_at = model.layers[0] if is_layer else model
        parameters = inspect.signature(looked_at.forward).parameters
        needed = [n for n, p in parameters.items() if p.default is p.empty and n in given]
        for more in (
            (),
            ("edge_attr",),
            ("edge_type",),
            ("edge_type", "edge_attr"),
            ("pseudo",),
            ("edge_index",),
            ("batch",),
        ):
            yield {n: given[n] for n in dict.fromkeys((*needed, *more)) if n in parameters}

    return first_that_runs(map(way, (1, 2)), inputs_of)


# Stable-Baselines3

_SB3 = {
    "PPO": ("evaluate",),
    "A2C": ("evaluate",),
    "DQN": ("q_net",),
    "SAC": ("actor", "critic"),
    "TD3": ("actor", "critic"),
    "DDPG": ("actor", "critic"),
}


def _sb3_names() -> list[str]:
    kinds = ("MlpPolicy", "CnnPolicy", "MultiInputPolicy")
    return [f"{algorithm} {kind} {part}" for algorithm, parts in _SB3.items() for kind in kinds for part in parts]


def _build_sb3(name: str) -> Built:
    import gymnasium
    import numpy as np
    import stable_baselines3

    algorithm, kind, part = name.split()
    vector = gymnasium.spaces.Box(-1.0, 1.0, (6,), np.float32)
    image = gymnasium.spaces.Box(0, 255, (3, 36, 36), np.uint8)
    space = {
        "MlpPolicy": vector,
        "CnnPolicy": image,
        "MultiInputPolicy": gymnasium.spaces.Dict({"vector": vector, "image": image}),
    }[kind]
    discrete = algorithm in ("A2C", "DQN")
    actions = gymnasium.spaces.Discrete(4) if discrete else gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float32)

    class Environment(gymnasium.Env[Any, Any]):
        observation_space, action_space = space, actions

    def make() -> nn.Module:
        options = {} if algorithm in ("PPO", "A2C") else {"buffer_size": 10}
        policy = getattr(stable_baselines3, algorithm)(kind, Environment(), device="cpu", **options).policy
        return policy if part == "evaluate" else getattr(policy, part)

    observed: Any = {"vector": numbers(4, 6), "image": integers(4, 3, 36, 36, high=255)}
    observed = {"MlpPolicy": observed["vector"], "CnnPolicy": observed["image"]}.get(kind, observed)
    acts = integers(4, high=4) if discrete else numbers(4, 3).tanh()
    inputs: Any = (observed,)
    if part == "critic":
        inputs = (observed, acts)
    elif part == "evaluate":
        inputs = lambda policy: policy.evaluate_actions(observed, acts)  # noqa: E731
    return first_that_runs([("", make)], lambda model: [inputs])


# x-transformers: a plain one, and one for each switch of its parts


def _x_transformers_switches() -> dict[str, tuple[str, str]]:
    """By name: which part's argument it is, and the argument, True."""
    from x_transformers import x_transformers as x

    parts = {"": x.AttentionLayers, "attn_": x.Attention, "ff_": x.FeedForward, "wrapper_": x.TransformerWrapper}
    found = {}
    for prefix, part in parts.items():
        for p in inspect.signature(part.__init__).parameters.values():
            if p.default is False and p.name not in ("causal", "cross_attend", "only_cross"):
                found[f"{prefix}{p.name}"] = (prefix, p.name)
    return found


def _x_transformers_names() -> list[str]:
    plain = ["decoder", "encoder", "cross attention", "vision", "continuous", "encoder-decoder", "layers tied"]
    return plain + list(_x_transformers_switches())


def _build_x_transformers(name: str) -> Built:
    import x_transformers as x

    ids = integers(2, TOKENS)
    common: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}

    def wrapped(layers: nn.Module, **options: Any) -> nn.Module:
        return x.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=layers, **options)

    plain: dict[str, tuple[Make, Any]] = {
        "decoder": (lambda: wrapped(x.Decoder(**common)), (ids,)),
        "encoder": (lambda: wrapped(x.Encoder(**common)), (ids,)),
        "cross attention": (
            lambda: wrapped(x.Decoder(cross_attend=True, **common)),
            {"x": ids, "context": numbers(2, 7, 32)},
        ),
        "vision": (
            lambda: x.ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=x.Encoder(**common)),
            (numbers(2, 3, 32, 32),),
        ),
        "continuous": (
            lambda: x.ContinuousTransformerWrapper(
                dim_in=6, dim_out=5, max_seq_len=16, attn_layers=x.Encoder(**common)
            ),
            (numbers(2, TOKENS, 6),),
        ),
        "encoder-decoder": (
            lambda: x.XTransformer(
                dim=32,
                enc_num_tokens=VOCABULARY,
                enc_depth=2,
                enc_heads=4,
                enc_max_seq_len=16,
                dec_num_tokens=VOCABULARY,
                dec_depth=2,
                dec_heads=4,
                dec_max_seq_len=16,
            ),
            (ids, ids),
        ),
        "layers tied": (lambda: wrapped(x.Decoder(weight_tie_layers=True, **common)), (ids,)),
    }
    if name in plain:
        make, inputs = plain[name]
        return first_that_runs([("", make)], lambda model: [inputs])
    prefix, argument = _x_transformers_switches()[name]

    def way(layers: Any, more: dict[str, Any]) -> tuple[str, Make]:
        def make() -> nn.Module:
            if prefix == "wrapper_":
                return wrapped(layers(**common), **{argument: True})
            return wrapped(layers(**common, **{prefix + argument: True}, **more))

        return f"{layers.__name__} {more or ''}".strip(), make

    ways = [
        way(x.Decoder, {}),
        way(x.Encoder, {}),
        way(x.Decoder, {"dim_condition": 32}),
        way(x.Decoder, {"ff_glu": True}),
        way(x.Decoder, {"attn_dim_latent_q": 16, "attn_dim_latent_kv": 16}),
        way(x.Decoder, {"num_residual_streams": 2}),
        way(x.Decoder, {"attn_qk_norm": True}),
        way(x.Decoder, {"rotary_pos_emb": True}),
        way(x.Decoder, {"add_value_residual": True}),
    ]
    return first_that_runs(ways, lambda model: [(ids,), {"x": ids, "condition": numbers(2, 32)}])


# vit-pytorch


def _vit_names() -> list[str]:
    import vit_pytorch

    found = []
    for module in pkgutil.iter_modules(vit_pytorch.__path__):
        with contextlib.suppress(ImportError):
            contents = vars(importlib.import_module(f"vit_pytorch.{module.name}"))
            found += [
                f"{module.name}.{name}"
                for name, value in contents.items()
                if isinstance(value, type)
                and issubclass(value, nn.Module)
                and value.__module__ == f"vit_pytorch.{module.name}"
                and {"image_size", "num_classes", "input_shape"} & set(inspect.signature(value.__init__).parameters)
            ]
    return found


def _build_vit(name: str) -> Built:
    import vit_pytorch

    module, class_name = name.split(".")
    model_class = getattr(importlib.import_module(f"vit_pytorch.{module}"), class_name)
    sizes: dict[str, Any] = {
        "image_size": IMAGE, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 48,
        "dim_head": 8, "max_tokens_per_depth": (12, 8), "cls_depth": 1, "sm_dim": 16, "lg_dim": 32, "mlp_mult": 2,
        "frames": 4, "frame_patch_size": 2, "image_patch_size": 8, "spatial_depth": 1, "temporal_depth": 1,
        "seq_len": 32, "freq_patch_size": 8, "num_residual_streams": 2, "max_frames": 4, "ndim": 2,
        "input_shape": IMAGE, "num_slots": 4, "num_hierarchies": 2, "block_repeats": (1, 1), "reduction_factor": (4, 2),
        "channels": 3, "dims": (16, 24, 32),
    }  # fmt: skip
    stages = {"depth": (1, 1), "heads": (2, 4), "image_size": 64}

    def arguments(**changed: Any) -> dict[str, Any]:
        given = {**sizes, **changed}
        if "net" in inspect.signature(model_class.__init__).parameters:
            given["net"] = vit_pytorch.ViT(
                image_size=IMAGE, patch_size=8, num_classes=5, dim=32, depth=2, heads=4, mlp_dim=48, dim_head=8
            )
        parameters = inspect.signature(model_class.__init__).parameters.values()
        return {
            p.name: given[p.name]
            for p in parameters
            if p.name in given and (p.default is p.empty or p.name in ("dim_head", "image_size"))
        }

    ways = [
        ("", lambda: model_class(**arguments())),
        ("stages", lambda: model_class(**arguments(**stages))),
        ("no size given", lambda: model_class(**{k: v for k, v in arguments().items() if k != "image_size"})),
        ("four stages", lambda: model_class(**arguments(depth=(1, 1, 1, 1), heads=(1, 2, 4, 8)))),
        ("mobile", lambda: model_class((64, 64), [16, 24, 32], [8] * 2 + [16] * 8 + [32], 5)),
    ]  # fmt: skip

    def inputs_of(model: nn.Module) -> Iterator[tuple[Any, ...]]:
        for size in (IMAGE, 64, 224):
            yield (numbers(2, 3, size, size),)
        yield (numbers(2, 3, 4, IMAGE, IMAGE),)
        yield (numbers(2, 4, 3, IMAGE, IMAGE),)
        yield (numbers(2, 3, 32),)
        yield ([numbers(3, IMAGE, IMAGE), numbers(3, IMAGE, 16)],)
        yield ([numbers(3, 4, IMAGE, IMAGE), numbers(3, 4, IMAGE, 16)],)
        yield (numbers(2, 3, 256, 256),)

    return first_that_runs(ways, inputs_of)


LIBRARIES: dict[str, Library] = {
    "transformers": Library(
        "transformers",
        ("transformers.models.bert.modeling_bert", "transformers.models.clip.modeling_clip"),
        lambda: list(_transformers_classes()),
        _build_transformers,
    ),
    "timm": Library("timm", ("timm",), _timm_names, _build_timm),
    "diffusers": Library("diffusers", ("diffusers",), lambda: list(_diffusers_classes()), _build_diffusers),
    "torch-geometric": Library("torch-geometric", ("torch_geometric.nn",), _geometric_names, _build_geometric),
    "stable-baselines3": Library("stable-baselines3", ("stable_baselines3",), _sb3_names, _build_sb3),
    "x-transformers": Library("x-transformers", ("x_transformers",), _x_transformers_names, _build_x_transformers),
    "vit-pytorch": Library("vit-pytorch", ("vit_pytorch",), _vit_names, _build_vit),
}
