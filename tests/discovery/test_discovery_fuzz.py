"""Discovery on random networks: every group that is found must be right, by an oracle that only runs the network.

A network is a short program: lines that compute one value from others, some through a layer. It is grown line by line,
and a line that does not run is left out. `--networks N` draws N of them.
"""

import random
import re

import networks
import pytest
import torch
import torch.nn.functional as F
from oracle import wrong_groups
from torch import nn

from cbp_fast.discovery import find_unit_groups
from cbp_fast.groups.spec import Part, UnitGroup

# PyTorch's, of lines that nobody would write
pytestmark = pytest.mark.filterwarnings("ignore")

_BATCH = 3
_NAMES = {"torch": torch, "F": F, "nn": nn}

# {a}, {b}, {c} are values, {n} the last size of {a}; a line that does not set {v} is its value. Whatever else is in
# braces is made for the place, see _Blanks.
_LAYERS = """
m.{lin}({a})
m.{lin}({a})
m.{lin}({a})
m.{lin}({a})
m.{square}({a})
m.{again}({a})
m.{conv}({a})
m.{conv}({a})
m.{depthwise}({a})
m.{transposed}({a})
m.{embedding}(tokens)
m.{embedding}(tokens).mean(1)
""".strip()

_USUAL = """
F.relu({a})
F.gelu({a})
torch.tanh({a})
F.silu({a})
F.leaky_relu({a}, 0.1)
F.softplus({a})
torch.sigmoid({a})
{a}.abs()
{a}.square()
-{a}
1 - {a}
2 * {a} + 0.5
{a}.clamp(-1, 1)
F.dropout({a}, 0.2, m.training)
m.{norm}({a})
m.{norm}({a})
m.{norm}({a})
{a} + {b}
{a} + {b}
{a} * {b}
{a} - {b}
torch.cat([{a}, {b}], -1)
torch.cat([{a}, {b}], 1)
torch.stack([{a}, {b}], 1)
torch.sigmoid({a}) * {b}
{a} * torch.tanh({b})
{a} * torch.sigmoid({a})
F.glu({a}, -1)
F.glu({a}, 1)
{a}.chunk(2, -1)[0] * {a}.chunk(2, -1)[1]
F.silu({a}.chunk(2, -1)[0]) * {a}.chunk(2, -1)[1]
{a}[..., : {n} // 2]
{a}[..., ::2]
{a}.flatten(1)
{a}.flatten(2)
{a}.flip(-1)
{a}.roll(1, -1)
{a}.transpose(1, 2)
{a}.permute(0, 2, 3, 1)
{a}.permute(0, 3, 1, 2)
{a}.mean(1)
{a}.mean((2, 3))
{a}.amax(1)
{a}[:, 0]
{a}[:, -1]
F.max_pool2d({a}, 2)
F.avg_pool1d({a}, 2)
F.adaptive_avg_pool2d({a}, 2)
F.pad({a}, (1, 1))
{a} * m.{scale}
{a} + m.{scale}
{a} * m.{constant}
{a} + m.{constant}
{a}.unsqueeze(1) + {b}
{a} * {b}.unsqueeze(1)
{a} * {b}[..., None, None]
F.scaled_dot_product_attention(m.{query}({a}), m.{key}({a}), m.{lin}({a}))
F.scaled_dot_product_attention(m.{query}({a}), m.{key}({a}), m.{square}({a}), is_causal=True)
torch.softmax(m.{query}({a}) @ m.{key}({a}).mT, -1) @ m.{lin}({a})
{a} + m.{back}(F.relu(m.{lin}({a})))
{a} + m.{back}(F.gelu(m.{lin}(m.{norm}({a}))))
m.{norm}({a} + m.{back}(F.relu(m.{lin}({a}))))
""".strip()

