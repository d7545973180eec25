"""Networks of the kinds that people train, small: for discovery, and for whatever must hold for all of them."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations


class Net(nn.Module):
    """A hand-written network: its layers by name, and forward(self, *inputs) as a function."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs, **options):
        return self.function(self, *inputs, **options)


def mlp(*between, width=6, out=3):
    return nn.Sequential(nn.Linear(5, width), *between, nn.Linear(width, out))


class BasicBlock(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.down = None
        if stride > 1 or inputs != width:
            self.down = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + (x if self.down is None else self.down(x)))


def resnet18(width=8, classes=5):
    widths = [width, 2 * width, 4 * width, 8 * width]
    stem = (nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks = []
    for stage, out in enumerate(widths):
        blocks += [BasicBlock(widths[max(stage - 1, 0)], out, 2 if stage else 1), BasicBlock(out, out, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        h = self.scale * self.down(F.gelu(self.up(h)))
        return x + h.permute(0, 3, 1, 2)


def convnext(width=6):
    return nn.Sequential(
        nn.Conv2d(3, width, 2, 2),
        *(ConvNeXtBlock(width) for _ in range(2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(width), nn.Linear(width, 3)),
    )


class InvertedResidual(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()),
            *(nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width)),
        )

    def forward(self, x):
        return x + self.body(x)


def mobilenet():
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), InvertedResidual(4, 12), *head)


class Attention(nn.Module):
    """Self-attention with one projection for query, key and value."""

    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(h.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    """A transformer block with the norms before its branches."""

    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 4 * width), nn.GELU())
        self.down, self.drop = nn.Linear(4 * width, width), nn.Dropout(0.1)

    def forward(self, x):
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.down(self.mlp(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, width=8, heads=2, depth=2, patch=4, image=8, classes=3):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class GPT(nn.Module):
    def __init__(self, vocabulary=11, width=8, heads=2, depth=2, length=16, tied=True):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class RMSNorm(nn.Module):
    """As written by hand in many language models."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions, and a gated MLP."""

    def __init__(self, width, heads, kv_heads, hidden):
        super().__init__()
        each = width // heads
        self.heads, self.kv_heads, self.each = heads, kv_heads, each
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, n * each, bias=False) for n in (heads, kv_heads, kv_heads))
        self.o = nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def rotate(self, x):
        angle = torch.arange(x.shape[-2], device=x.device)[:, None] / 10 ** torch.arange(
            self.each // 2, device=x.device
        )
        cos, sin = angle.cos().repeat(1, 2).to(x), angle.sin().repeat(1, 2).to(x)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def forward(self, x):
        b, t, d = x.shape
        h = self.norm1(x)
        q = self.rotate(self.q(h).view(b, t, self.heads, self.each).transpose(1, 2))
        k, v = (f(h).view(b, t, self.kv_heads, self.each).transpose(1, 2) for f in (self.k, self.v))
        k, v = (a.repeat_interleave(self.heads // self.kv_heads, 1) for a in (self.rotate(k), v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(self.each)
        scores = scores.masked_fill(torch.ones(t, t, device=x.device).triu(1).bool(), -torch.inf)
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    def __init__(self, vocabulary=11, width=16, heads=4, kv_heads=2, hidden=12, depth=2):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, kv_heads, hidden) for _ in range(depth))
        self.norm, self.head = RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def actor_critic():
    def forward(m, x):
        h = torch.tanh(m.body(x))
        return torch.distributions.Normal(m.actor(torch.tanh(m.policy(h))), m.log_std.exp()), m.critic(h)

    layers = {"body": nn.Linear(5, 6), "policy": nn.Linear(6, 4), "actor": nn.Linear(4, 2), "critic": nn.Linear(6, 1)}
    return Net(forward, **layers, log_std=nn.Parameter(torch.zeros(2)))


def multi_head():
    heads = nn.ModuleDict({"a": nn.Linear(6, 3), "b": nn.Linear(6, 2)})
    return Net(lambda m, x, task="a": m.heads[task](F.relu(m.body(x))), body=nn.Linear(5, 6), heads=heads)


def tied_autoencoder():
    def forward(m, x):
        h = F.relu(m.encoder(x))
        return F.linear(F.relu(m.inner(h)) + 0 * h, m.encoder.weight.t())

    return Net(forward, encoder=nn.Linear(5, 6), inner=nn.Linear(6, 6))


def lstm():
    return Net(lambda m, x: m.head(m.lstm(m.fc(x))[0]), fc=nn.Linear(5, 6), lstm=nn.LSTM(6, 4), head=nn.Linear(4, 3))


