"""Replays of recorded runs of the authors' generate-and-test code; golden/README.md says what was recorded."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cbp_fast import ContinualBackprop, Rule, UnitGroup

TRACES = sorted(Path(__file__).parents[1].glob("golden/*.npz"), key=lambda path: path.name)


class AdamGnT(torch.optim.Optimizer):
    """The authors' Adam as it computes: one step count an element, and only (1 - beta2 ** step) for a correction."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update((key, torch.zeros_like(p)) for key in ("step", "exp_avg", "exp_avg_sq"))
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 0.1)
                state["exp_avg_sq"].lerp_(p.grad**2, 0.001)
                correction = 1 - 0.999 ** state["step"]
                p -= group["lr"] * correction * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + 1e-8)


class Trace:
    """One file: what was recorded, and the network, rule and optimizer that it was recorded with."""

    def __init__(self, path):
        self.data = dict(np.load(path))
        meta = self.meta = json.loads(str(self.data.pop("meta")))
        assert meta["cls"] in ("GnT", "ConvGnT"), "this test knows no other kind of trace"
        self.steps = meta["T"]
        self.synthetic = meta.get("synth", False)
        self.dtype = {"torch.float64": torch.float64, "torch.float32": torch.float32}[meta["dtype"]]
        self.exact = self.dtype == torch.float64
        self.recurring = 1e-9 if self.exact else 1e-4

    def model(self):
        """The network with its initial parameters, and its layers."""
        shapes = [tuple(shape) for shape in self.meta["param_shapes"]]
        activation = {"relu": nn.ReLU, "tanh": nn.Tanh}[self.meta.get("act", "relu")]
        layers = [nn.Linear(s[1], s[0]) if len(s) == 2 else nn.Conv2d(s[1], s[0], s[2:]) for s in shapes[::2]]
        modules = [layers[0]]
        for before, layer in itertools.pairwise(layers):
            modules.append(activation())
            if type(layer) is not type(before):
                modules += [nn.MaxPool2d(2), nn.Flatten()]
            modules.append(layer)
        model = nn.Sequential(*modules).to(self.dtype)
        parameters = list(model.parameters())
        assert [tuple(p.shape) for p in parameters] == shapes
        with torch.no_grad():
            for j, p in enumerate(parameters):
                p.copy_(torch.from_numpy(self.data[f"p{j}_init"]))
        return model, layers

    def optimizer(self, model):
        if self.synthetic:
            return None
        meta = self.meta
        if meta["opt"] == "adamgnt":
            return AdamGnT(model.parameters(), meta["lr"])
        if meta["opt"] == "adam":
            return torch.optim.Adam(model.parameters(), meta["lr"])
        assert meta["opt"] == "sgd"
        options = {"momentum": meta["momentum"], "weight_decay": meta["weight_decay"]}
        return torch.optim.SGD(model.parameters(), meta["lr"], **options)

    def rule(self):
        """The authors clear the state of their own Adam and of no other optimizer; ConvGnT counts all units."""
        hp, conv = self.meta["hp"], self.meta["cls"] == "ConvGnT"
        return Rule.gnt(
            self.meta["util"],
            init=hp["init"],
            act=self.meta.get("act", "relu"),
            accumulate=True if conv else hp["accumulate"],
            accrual="all" if conv else "eligible",
            reset_optimizer=self.meta.get("opt") == "adamgnt",
        )

    def attach(self, model, layers, optimizer, backend):
        hp = self.meta["hp"]
        return ContinualBackprop(
            model,
            optimizer,
            rule=self.rule(),
            replacement_rate=hp["replacement_rate"],
            maturity_threshold=hp["maturity_threshold"],
            decay_rate=hp["decay_rate"],
            groups=[UnitGroup(str(i), [layers[i]], [layers[i + 1]]) for i in range(len(layers) - 1)],
            backend=backend,
        )

    def rows(self, key):
        """Step -> recorded row, of an array that has a row for every step or for some."""
        recorded = self.data.get(key)
        if recorded is None:
            return {}
        every = self.steps // len(recorded)
        # sparse rows are the last step of each stretch, but the sparsest the first
        first = 0 if every == 50 else every - 1
        return dict(zip(range(first, self.steps, every), recorded, strict=True))

    def replaced(self):
        """(step, layer) -> units in the order chosen, and their new weights."""
        found, drawn = {}, {}
        position = {}
        for step, layer, unit in self.data["replaced"].tolist():
            found.setdefault((step, layer), []).append(unit)
            at = position[layer] = position.get(layer, -1) + 1
            drawn.setdefault((step, layer), []).append(self.data[f"drawn_{layer}"][at])
        return found, {key: torch.from_numpy(np.stack(rows)) for key, rows in drawn.items()}

    def forwards(self, model, layers):
        """One forward a step as it was recorded: yields its loss, or None where nothing is trained."""
        meta = self.meta
        stream = np.random.RandomState(meta["seed"] + 1)
        if self.synthetic:
            for _ in range(self.steps):
                for p in model.parameters():
                    noise = 0.01 * stream.standard_normal(tuple(p.shape))
                    p.data += torch.from_numpy(noise.astype(np.float32))
                for reader, shape in zip(layers[1:], meta["feature_shapes"], strict=True):
                    feature = np.maximum(stream.standard_normal(shape) + 0.2, 0).astype(np.float32)
                    reader(torch.from_numpy(feature).to(self.dtype))
                yield None
            return
        shape = (self.steps, meta["batch"])
        x = stream.standard_normal((*shape, *meta["xshape"])).astype(np.float32)
        y = stream.standard_normal((*shape, meta["nout"])).astype(np.float32)
        sums = x.sum(dtype=np.float64), y.sum(dtype=np.float64)
        np.testing.assert_allclose(sums, (meta["x_sum"], meta["y_sum"]), rtol=1e-9)
        for inputs, targets in zip(torch.from_numpy(x), torch.from_numpy(y), strict=True):
            yield ((model(inputs.to(self.dtype)) - targets.to(self.dtype)) ** 2).mean()


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters]).numpy()


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_replay_of_the_authors_run(path, backend):
    trace = Trace(path)
    model, layers = trace.model()
    parameters = list(model.parameters())
    optimizer = trace.optimizer(model)
    cbp = trace.attach(model, layers, optimizer, backend)
    decay, hidden = trace.meta["hp"]["decay_rate"], range(len(layers) - 1)
    replaced, drawn = trace.replaced()
    rows = {key: trace.rows(key) for key in trace.data if key.startswith(("ages", "util", "bcutil", "meanact", "loss"))}
    # utilities were recorded in float32: one rounding apart where everything was computed in float64
    recorded = {"rtol": 2.0**-24 + 1e-12, "atol": 1e-15} if trace.exact else {"rtol": 1e-4, "atol": 1e-6}
    every = 200 if trace.exact else 50
    snapshots = dict(
        zip(range(200 if trace.exact else 0, trace.steps, every), trace.data.get("snap", ()), strict=False)
    )
    seen_rows = 0

    for step, loss in enumerate(trace.forwards(model, layers)):
        if step in snapshots:
            np.testing.assert_allclose(flat(parameters), snapshots[step], rtol=trace.recurring, atol=trace.recurring)
        if optimizer is None:
            cbp.step()
        else:
            np.testing.assert_allclose(loss.item(), trace.data["loss"][step], rtol=trace.recurring)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        groups = cbp.state_dict()["groups"]
        for layer in hidden:
            units = replaced.get((step, layer), [])
            assert cbp.last_replaced[str(layer)].tolist() == units, f"step {step}, layer {layer}"
            age, utility = cbp.age[str(layer)].numpy(), cbp.utility[str(layer)].double().numpy()
            if step in rows.get(f"ages_{layer}", {}):
                np.testing.assert_array_equal(age, rows[f"ages_{layer}"][step])
            if step in rows.get(f"util_{layer}", {}):
                np.testing.assert_allclose(utility, rows[f"util_{layer}"][step], **recorded)
                seen_rows += 1
            if step in rows.get(f"bcutil_{layer}", {}):
                # a replaced unit's was recorded before it was cleared
                kept = np.setdiff1d(np.arange(len(age)), units)
                corrected = utility[kept] / -np.expm1(age[kept] * np.log(decay))
                np.testing.assert_allclose(corrected, rows[f"bcutil_{layer}"][step][kept], **recorded)
                seen_rows += 1
            if step in rows.get(f"meanact_{layer}", {}) and "running_mean" in groups[str(layer)]:
                # the authors keep one mean for all columns of a flattened unit
                mean = groups[str(layer)]["running_mean"].view(len(age), -1).mean(1).numpy()
                np.testing.assert_allclose(mean, rows[f"meanact_{layer}"][step], **recorded)
            if units:
                # only now: the step has drawn numbers of its own there
                weight = layers[layer].weight.detach()
                weight[units] = drawn[step, layer].to(trace.dtype).view(len(units), *weight.shape[1:])

    assert seen_rows > 0
    assert sum(cbp.num_replaced.values()) == len(trace.data["replaced"]) == trace.meta["n_replaced"]
    # Python's doubles on both sides, and the same operations
    pending = [group["pending"] for group in cbp.state_dict()["groups"].values()]
    assert pending == trace.data["accum_final"].tolist()
    if trace.synthetic:
        np.testing.assert_allclose(flat(parameters), trace.data["final"], rtol=1e-12, atol=1e-12)
    else:
        np.testing.assert_allclose(flat(parameters), trace.data["snap"][-1], rtol=trace.recurring, atol=trace.recurring)
    for j, p in enumerate(parameters):
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"opt_p{j}_{key}" in trace.data:
                mine = optimizer.state[p][key].numpy()
                np.testing.assert_allclose(mine, trace.data[f"opt_p{j}_{key}"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", [path for path in TRACES if "bounds" in np.load(path)], ids=lambda path: path.stem)
def test_bounds_of_the_authors_run(path):
    trace = Trace(path)
    bounds = []
    for shape in trace.meta["param_shapes"][:-2:2]:
        bounds.append(trace.rule().bound(int(np.prod(shape[1:])), shape[0], convolution=len(shape) > 2))
    np.testing.assert_allclose(bounds, trace.data["bounds"][:-1], rtol=1e-15)
