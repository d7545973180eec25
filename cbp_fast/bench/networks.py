"""Networks of the benchmarks, each with a batch to train on and its unit groups."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..groups.spec import UnitGroup


class Network(NamedTuple):
    """A network, a batch, and the groups of hidden units that have one producer and one reader."""

    model: nn.Module
    x: Tensor
    y: Tensor
    groups: list[UnitGroup]


def chain(*layers: nn.Module, x: Tensor, classes: int) -> Network:
    """A sequential network with a group between each two of its weighted layers."""
    model = nn.Sequential(*layers)
    weighted = [name for name, layer in model.named_children() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    groups = [UnitGroup(a, [a], [b]) for a, b in pairwise(weighted)]
    return Network(model, x, torch.randint(classes, (len(x),)), groups)


def mlp(depth: int, width: int, batch: int, inputs: int | None = None, classes: int = 10) -> Network:
    """`depth` hidden layers of `width` relu units."""
    inputs = inputs or width
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += [nn.Linear(width if i else inputs, width), nn.ReLU()]
    return chain(*layers, nn.Linear(width, classes), x=torch.randn(batch, inputs), classes=classes)


def conv_net(batch: int) -> Network:
    """The shape of the network of Dohare et al. for 32 x 32 images: three convolutions, then three linear layers."""
    layers: list[nn.Module] = []
    for channels, filters, kernel in ((3, 32, 5), (32, 64, 3), (64, 128, 3)):
        layers += [nn.Conv2d(channels, filters, kernel), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2)]
    return chain(*layers, x=torch.randn(batch, 3, 32, 32), classes=2)


class _Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, channels: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(filters)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, filters, 1, stride, bias=False), nn.BatchNorm2d(filters))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


def resnet18(batch: int) -> Network:
    """ResNet-18 for 32 x 32 images; the groups are the channels inside its blocks."""
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    blocks = []
    for channels, filters, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        blocks += [_Block(channels, filters, stride), _Block(filters, filters, 1)]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 100))
    groups = [
        UnitGroup(f"{name}.conv1", [f"{name}.conv1"], [f"{name}.conv2"], [f"{name}.bn1"])
        for name, block in model.named_children()
        if isinstance(block, _Block)
    ]
    return Network(model, torch.randn(batch, 3, 32, 32), torch.randint(100, (batch,)), groups)


class _TransformerBlock(nn.Module):
    """Causal attention and an MLP, each after a norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Gpt(nn.Module):
    """A decoder that predicts the next token at every position; logits [batch * length, vocabulary]."""

    def __init__(self, vocabulary: int, length: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def gpt(batch: int, depth: int = 6, width: int = 384, length: int = 64, vocabulary: int = 256) -> Network:
    """A small GPT; the groups are the hidden units of its MLPs."""
    model = _Gpt(vocabulary, length, depth, width, heads=6)
    groups = [UnitGroup(f"blocks.{i}.up", [f"blocks.{i}.up"], [f"blocks.{i}.down"]) for i in range(depth)]
    x = torch.randint(vocabulary, (batch, length))
    return Network(model, x, torch.randint(vocabulary, (batch * length,)), groups)


def build(make: Callable[..., Network], *args: int, device: str = "cpu") -> Network:
    """The network of a constructor above, the same every time."""
    torch.manual_seed(0)
    network = make(*args)
    return Network(network.model.to(device), network.x.to(device), network.y.to(device), network.groups)