def hand_rnn():
    def forward(m, x):
        h = x.new_zeros(x.shape[1], 6)
        for step in x:
            h = torch.tanh(m.inner(torch.relu(m.inputs(step))) + m.recurrent(h))
        return m.head(h)

    layers = {
        "inputs": nn.Linear(5, 4),
        "inner": nn.Linear(4, 6),
        "recurrent": nn.Linear(6, 6),
        "head": nn.Linear(6, 3),
    }
    return Net(forward, **layers)


def weight_norm():
    return nn.Sequential(
        *(nn.Linear(5, 6), nn.ReLU(), parametrizations.weight_norm(nn.Linear(6, 6)), nn.ReLU()),
        *(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)),
    )


class Conv1D(nn.Module):
    """A linear layer whose weight is [in, out], as transformers has it."""

    def __init__(self, out_features, in_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class LoRA(nn.Module):
    def __init__(self, layer, rank=2):
        super().__init__()
        self.base = layer.requires_grad_(False)
        self.a = nn.Linear(layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, layer.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def lora():
    return nn.Sequential(LoRA(nn.Linear(5, 6)), nn.ReLU(), LoRA(nn.Linear(6, 3)))


def python_if():
    def forward(m, x):
        h = F.relu(m.fc1(x))
        return m.fc3(F.relu(m.fc2(h))) if x.sum() > 0 else m.short(h)

    return Net(forward, fc1=nn.Linear(5, 6), fc2=nn.Linear(6, 4), fc3=nn.Linear(4, 3), short=nn.Linear(6, 3))


class MoE(nn.Module):
    """Every token goes to its best expert."""

    def __init__(self, width=6, experts=2, hidden=10):
        super().__init__()
        self.inputs = nn.Linear(5, width)
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(mlp(nn.ReLU(), width=hidden, out=width) for _ in range(experts))
        for expert in self.experts:
            expert[0] = nn.Linear(width, hidden)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = F.relu(self.inputs(x))
        weight, choice = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            (rows,) = torch.where(choice == i)
            y.index_add_(0, rows, expert(x[rows]) * weight[rows, None])
        return self.head(x + y)


class SqueezeExcite(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, width, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


def squeeze_excite():
    return nn.Sequential(nn.Conv2d(3, 6, 3), SqueezeExcite(6, 4), nn.Conv2d(6, 3, 3))


def gated(function=None, **layers):
    """Two producers of the same units."""
    return Net(
        function or (lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x))),
        **(layers or {"gate": nn.Linear(5, 6), "up": nn.Linear(5, 6)}),
        down=nn.Linear(6, 3),
    )


def fused_glu():
    return gated(lambda m, x: m.down(F.glu(m.both(x))), both=nn.Linear(5, 12))


def spatial_gate(tokens=2, width=6):
    """The gating unit of a gMLP: one half of the features gates the other one, mixed over the tokens."""

    def forward(m, x):
        h, gate = F.gelu(m.both(x)).chunk(2, -1)
        return m.down(h * m.across(m.norm(gate).transpose(1, 2)).transpose(1, 2))

    both, norm, across = nn.Linear(5, 2 * width), nn.LayerNorm(width), nn.Linear(tokens, tokens)
    return Net(forward, both=both, norm=norm, across=across, down=nn.Linear(width, 3))


def fused_swiglu():
    def forward(m, x):
        gate, up = m.both(x).chunk(2, -1)
        return m.down(F.silu(gate) * up)

    return gated(forward, both=nn.Linear(5, 12))


class UNet(nn.Module):
    """Halves and doubles the resolution once, and concatenates what it had."""

    def __init__(self):
        super().__init__()
        self.first, self.deep = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.up, self.last = nn.ConvTranspose2d(6, 5, 2, 2), nn.Conv2d(9, 3, 3, padding=1)

    def forward(self, x):
        a = F.relu(self.first(x))
        b = F.relu(self.deep(F.max_pool2d(a, 2)))
        return self.last(torch.cat([F.relu(self.up(b)), a], 1))


def with_raw_input():
    return Net(lambda m, x: m.b(torch.cat([x, F.relu(m.a(x))], 1)), a=nn.Linear(5, 6), b=nn.Linear(11, 3))


def siamese():
    body = mlp(nn.ReLU(), out=4)
    return Net(lambda m, x: m.head(F.relu(m.body(x) - m.body(x.flip(0)))), body=body, head=nn.Linear(4, 2))


def crelu():
    return Net(lambda m, x: m.b(torch.cat([F.relu(m.a(x)), F.relu(-m.a(x))], 1)), a=nn.Linear(5, 6), b=nn.Linear(12, 3))