_RARE = r"""
torch.exp(-{a}.abs()) * {b}
torch.cos({a}) * {b}
t = torch.sigmoid(m.{square}({a})); {v} = t * {b} + (1 - t) * {a}
torch.lerp({a}, {b}, torch.sigmoid({c}))
torch.where({a} > 0, {b}, {c})
torch.where({a}.mean(-1, keepdim=True) > 0, {b}, {c})
torch.where(m.{constant} > 0, {a}, {b})
{a} / (1 + {b}.abs())
torch.maximum({a}, {b})
torch.addcmul({a}, {b}, {c})
torch.hypot({a}, {b})
({a} > 0) * {b}
{a} ** 2 + {b}
torch.atan2({a}, 1 + {b}.abs())
{a} * {a}.mean(-1, keepdim=True)
{a} - {a}.mean(-1, keepdim=True)
({a} - {a}.mean(-1, keepdim=True)) / (1e-3 + {a}.std(-1, keepdim=True))
({a} - {a}.mean(0)) / (1e-3 + {a}.std(0))
{a} * torch.rsqrt({a}.square().mean(-1, keepdim=True) + 1e-3)
F.normalize({a}, dim=-1)
F.normalize({a}, dim=1)
F.layer_norm({a}, ({n},))
F.layer_norm({a}, ({n},), m.{scale}, m.{scale2})
F.layer_norm({a}, ({n},), {b}.flatten(0, -2).mean(0))
F.layer_norm({a}, ({n},), None, {b}.flatten(0, -2).mean(0))
F.rms_norm({a}, ({n},), {b}.flatten(0, -2).amax(0))
F.batch_norm({a}, {b}.flatten(0, -2).mean(0), {b}.flatten(0, -2).var(0))
F.batch_norm({a}, None, None, {b}.mean(0), training=True)
F.batch_norm({a}, None, None, None, {b}.mean(0), training=True)
F.instance_norm({a})
F.instance_norm({a}, weight={b}.flatten()[: {a}.shape[1]])
F.group_norm({a}, 2, {b}.mean(0), m.{scale})
{a}.softmax(-1)
{a}.softmax(1)
{a}.cumsum(-1)
{a}.cumsum(1)
{a}.unflatten(-1, (2, -1)).amax(-2)
{a}.unflatten(-1, (-1, 2)).amax(-1)
{a}.unflatten(-1, (2, -1)).sum(-2)
{a}.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
{a}.sort(-1).values
{a}.sort(1).values
{a}.topk(2, -1).values
{a}.amax(-1, keepdim=True) * {b}
{a}.logsumexp(-1, keepdim=True) + {b}
{a}.std(-1, keepdim=True) * {b}
{a}.sum(-1, keepdim=True).expand_as({a})
{a}.prod(-1, keepdim=True) + {b}
{a}.norm(dim=-1, keepdim=True) * {b}
{a}.transpose(1, 2) @ {b}
{a} @ {b}.transpose(1, 2)
torch.einsum("bti,btj->bij", {a}, {b})
torch.einsum("bi,bj->bij", {a}, {b}).flatten(1)
torch.einsum("bi,bi->b", {a}, {b})[:, None] * {c}
torch.bmm({a}.unsqueeze(1), {b}.unsqueeze(2)).flatten(1)
torch.outer({a}.mean(0), {b}.mean(0))[:3]
torch.cdist({a}, {b})
F.cosine_similarity({a}, {b}, dim=-1)[..., None] * {c}
F.scaled_dot_product_attention({a}, {a}, {a})
F.scaled_dot_product_attention({a}, {b}, {b})
F.scaled_dot_product_attention(m.{lin}({a}), m.{lin_b}({b}), {c})
torch.softmax(m.{square}({a}) @ m.{square}({a}).mT, -1) @ m.{lin}({a})
F.scaled_dot_product_attention(m.{lin}({a}), m.{lin}({a}), m.{square}({a}))
q = m.{lin}({a}); {v} = F.scaled_dot_product_attention(q, q, q)
q = m.{square}({a}); {v} = F.scaled_dot_product_attention(q, m.{square}({b}), q)
q = m.{square}({a}); {v} = torch.softmax(q @ {a}.mT, -1) @ q
F.scaled_dot_product_attention({a}, {b}, {c}, attn_mask=({a} @ {b}.mT))
F.scaled_dot_product_attention({a}, {b}, {c}, attn_mask=({a} @ {b}.mT) > 0)
torch.softmax({a}.transpose(1, 2) @ {a}, -1) @ {a}.transpose(1, 2)
torch.softmax({a}, -1) * {b}
m.{maxout}({a}).unflatten(-1, (-1, 2)).amax(-1)
m.{table}((({a}.mean(-1).sigmoid() * 8).long()).clamp(0, 7))
m.{table}(({a} > 0).long()[..., 0])
m.{table}({a}.argmax(-1) % 8)
F.embedding(({a}.mean(-1).sigmoid() * 3).long().clamp(0, 2), {b}.flatten(0, -2)[:3])
F.embedding_bag(tokens, {a}.flatten(0, -2).repeat(8, 1)[:8], mode="sum")
F.embedding_bag(tokens, m.{weights}, per_sample_weights={a}, mode="sum")
F.embedding_bag((({a}.sigmoid() * 8).long()).clamp(0, 7), m.{weights}, mode="mean")
F.one_hot({a}.argmax(-1), {n}).to({a}) @ m.{matrix}
F.one_hot({a}.argmax(-1), {n}).to({a}) * {b}
{a}[({b}.flatten(1).mean(1).sigmoid() * 3).long().clamp(0, 2)]
{a}[{b}.flatten(1).mean(1).argsort()]
{a}.gather(-1, ({b} > 0).long())
{a}.gather(1, ({b} > 0).long())
{a}.gather(-1, {b}.argsort(-1))
torch.take_along_dim({a}, {b}.argmax(-1, keepdim=True), -1)
{a}.index_select(-1, ({b}.flatten()[:4] > 0).long())
{a}.index_select(-1, torch.tensor([1, 0, 2]))
{a}.gather(-1, torch.tensor([[2, 0, 1]] * 3))
{a}[..., torch.tensor([3, 1, 1, 0])]
{a}[:, tokens[0] % 2]
{a}[torch.arange(3), tokens[:, 0] % 2]
torch.zeros_like({a}).scatter(-1, ({b} > 0).long(), {a})
torch.zeros_like({a}).scatter_add(-1, ({b} > 0).long(), {c})
{a}.scatter_reduce(-1, tokens[..., :1] % 2, {b}, "amax")
{a}.index_add(0, torch.tensor([0, 0, 1]), {b})
{a}.index_add(1, ({c}.flatten()[: {b}.shape[1]] > 0).long(), {b})
{a}.index_copy(0, torch.tensor([2, 0, 1]), {b})
{a}.index_fill(-1, torch.tensor([1]), 0.5)
{a}.index_put((torch.tensor([0, 0]), torch.tensor([1, 1])), {b}[0, :2], accumulate=True)
{a}.index_put((({c}.flatten(1)[:, 0] > 0).long(),), {b})
{a}.masked_fill({b} > 0, 0.0)
{a}.masked_fill({b}.mean(-1, keepdim=True) > 0, 0.5)
{a}.masked_fill(m.{constant} > 0, 0.0)
{a}.masked_scatter({b} > 0, {c})
torch.masked_select({a}, m.{constant} > 0).reshape(3, -1)
torch.bucketize({a}, torch.tensor([-1.0, 0.0, 1.0])).to({a}) * {b}
torch.searchsorted(torch.sort({a}, -1).values, {b}).to({a})
F.linear({a}, {b}.flatten(0, -2)[:2])
F.linear({a}, m.{hyper}({b}.flatten(1))[0].unflatten(-1, (2, {n})))
F.linear({a}, m.{matrix}, {b}.flatten(0, -2)[0])
({a}.unsqueeze(1) @ m.{hyper}({b}).unflatten(-1, ({n}, 2))).flatten(1)
torch.bmm({a}, m.{hyper}({b}.mean(1)).unflatten(-1, ({n}, 2)))
F.conv1d({a}, {b}[:2, :, :1].expand(2, {a}.shape[1], 1))
F.conv1d({a}, m.{kernel}, {b}.flatten()[:2])
F.conv2d({a}, {b}.flatten()[: 2 * {a}.shape[1]].reshape(2, -1, 1, 1))
F.bilinear({a}, {b}, m.{cube})
torch.baddbmm({a}, {b}, {c})
torch.addmm({a}.mean(0), {b}, m.{matrix}.T)
{a} @ m.{matrix}.T
{a} @ m.{linear}.weight.T
F.linear({a}, m.{linear}.weight, m.{linear}.bias)
F.linear({a}, m.{linear}.weight.detach())
{a} + m.{linear}.bias
{a} * m.{linear}.bias
{a} + m.{linear}.weight.sum()
{a} * m.{linear}.weight.mean(0)
{a} + m.{normed}.weight
{a} * m.{normed}.bias
{a} * m.{normed}.weight.sum()
{a} + m.{stats}.running_mean
{a} - m.{stats}.running_var.mean()
F.batch_norm({a}, m.{stats}.running_mean, m.{stats}.running_var, m.{stats}.weight)
{a} + {b}.mean()
{a} * {b}.sum(-1, keepdim=True)
{a} - {a}.flip(0)
{a} + {b}.roll(1, 0)
{v} = m.{into}({a}[:, 0])\nfor t in range(3):\n    {v} = {v} + m.{cell}(F.relu(m.{cell2}({v})))
{v} = {a}.clone(); {v}[..., :2] = {b}[..., :2]
{v} = {a}.clone(); {v}[:, :2] += {b}[:, :2]
{v} = {a}.clone(); {v}[..., 0] = {b}.mean(-1)
{v} = {a} * 1; {v}.mul_({b})
{v} = {a} * 1; {v}.add_({b}.mean(-1, keepdim=True))
{v} = {a} * 1; {v}[..., :2].relu_()
{v} = {a} * 1; {v}.clamp_(min={b}.mean())
{v} = torch.empty_like({a}); torch.mul({a}, {b}, out={v})
{v} = {a}.new_zeros(3, 2, {n}); {v}[:, 0] = {a}; {v}[:, 1] = {b}
torch.clamp({a}, {b}.amin(), {b}.amax())
torch.clamp({a}, max={b})
F.threshold({a}, 0.1, 0.0)
F.prelu({a}, {b}.flatten()[:1])
F.prelu({a}, m.{scale})
F.interpolate({a}, scale_factor=2)
F.interpolate({a}, scale_factor=2, mode="bilinear")
F.interpolate({a}, size=3, mode="linear")
F.grid_sample({a}, torch.tanh({b}[:, :2]).permute(0, 2, 3, 1), align_corners=False)
F.grid_sample({a}, torch.tanh(m.{two}({b})).unsqueeze(1), align_corners=False)
F.pixel_shuffle({a}, 2)
F.unfold({a}, 2)
F.pad({a}, (1, 1), mode="reflect")
F.pad({a}, (2, 0, 0, 0), value=0.5)
F.lp_pool1d({a}.abs(), 2, 2)
F.max_pool1d({a}.transpose(1, 2), 2)
F.local_response_norm({a}, 2)
{a}.repeat(1, 2)
{a}.repeat_interleave(2, -1)
{a}.unfold(-1, 2, 1).flatten(-2)
{a}.tril()
{a}.diagonal(dim1=1, dim2=2)
{a}.reshape(3, -1, 2)
{a}.reshape(3, 2, -1).transpose(1, 2).flatten(1)
{a}.T.reshape(3, -1)
{a}.view(-1)[: 3 * 2].view(3, 2)
torch.kron({a}.mean(0, keepdim=True), {b})
torch.fft.rfft({a}).abs()
torch.complex({a}, {b}).abs()
torch.view_as_real(torch.complex({a}, {b})).flatten(-2)
torch.cross({a}[..., :3], {b}[..., :3], dim=-1)
torch.cumprod({a}, -1)
torch.logcumsumexp({a}, 1)
torch.diff({a}, dim=-1)
torch.linalg.solve(torch.eye({n}) + 0.1 * {a}[:, :, None] * {a}[:, None], {a})
torch.quantile({a}, 0.5, dim=-1, keepdim=True) * {b}
{a}.median(-1, keepdim=True).values + {b}
torch.func.vmap(lambda r: r * r.sum())({a})
torch.utils.checkpoint.checkpoint(lambda r: F.relu(r), {a}, use_reentrant=False)
m.{bilinear}({a}, {b})
m.{lstm}({a})[0]
m.{gru}({a})[0]
m.{mha}({a}, {a}, {a})[0]
m.{bag}(tokens)
F.gumbel_softmax({a}, dim=-1)
torch.round({a} * 4) / 4
{a} + (torch.round({a}) - {a}).detach()
{a}.detach() * {b}
{a}.sign() * {b}
F.cross_entropy({a}, tokens[:, 0] % {n}) + {b}
F.mse_loss({a}, {b}) * {c}
F.linear({a}, m.{linear}.weight + 1)
F.linear({a}, m.{linear}.weight + {b}.mean())
F.linear({a}, m.{linear}.weight * {b}.flatten(0, -2)[0])
F.linear({a}, m.{linear}.weight, {b}.flatten(0, -2)[0])
F.linear({a}, m.{lin}.weight) + {b}.mean(-1, keepdim=True)
torch.einsum("...i,oi->...o", {a}, m.{linear}.weight)
torch.func.functional_call(m.{linear}, {{"weight": 2 * m.{linear}.weight}}, ({a},), strict=False)
torch.func.functional_call(m.{linear}, {{"bias": {b}.flatten(0, -2)[0]}}, ({a},), strict=False)
torch.func.functional_call(m.{square}, {{"weight": m.{linear}.weight}}, ({a},), strict=False)
p, q = ({a} * 1).chunk(2, -1); {v} = p.mul_(q)
{v} = {a} * 1; {v}[{b} > 0] = 0.5
{v} = {a} * 1; {v}[{b} > 0] = {c}[{b} > 0]
{v} = {a} * 1; {v}[:, torch.tensor([0, 1])] = {b}[:, torch.tensor([1, 0])]
{v} = {a} * 1; {v}.unbind(-1)[0].copy_({b}[..., 0])
{v} = {a} * 1; {v}.transpose(0, 1).add_({b}.transpose(0, 1))
{v} = {a} * 1; {v}.view(-1)[:4].zero_()
{v} = {a} * 1; {v}.as_strided((3, 2), (1, 1)).add_(1)
{v} = {a}.as_strided((3, 4), (2, 1))
{v} = {b} * {a}.sum().item()
{v} = {b} * float({a}.mean())
{v} = {b} * torch.tensor({a}.tolist()).to({b})
{v} = {b} + torch.from_numpy({a}.detach().numpy() * 2)
{a}.sum(0).expand_as({b}) * {b}
m.{prelu}({a})
m.{encoder}({a})
m.{into}({a}) * m.{again4}({b})
m.{into}({a}) + m.{again4}({b})
torch.cat([m.{into}({a}), m.{again4}({b})], -1)
m.{down4}(F.relu(m.{into}({a})) * F.relu(m.{again4}({b})))
m.{down4}(F.relu(m.{into}({a})).softmax(-1) * m.{again4}({b}))
m.{down4}(torch.where(x[..., :1] > 0, m.{into}({a}), m.{again4}({b})))
m.{down4}(torch.maximum(m.{into}({a}), m.{again4}({b})))
m.{down4}(m.{into}({a}) / m.{again4}({b}).exp())
m.{down4}(m.{into}({a}) - m.{again4}({b}).detach())
m.{down4}(m.{into}({a}) * m.{again4}({b}).sigmoid() + x[:, :4])
m.{down4}(m.{into}({a}).sigmoid() * x[:, :4])
m.{down4}(m.{into}({a}).tanh() * x[:, :4])
m.{down4}((m.{into}({a}) > 0) * x[:, :4])
m.{down4}((m.{into}({a}) < 0) * x[:, :4])
m.{down4}(F.relu(m.{into}({a}) - 1) * x[:, :4])
m.{down4}(F.softplus(m.{into}({a})) * x[:, :4])
m.{down4}(torch.exp(m.{into}({a})) + 0 * x[:, :4])
m.{down4}(m.{into}({a}).clamp(min=0.5) * x[:, :4])
m.{down4}(m.{into}({a}).pow(0) * x[:, :4])
m.{down4}(torch.lerp(m.{into}({a}), m.{again4}({b}), 0.3))
m.{down4}(torch.lerp(x[:, :4], m.{into}({a}), m.{again4}({b})))
m.{down4}(torch.addcdiv(m.{into}({a}), x[:, :4], m.{again4}({b}).exp()))
m.{down4}(F.gelu(m.{into}({a})) @ m.{again4}({b}).T @ m.{again4}({b}))
m.{down4}(m.{into}({a}).unsqueeze(-1) * m.{again4}({b}).unsqueeze(-2)).flatten(1)
m.{down4}((m.{into}({a}).unsqueeze(-1) * m.{again4}({b}).unsqueeze(-2)).sum(-1))
m.{down4}(m.{into}({a}) * (x[:, :4] > 0) + m.{again4}({b}) * (x[:, :4] <= 0))
m.{down4}(torch.stack([m.{into}({a}), m.{again4}({b})]).sum(0))
m.{down4}(torch.stack([m.{into}({a}), m.{again4}({b})]).amax(0))
m.{down4}(torch.cat([m.{into}({a})[..., :2], m.{again4}({b})[..., 2:]], -1))
m.{down4}(torch.cat([m.{into}({a}), m.{again4}({b})], -1)[..., ::2])
m.{down4}(torch.cat([m.{into}({a})[..., 2:], m.{again4}({b})[..., :2]], -1)) + m.{down4}(m.{into}({a}))
F.linear(m.{into}({a}), m.{down4}.weight) + F.linear(m.{again4}({b}), m.{down4}.weight)
F.kl_div({a}.log_softmax(-1), {b}.softmax(-1), reduction="batchmean") + {c}
""".strip()

