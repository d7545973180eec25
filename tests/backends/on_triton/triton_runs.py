"""Short runs of small models, as the tests of the Triton backend share them."""

import itertools

import torch
from torch import nn

from cbp_fast import ContinualBackprop, Part, Rule, UnitGroup


def mlp(widths, dtypes=(torch.float32,), seed=0):
    """Linear layers and ReLUs, each layer of the next type in turn."""
    torch.manual_seed(seed)

    class Cast(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.dtype = dtype

        def forward(self, x):
            return x.to(self.dtype)

    layers = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
        dtype = dtypes[i % len(dtypes)]
        layers += [nn.Linear(fan_in, fan_out, dtype=dtype), nn.ReLU()]
        if len(dtypes) > 1:
            layers.append(Cast(dtypes[(i + 1) % len(dtypes)]))
    return nn.Sequential(*layers)


def linear_groups(model):
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    return [UnitGroup(f"g{i}", [a], [b]) for i, (a, b) in enumerate(itertools.pairwise(layers))]


def attach(model, backend, *, optimizer=None, **options):
    options = {"replacement_rate": 0.2, "maturity_threshold": 1, "seed": 7, **options}
    return ContinualBackprop(model, optimizer, backend=backend, **options)


def train(backend, rule, widths=(9, 17, 12, 3), steps=3, dyadic=False, dtypes=(torch.float32,), **options):
    """A short training run; all that it leaves and chose. Dyadic: every step on new whole numbers, no learning."""
    model = mlp(widths, dtypes)
    optimizer = torch.optim.SGD(model.parameters(), 0.0 if dyadic else 0.05, momentum=0.5)
    options.setdefault("groups", linear_groups(model))
    cbp = attach(model, backend, optimizer=optimizer, rule=rule, **options)
    generator = torch.Generator().manual_seed(1)
    chosen = []
    for _ in range(steps):
        shape = (8, widths[0])
        x = torch.randint(-2, 3, shape, generator=generator) if dyadic else torch.randn(shape, generator=generator)
        for p in model.parameters() if dyadic else ():
            p.data.copy_(torch.randint(-2, 3, p.shape, generator=generator))
        optimizer.zero_grad()
        model(x.to(dtypes[0])).float().square().mean().backward()
        optimizer.step()
        chosen.append({name: units.tolist() for name, units in cbp.last_replaced.items()})
    return model, optimizer, cbp, chosen


def assert_same_run(mine, theirs, rtol=0.0):
    (a, a_optimizer, a_cbp, a_chosen), (b, b_optimizer, b_cbp, b_chosen) = mine, theirs
    assert a_chosen == b_chosen
    # a bias is given sums of means where units are transferred
    moved = 2.0**-20 if a_cbp.rule.transfer_bias else 0.0
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=moved * name.endswith("bias"))
        assert torch.equal(a_optimizer.state[p]["momentum_buffer"], b_optimizer.state[q]["momentum_buffer"]), name
    for name, utility in a_cbp.utility.items():
        torch.testing.assert_close(utility, b_cbp.utility[name], rtol=rtol, atol=0)
        assert torch.equal(a_cbp.age[name], b_cbp.age[name])
    for field in ("step", "num_replaced", "count"):
        assert torch.equal(getattr(a_cbp._engine.state, field), getattr(b_cbp._engine.state, field)), field


def engine_of(groups, rule=None, **options):
    members = [m.layer if isinstance(m, Part) else m for group in groups for role in group for m in role]
    model = nn.ModuleList(dict.fromkeys(members))
    units = [UnitGroup(f"g{i}", *group) for i, group in enumerate(groups)]
    options = {"replacement_rate": 0.5, "maturity_threshold": 0, "seed": 3, **options}
    return ContinualBackprop(model, rule=rule or Rule.nature(), groups=units, **options)