_HEADS = ["m.{head}({a})", "m.{head}({a}).softmax(-1)", "m.{head}({a}).mean(1)", "{a}.mean()"]
_TABLES = [table.split("\n") for table in (_LAYERS, _USUAL, _RARE)]
_TABLES[2] += [
    # one filter for each sample
    "F.conv2d({a}.flatten(0, 1)[None], {b}.flatten()[:3].repeat_interleave({a}.shape[1]).reshape(-1, 1, 1, 1), "
    "groups=3 * {a}.shape[1]).unflatten(1, (3, -1))[0]",
    # cells
    "{v} = torch.zeros(3, 4).to({a})\n"
    "for t in range({a}.shape[1]):\n"
    "    {v} = torch.tanh(m.{into}({a}[:, t]) + m.{cell}({v}))",
    "{v} = {a}\nfor t in range(2):\n    {v} = F.relu(m.{square}({v}))",
    # experts
    "{v} = torch.zeros_like({b})\n"
    "for i in range(2):\n"
    "    rows = torch.where({a}.flatten(1).argmax(1) % 2 == i)[0]\n"
    "    {v} = {v}.index_add(0, rows, {b}[rows] * (i + 1))",
    "{v} = torch.zeros(3, 4).to({a})\n"
    "for i, expert in enumerate((m.{into}, m.{again4})):\n"
    "    rows = torch.where(x[:, 0].sign() > i - 0.5)[0]\n"
    "    {v}.index_add_(0, rows, expert({a}[rows]))",
]


class _Blanks(dict):
    """What stands for the names in the braces of a line; layers are made where they are asked for."""

    def __init__(self, program, rng, values):
        super().__init__()
        self.program, self.rng, self.values = program, rng, values

    def _value(self, like=None):
        names = [n for n, t in self.values.items() if t.is_floating_point()]
        if like is not None and self.rng.random() < 0.8:
            same = [n for n in names if self.values[n].shape == self.values[like].shape]
            names = same if len(same) > 1 else names
        recent = names[-3:] if self.rng.random() < 0.6 else names
        return self.rng.choice(recent)

    def _layer(self, source):
        name = f"f{len(self.program.layers)}"
        self.program.layers[name] = source
        return name

    def _known(self, pattern):
        names = [n for n, s in self.program.layers.items() if re.match(pattern, s)]
        return self.rng.choice(names) if names else self._layer("nn.Identity()")

    def __missing__(self, key):
        made = self[key] = self._made(key)
        return made

    def _made(self, key):
        rng = self.rng
        if key == "a":
            return self._value()
        if key in ("b", "c"):
            return self._value(self["a"])
        a = self.values[self["a"]]
        n, channels, axes, width = a.shape[-1], a.shape[min(1, a.dim() - 1)], a.dim() - 2, rng.choice([4, 6, 6, 8])
        bias = rng.choice(["", "", ", bias=False"])
        if key == "n":
            return n
        if key in ("lin", "query", "key", "head", "into", "two"):
            out = {"head": 3, "into": 4, "two": 2}.get(key, self["width"])
            return self._layer(f"nn.Linear({n}, {out}{bias})")
        if key == "lin_b":
            return self._layer(f"nn.Linear({self.values[self['b']].shape[-1]}, {self['width']})")
        if key == "width":
            return width
        if key in ("square", "maxout"):
            return self._layer(f"nn.Linear({n}, {n if key == 'square' else 2 * n}{bias})")
        if key in ("cell", "cell2"):
            return self._layer("nn.Linear(4, 4)")
        if key == "back":
            return self._layer(f"nn.Linear({self['width']}, {n})")
        if key == "again4":
            return self._layer(f"nn.Linear({self.values[self['b'] if 'b' in self else self['a']].shape[-1]}, 4)")
        if key == "down4":
            return self._layer(f"nn.Linear(4, 3{bias})")
        if key == "prelu":
            return self._layer(f"nn.PReLU({channels})")
        if key == "encoder":
            return self._layer(f"nn.TransformerEncoderLayer({n}, 2, 8, batch_first=True)")
        if key == "again":
            return self._known(rf"nn.Linear\({n}, ")
        if key == "linear":
            return self._known("nn.Linear")
        if key == "normed":
            return self._known("nn.(Batch|Layer|Group|Instance)Norm")
        if key == "stats":
            return self._known(rf"nn.BatchNorm..\({channels}\b")
        if key == "conv":
            groups = rng.choice([1, 1, 1, 2])
            more = rng.choice(
                ["", ", padding=1", ", padding=1", ", stride=2, padding=1", ", padding=1, padding_mode='circular'"]
            )
            return self._layer(
                f"nn.Conv{axes}d({channels}, {width}, {rng.choice([1, 2, 3, 3])}{more}, groups={groups}{bias})"
            )
        if key == "depthwise":
            return self._layer(
                f"nn.Conv{axes}d({channels}, {channels * rng.choice([1, 1, 2])}, 3, padding=1, groups={channels}{bias})"
            )
        if key == "transposed":
            return self._layer(f"nn.ConvTranspose{axes}d({channels}, {width}, 2, {rng.choice([1, 2])}{bias})")
        if key in ("embedding", "table"):
            return self._layer(f"nn.Embedding(8, {width})")
        if key == "bag":
            return self._layer(f"nn.EmbeddingBag(8, {width})")
        if key == "norm":
            of_channels = [
                f"nn.BatchNorm{max(axes, 1)}d({channels})",
                f"nn.GroupNorm(2, {channels})",
                f"nn.GroupNorm(1, {channels})",
            ]
            of_channels.append(f"nn.InstanceNorm{max(axes, 1)}d({channels}, affine=True)")
            return self._layer(
                rng.choice([f"nn.LayerNorm({n})", f"nn.LayerNorm({n})", f"nn.RMSNorm({n})", *of_channels])
            )
        if key in ("scale", "scale2"):
            return self._layer(f"nn.Parameter(torch.randn({n}))")
        if key == "constant":
            return self._layer(f"torch.arange({n}).cos()")
        if key == "matrix":
            return self._layer(f"nn.Parameter(torch.randn({rng.choice([n, 4])}, {n}))")
        if key == "weights":
            return self._layer(f"nn.Parameter(torch.randn(8, {width}))")
        if key == "kernel":
            return self._layer(f"nn.Parameter(torch.randn(2, {channels}, 1))")
        if key == "cube":
            return self._layer(f"nn.Parameter(torch.randn(2, {n}, {self.values[self['b']].shape[-1]}))")
        if key == "bilinear":
            return self._layer(f"nn.Bilinear({n}, {self.values[self['b']].shape[-1]}, {width})")
        if key == "hyper":
            b = self.values[self["b"]]
            inputs = b.shape[-1] if b.dim() == 2 or rng.random() < 0.5 else b[0].numel()
            return self._layer(f"nn.Linear({inputs}, {2 * n})")
        if key in ("lstm", "gru"):
            return self._layer(f"nn.{key.upper()}({n}, 4, batch_first=True)")
        if key == "mha":
            return self._layer(f"nn.MultiheadAttention({n}, 2, batch_first=True)")
        raise KeyError(key)


class Program:
    """A network as text.

    Attributes:
        layers: the source of each layer, parameter or buffer, by name.
        lines: name of a value and the lines that compute it.
        outputs: expressions of what forward() returns.
        training: the mode that it is in.
    """

    def __init__(self):
        self.layers, self.lines, self.outputs, self.training = {}, [], [], False

    def text(self):
        parts = [f"m.{name} = {source}" for name, source in self.layers.items() if self._used(name)]
        body = [part for _, line in self.lines for part in line.split("\n")]
        returned = ", ".join(self.outputs) + ","
        if len(self.outputs) > 2:
            returned = f"{{'first': {self.outputs[0]}, 'others': [{', '.join(self.outputs[1:])}]}}"
        return "\n".join(
            [
                *parts,
                "def forward(m, x, sequence, image, tokens):",
                *(f"    {part}" for part in body),
                f"    return {returned}",
            ]
        )

    def _used(self, name):
        return any(re.search(rf"\bm\.{name}\b", text) for text in (*(line for _, line in self.lines), *self.outputs))

    def build(self):
        torch.manual_seed(0)
        model = networks.Net(None)
        for name, source in self.layers.items():
            if self.lines and not self._used(name) and self.outputs:
                continue
            layer = eval(source, _NAMES)
            if isinstance(layer, (nn.Module, nn.Parameter)):
                setattr(model, name, layer)
            else:
                model.register_buffer(name, layer)
        space = dict(_NAMES)
        if self.outputs:
            exec(self.text()[self.text().index("def forward") :], space)
            model.function = space["forward"]
        return model.train(self.training)

    def without_dead_lines(self):
        kept, needed = [], " ".join(self.outputs)
        for name, line in reversed(self.lines):
            if re.search(rf"\b{name}\b", needed):
                kept.insert(0, (name, line))
                needed += " " + line
        short = Program()
        short.layers, short.lines, short.outputs, short.training = self.layers, kept, self.outputs, self.training
        return short


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = (_BATCH, 5), (_BATCH, 4, 6), (_BATCH, 2, 5, 5)
    return *(torch.randn(shape, generator=generator) for shape in shapes), torch.randint(
        8, (_BATCH, 4), generator=generator
    )


def grow(seed):
    """A random program."""
    rng, program = random.Random(seed), Program()
    program.training = rng.random() < 0.3
    values = dict(zip(("x", "sequence", "image", "tokens"), inputs(0), strict=True))
    rare = rng.choice([0, 1, 4, 10])
    model = networks.Net(None).train(program.training)
    for _ in range(rng.randint(3, 9)):
        for _ in range(8):
            # the first line is a layer
            template = rng.choice(rng.choices(_TABLES, [5, 5, rare])[0] if program.lines else _TABLES[0])
            if _line(program, rng, model, values, template):
                break
    unread = [
        name
        for name in values
        if name.startswith("v")
        and not any(re.search(rf"\b{name}\b", line.split("=", 1)[1]) for _, line in program.lines)
    ]
    for name in unread or list(values)[-1:]:
        if not values[name].is_floating_point():
            continue
        template = rng.choices(_HEADS, [8, 1, 1, 0.5])[0].replace("{a}", name)
        blanks = _Blanks(program, rng, values)
        blanks["a"] = name
        if values[name].dim() > 0:
            program.outputs.append(template.format_map(blanks))
    return program


def _line(program, rng, model, values, template):
    """Adds a line made from a template, if it runs."""
    for _ in range(3):
        before = dict(program.layers)
        name = f"v{len(program.lines)}"
        blanks = _Blanks(program, rng, values)
        blanks["v"] = name
        line = template.replace("\\n", "\n").format_map(blanks)
        line = line if "{v}" in template else f"{name} = {line}"
        try:
            for key in program.layers.keys() - before.keys():
                layer = eval(program.layers[key], _NAMES)
                setattr(model, key, layer.train(program.training) if isinstance(layer, nn.Module) else layer)
            space = {**_NAMES, **values, "m": model}
            exec(line, space)
            made = space[name]
            if (
                isinstance(made, torch.Tensor)
                and made.numel() < 2000
                and made.dim() < 5
                and made.dim() > 1
                and made.isfinite().all()
                and made.shape[0] == _BATCH
            ):
                values[name] = made
                program.lines.append((name, line))
                return True
        except Exception:  # whatever a line says of shapes that it is not made for
            pass
        program.layers = before
    return False


def check(program, options):
    """How many groups discovery finds, and why some are wrong."""
    model = program.build()
    groups = find_unit_groups(model, inputs(0), **options)
    return len(groups), wrong_groups(model, groups, [inputs(1), inputs(2)]) if groups else {}


def shrunk(program, options):
    """The shortest program to be had by leaving out lines for which a group is still wrong."""

    def fails(candidate):
        try:
            return bool(check(candidate, options)[1])
        except Exception:
            return False

    again = True
    while again:
        again = False
        for candidate in _shorter(program):
            candidate = candidate.without_dead_lines()
            if len(candidate.text()) < len(program.text()) and fails(candidate):
                program, again = candidate, True
                break
    return program


def _shorter(program):
    def copy(lines, outputs):
        candidate = Program()
        candidate.layers, candidate.lines, candidate.outputs, candidate.training = (
            program.layers,
            lines,
            outputs,
            program.training,
        )
        return candidate

    for i in range(len(program.outputs)):
        if len(program.outputs) > 1:
            yield copy(program.lines, program.outputs[:i] + program.outputs[i + 1 :])
    names = [name for name, _ in program.lines]
    for i, name in enumerate(names):
        # a value in place of the line that would compute another one
        for other in ("x", "sequence", "image", *names[:i]):
            swap = lambda text, old=name, new=other: re.sub(rf"\b{old}\b", new, text)  # noqa: E731
            yield copy(
                [(n, swap(line)) for n, line in program.lines[:i] + program.lines[i + 1 :]],
                [swap(output) for output in program.outputs],
            )


def options_of(seed):
    rng = random.Random(-seed)
    return {"include_coupled": rng.random() < 0.5, "unreached_ok": rng.random() < 0.2}


def sweep(seeds):
    """How many networks of these seeds have a group; fails on the first wrong one."""
    found = 0
    for seed in seeds:
        program, options = grow(seed), options_of(seed)
        count, wrong = check(program, options)
        found += count > 0
        if wrong:
            short = shrunk(program, options)
            mode = "train()" if short.training else "eval()"
            pytest.fail(
                f"network {seed} ({options}): {wrong}\nin short, in {mode}:\n{short.text()}\n{check(short, options)[1]}"
            )
    return found


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_groups_of_random_networks_are_right(first):
    # not because nothing is found
    assert sweep(range(first, first + 50)) >= 30


# in parts, so that they run beside each other
@pytest.mark.exhaustive
@pytest.mark.parametrize("part", range(20))
def test_groups_of_many_random_networks_are_right(part, request):
    count = request.config.getoption("--networks") // 20
    assert sweep(range(1000 + part * count, 1000 + (part + 1) * count)) >= count * 0.6


def _net(function, **layers):
    return networks.Net(function, **layers)


def _linears(*sizes):
    return {f"f{i}": nn.Linear(*size) for i, size in enumerate(sizes)}


def _batch_norm():
    return {**_linears((5, 6), (6, 3)), "norm": nn.BatchNorm1d(6)}


_CHAIN = UnitGroup("g", ["f0"], ["f1"])
_NORMED = UnitGroup("g", ["f0"], ["f1"], ["norm"])
# what the oracle must say of groups that are known: nothing, or a reason that begins with A or B
_KNOWN = {
    "a chain": ("", lambda m, x: m.f1(F.relu(m.f0(x))), _linears((5, 6), (6, 3)), _CHAIN),
    "a norm": ("", lambda m, x: m.f1(m.norm(m.f0(x))), _batch_norm(), _NORMED),
    "a norm over features": (
        "",
        lambda m, x: m.f1(m.norm(m.f0(x))),
        {**_linears((5, 6), (6, 3)), "norm": nn.LayerNorm(6)},
        _NORMED,
    ),
    "flattened channels": (
        "",
        lambda m, x: m.f1(m.f0(x[:, None]).flatten(1)),
        {"f0": nn.Conv1d(1, 4, 3), "f1": nn.Linear(12, 3)},
        _CHAIN,
    ),
    "grouped convolutions": (
        "",
        lambda m, x: m.f1(F.relu(m.f0(x[:, None]))),
        {"f0": nn.Conv1d(1, 4, 3), "f1": nn.Conv1d(4, 6, 2, groups=2)},
        _CHAIN,
    ),
    "a part": (
        "",
        lambda m, x: m.f1(m.f0(x)[:, 2:]) + m.f0(x)[:, :1],
        _linears((5, 6), (4, 3)),
        UnitGroup("g", [Part("f0", 2)], ["f1"], num_units=4),
    ),
    "constants beside a unit": ("", lambda m, x: m.f1(torch.exp(m.f0(x))), _linears((5, 6), (6, 3)), _CHAIN),
    "a gate of data by tanh": ("", lambda m, x: m.f1(torch.tanh(m.f0(x)) * x), _linears((5, 5), (5, 3)), _CHAIN),
    "a part shifted by one": (
        "B",
        lambda m, x: m.f1(m.f0(x)[:, 2:]) + m.f0(x)[:, :1],
        _linears((5, 6), (4, 3)),
        UnitGroup("g", [Part("f0", 1)], ["f1"], num_units=4),
    ),
    "a second reader": ("A", lambda m, x: (m.f1(m.f0(x)), m.f2(m.f0(x))), _linears((5, 6), (6, 3), (6, 2)), _CHAIN),
    "an output": ("A", lambda m, x: {"y": m.f1(m.f0(x)), "h": [m.f0(x)]}, _linears((5, 6), (6, 3)), _CHAIN),
    "the last unit alone": ("A", lambda m, x: m.f1(m.f0(x)) + m.f0(x)[:, 5:], _linears((5, 6), (6, 3)), _CHAIN),
    "an integer": ("A", lambda m, x: (m.f1(m.f0(x)), m.f0(x).argmax(-1)), _linears((5, 6), (6, 3)), _CHAIN),
    "a norm entry elsewhere": ("A", lambda m, x: m.f1(m.norm(m.f0(x))) + m.norm.bias[:3], _batch_norm(), _NORMED),
    "a norm by hand": (
        "A",
        lambda m, x: m.f1(m.f0(x) - m.f0(x).mean(-1, keepdim=True)),
        _linears((5, 6), (6, 3)),
        _CHAIN,
    ),
    "a bias elsewhere": ("A", lambda m, x: m.f1(m.f0(x)) + m.f0.bias[:3], _linears((5, 6), (6, 3)), _CHAIN),
    "softmax": ("A", lambda m, x: m.f1(m.f0(x).softmax(-1)), _linears((5, 6), (6, 3)), _CHAIN),
    "data in its columns": ("B", lambda m, x: m.f1(m.f0(x) + x), _linears((5, 5), (5, 3)), _CHAIN),
    "a gate of data by sigmoid": ("B", lambda m, x: m.f1(m.f0(x).sigmoid() * x), _linears((5, 5), (5, 3)), _CHAIN),
    "a mask of data": ("B", lambda m, x: m.f1(x.masked_fill(m.f0(x) > 0, 0)), _linears((5, 5), (5, 3)), _CHAIN),
    "other units": ("B", lambda m, x: m.f1(m.f0(x) + m.f2(x)), _linears((5, 6), (6, 3), (5, 6)), _CHAIN),
    "a matrix read elsewhere": (
        "B",
        lambda m, x: m.f1(m.f0(x)) + x @ m.f1.weight.T,
        _linears((5, 5), (5, 3)),
        _CHAIN,
    ),
}


@pytest.mark.parametrize("name", _KNOWN)
def test_the_oracle_knows_right_from_wrong(name):
    verdict, function, layers, group = _KNOWN[name]
    found = wrong_groups(_net(function, **layers), [group], [(torch.randn(3, 5),), (torch.randn(3, 5),)])
    assert found.get("g", "").partition(": ")[2][:1] == verdict, found


def test_the_oracle_leaves_the_model_alone(everything):
    model = _net(lambda m, x: m.f1(m.norm(m.f0(x))), **_batch_norm())
    before = everything(model)
    wrong_groups(model, [_NORMED], [(torch.randn(3, 5),), (torch.randn(3, 5),)])
    assert everything(model) == before
