"""state_dict and load_state_dict: a resumed run is the uninterrupted one, and what does not fit changes nothing."""

import copy
import io
import math
import random
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from cbp_fast import ContinualBackprop, Rule

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 0.003),
    "fused adamw": lambda parameters: torch.optim.AdamW(parameters, 0.003, fused=True),
}
RULES = {
    "nature": Rule.nature(),
    "transfer": Rule.nature(transfer_bias=True),
    "clarena": Rule.clarena(),
    "centred": Rule.gnt("adaptable_contribution"),
    "coin": Rule.gnt(accumulate=False),
    "random": Rule.gnt("random", accrual="all"),
    "as attached": Rule.nature(init="as_attached"),
}


class Run:
    """A training run on a fixed stream, which can be saved and gone on with."""

    def __init__(self, backend, rule=RULES["nature"], optimizer="adam", dtype=torch.float32, **options):
        torch.manual_seed(0)
        layers = [nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10), nn.LayerNorm(10), nn.ReLU(), nn.Linear(10, 2)]
        self.model = nn.Sequential(*layers).to(dtype)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        rate = 0.15 if rule.name == "clarena" else 0.05
        options = {"replacement_rate": rate, "maturity_threshold": 5, "decay_rate": 0.9, "seed": 1, **options}
        self.cbp = ContinualBackprop(self.model, self.optimizer, rule=rule, backend=backend, **options)
        self.replaced, self.dtype = [], dtype

    def train(self, steps):
        for step in steps:
            x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).to(self.dtype)
            loss = (self.model(x) - x[:, :2]).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.replaced.append([units.tolist() for units in self.cbp.last_replaced.values()])
        return self

    def save(self):
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (self.model, self.optimizer, self.cbp)], file)
        file.seek(0)
        return file

    def load(self, file):
        states = torch.load(file, weights_only=True)
        for part, state in zip((self.model, self.optimizer, self.cbp), states, strict=True):
            part.load_state_dict(state)
        return self


def test_keys_and_types():
    cbp = Run("cpp", RULES["transfer"]).train(range(10)).cbp
    state = cbp.state_dict()
    assert {key: type(value) for key, value in state.items()} == {
        "rule": dict,
        "replacement_rate": float,
        "maturity_threshold": int,
        "decay_rate": float,
        "seed": int,
        "step": int,
        "groups": dict,
    }
    assert state["rule"] == {
        "name": "nature",
        "utility": "contribution",
        "init": "kaiming",
        "act": "relu",
        "accumulate": True,
        "accrual": "eligible",
        "transfer_bias": True,
        "reset_optimizer": True,
    }
    assert list(state["groups"]) == ["0", "2"]
    group = state["groups"]["2"]
    assert list(group) == ["utility", "age", "pending", "num_replaced", "running_mean"]
    assert {key: (value.dtype, value.shape) for key, value in group.items() if isinstance(value, torch.Tensor)} == {
        "utility": (torch.float32, (10,)),
        "age": (torch.int32, (10,)),
        "running_mean": (torch.float64, (10,)),
    }
    assert (type(group["pending"]), type(group["num_replaced"])) == (float, int)


def test_a_running_mean_is_saved_where_it_is_kept():
    assert "running_mean" not in Run("cpp").cbp.state_dict()["groups"]["0"]


def test_what_was_saved_does_not_follow_the_run(backend, everything):
    run = Run(backend, RULES["transfer"]).train(range(10))
    state = run.cbp.state_dict()
    before = copy.deepcopy(state)
    run.train(range(10, 20))
    run.cbp.replacement_rate = 0.5
    torch.testing.assert_close(state["groups"], before["groups"], rtol=0, atol=0)
    assert {k: v for k, v in state.items() if k != "groups"} == {k: v for k, v in before.items() if k != "groups"}


@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [
        ("nature", "adam"),
        ("nature", "sgd"),
        ("transfer", "adam"),
        ("clarena", "sgd"),
        ("centred", "adam"),
        ("coin", "sgd"),
        ("random", "adam"),
        ("as attached", "fused adamw"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(backend, everything, rule, optimizer):
    rule = RULES[rule]
    whole = Run(backend, rule, optimizer).train(range(45))
    first = Run(backend, rule, optimizer).train(range(23))
    # other numbers to begin with: all of them have to come from the file
    second = Run(backend, rule, optimizer, replacement_rate=0.5, maturity_threshold=1, decay_rate=0.3, seed=99)
    second.train(range(200, 207)).load(first.save())
    second.replaced.clear()
    second.train(range(23, 45))
    assert first.replaced + second.replaced == whole.replaced
    assert sum(whole.cbp.num_replaced.values()) > 10
    assert everything(second.model, second.optimizer, second.cbp) == everything(whole.model, whole.optimizer, whole.cbp)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [RULES["nature"], RULES["clarena"]], ids=lambda rule: rule.name)
def test_a_run_goes_on_with_the_other_backend(everything, rule, dtype):
    expected = Run("cpp", rule, dtype=dtype).train(range(40))
    for one, other in (("cpp", "reference"), ("reference", "cpp")):
        first = Run(one, rule, dtype=dtype).train(range(20))
        second = Run(other, rule, dtype=dtype).load(first.save()).train(range(20, 40))
        assert first.replaced + second.replaced == expected.replaced
        assert everything(second.model) == everything(expected.model)


def test_rates_and_seed_come_from_the_file(backend):
    state = Run(backend, seed=-7).cbp.state_dict()
    cbp = Run(backend, replacement_rate=1, maturity_threshold=0, decay_rate=0, seed=3).cbp
    cbp.load_state_dict(state)
    assert (cbp.replacement_rate, cbp.maturity_threshold, cbp.decay_rate) == (0.05, 5, 0.9)
    assert cbp.state_dict()["seed"] == -7


@pytest.mark.parametrize("seed", [0, 2**63 - 1, 2**63, 2**64 - 1, -1, -(2**63)])
def test_any_seed_can_be_saved(backend, everything, seed):
    run = Run(backend, seed=seed).train(range(10))
    other = Run(backend, seed=5).load(run.save())
    for r in (run, other):
        r.train(range(10, 20))
    assert everything(other.model, other.cbp) == everything(run.model, run.cbp)


def test_forwards_before_loading_are_forgotten(backend):
    run = Run(backend)
    state = run.cbp.state_dict()
    run.model(torch.ones(3, 12))
    run.cbp.load_state_dict(state)
    with pytest.warns(UserWarning, match="no training forward"):
        run.cbp.step()
    assert run.cbp.state_dict()["step"] == 0


def test_nothing_was_replaced_last_after_loading(backend):
    run = Run(backend, replacement_rate=1).train(range(6))
    assert len(run.cbp.last_replaced["0"]) > 0
    run.cbp.load_state_dict(run.cbp.state_dict())
    assert len(run.cbp.last_replaced["0"]) == 0


# what does not fit


def at(*path):
    """A change of the entry at the end of a path of keys."""
    *parents, last = path

    def change(value):
        def apply(state):
            for key in parents:
                state = state[key]
            if value is KeyError:
                del state[last]
            else:
                state[last] = value(state[last]) if callable(value) else value

        return apply

    return change


GROUP = "groups", "2"
BAD_STATES = {
    "no rule": (at("rule")(KeyError), "missing .*'rule'"),
    "no groups": (at("groups")(KeyError), "missing .*'groups'"),
    "no rate": (at("replacement_rate")(KeyError), "missing .*'replacement_rate'"),
    "one more key": (at("version")(2), "unexpected .*'version'"),
    "another rule": (at("rule", "name")("clarena"), "rule"),
    "another init": (at("rule", "init")("xavier"), "xavier"),
    "rule of another kind": (at("rule")("nature"), "rule"),
    "rule none": (at("rule")(None), "rule"),
    "rule number": (at("rule")(5), "rule"),
    "groups of another kind": (at("groups")([]), "groups.* list"),
    "one group less": (at(*GROUP)(KeyError), "another network.* missing .*'2'"),
    "one group more": (at("groups", "4")({}), "another network.* unexpected .*'4'"),
    "group of another kind": (at(*GROUP)(None), "group '2'"),
    "no utility": (at(*GROUP, "utility")(KeyError), "group '2'.* missing .*'utility'"),
    "a running mean": (at(*GROUP, "running_mean")(torch.zeros(10)), "group '2'.* unexpected .*'running_mean'"),
    "wider group": (at(*GROUP, "utility")(torch.zeros(11)), r"utility of group '2' is \(11,\)"),
    "utility of another type": (at(*GROUP, "utility")(lambda u: u.double()), "utility of group '2' is .*float64"),
    "utility no tensor": (at(*GROUP, "utility")([0.0] * 10), "utility of group '2' is list"),
    "utility nan": (at(*GROUP, "utility")(lambda u: u * math.nan), "utility of group '2'"),
    "utility negative": (
        at(*GROUP, "utility")(lambda u: u - 1000),
        "utility of group '2' .*negative",
    ),
    "age negative": (at(*GROUP, "age")(lambda a: a - 1000), "age of group '2'"),
    "age of another type": (at(*GROUP, "age")(lambda a: a.long()), "age of group '2' is .*int64"),
    "pending negative": (at(*GROUP, "pending")(-0.5), "pending of group '2' is -0.5"),
    "pending nan": (at(*GROUP, "pending")(math.nan), "pending of group '2' is nan"),
    "pending infinite": (at(*GROUP, "pending")(math.inf), "pending of group '2' is inf"),
    "pending none": (at(*GROUP, "pending")(None), "pending of group '2' is None"),
    "total negative": (at(*GROUP, "num_replaced")(-1), "num_replaced of group '2' is -1"),
    "total too large": (at(*GROUP, "num_replaced")(2**63), "num_replaced of group '2' is 9223372036854775808"),
    "seed of another kind": (at("seed")("7"), "seed is '7'"),
    "seed too large": (at("seed")(2**64), "seed is 18446744073709551616"),
    "step negative": (at("step")(-3), "step is -3"),
    "step of another kind": (at("step")(1.5), "step is 1.5"),
    "step too large": (at("step")(2**63), "step is 9223372036854775808"),
    "rate above 1": (at("replacement_rate")(1.5), "replacement_rate is 1.5"),
    "threshold negative": (at("maturity_threshold")(-1), "maturity_threshold is -1"),
    "decay 1": (at("decay_rate")(1.0), "decay_rate is 1"),
    "rate no number": (at("replacement_rate")("1e-4"), "replacement_rate is '1e-4'"),
}


@pytest.mark.parametrize(("change", "message"), BAD_STATES.values(), ids=BAD_STATES.keys())
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(backend, everything, change, message):
    state = Run(backend, seed=4).train(range(12)).cbp.state_dict()
    change(state)
    run = Run(backend).train(range(100, 117))
    # a forward that is still to be used
    run.model(torch.ones(2, 12))
    before = everything(run.model, run.optimizer, run.cbp)
    with pytest.raises((ValueError, TypeError), match=message):
        run.cbp.load_state_dict(state)
    assert everything(run.model, run.optimizer, run.cbp) == before
    run.cbp.step()
    assert run.cbp.state_dict()["step"] == 18


@pytest.mark.parametrize("state", [None, 3, [], {}], ids=repr)
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match="state_dict"):
        Run("cpp").cbp.load_state_dict(state)


def test_a_state_of_another_network_is_refused(everything):
    run = Run("cpp")
    other = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 11), nn.ReLU(), nn.Linear(11, 2))
    before = everything(run.cbp)
    with pytest.raises(ValueError, match="group '2'"):
        run.cbp.load_state_dict(ContinualBackprop(other).state_dict())
    assert everything(run.cbp) == before


# anything at all


class Hostile(dict):
    """A mapping that fails when it is read."""

    def __getitem__(self, key):
        raise RuntimeError("no")

    def __iter__(self):
        raise KeyError("no")


class Silent:
    def __repr__(self):
        raise RuntimeError("no")


def values_of(rng, entry):
    """Values that an entry may not have, and some that it may."""
    # what was changed before may be no tensor to make others of
    plain = type(entry) is torch.Tensor and entry.dim() == 1 and entry.layout == torch.strided
    plain = plain and entry.device.type == "cpu" and entry.dtype in (torch.float32, torch.float64, torch.int32)
    plain = plain and entry.untyped_storage().nbytes() > 0
    like = entry if plain else torch.zeros(3)
    n = len(like)
    history = (torch.ones(n, requires_grad=True) * 2).to(like.dtype) if like.is_floating_point() else torch.ones(n)
    freed = torch.zeros(n, dtype=like.dtype)
    freed.untyped_storage().resize_(0)
    return rng.choice(
        [
            *(None, "", "1", b"", [], (), {}, set(), object(), Silent(), Hostile(a=1), print, type, Ellipsis),
            *(True, False, 0, 1, -1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 10**400),
            *(
                0.0,
                -0.0,
                -1.0,
                0.5,
                math.nan,
                math.inf,
                -math.inf,
                1e308,
                1j,
                np.float64(0.5),
                np.int64(3),
                np.bool_(1),
            ),
            *(np.zeros(n), np.float32("nan"), Fraction(1, 3), Decimal(1)),
            *(torch.tensor(1), torch.tensor(0.5), torch.zeros(0), torch.zeros(n + 1, dtype=like.dtype)),
            *(like.to_sparse(), like.to(torch.complex64), torch.empty_like(like, device="meta"), history, freed),
            *(nn.Parameter(torch.zeros(n)), like.half(), like.bool(), like[None], torch.zeros((), dtype=like.dtype)),
            *(
                torch.zeros(1, dtype=like.dtype).expand(n),
                torch.quantize_per_tensor(torch.zeros(n), 0.1, 0, torch.qint8),
            ),
            torch.full((n,), math.nan, dtype=like.dtype) if like.is_floating_point() else like - 2**31,
            *(torch.nested.nested_tensor([torch.zeros(n)]), torch.zeros(n, dtype=like.dtype).as_subclass(Odd)),
        ]
    )


class Odd(torch.Tensor):
    pass


def mutated(rng, state):
    """A state with one or two entries changed, left out, added or under other keys; and where."""
    state = copy.deepcopy(state)
    for _ in range(rng.choice((1, 1, 2))):
        places = []

        def walk(mapping, places=places):
            for key, value in mapping.items():
                places.append((mapping, key))
                if type(value) is dict:
                    walk(value, places)

        walk(state)
        mapping, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del mapping[key]
        elif kind == 1:
            mapping[rng.choice((1, None, (1, 2), "more", b"key", 1.5, frozenset(), torch.ones(1)))] = mapping[key]
        elif kind == 2:
            mapping[rng.choice((0, True, None, str(key) + " "))] = mapping.pop(key)
        elif kind == 3 and type(mapping[key]) is dict:
            mapping[key] = Hostile(mapping[key])
        else:
            mapping[key] = values_of(rng, mapping[key])
    return state


def check_mutations(number, rule, seed):
    rng = random.Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Run("cpp", RULES[rule]).train(range(8))
        saved = run.cbp.state_dict()
        engine = run.cbp._engine
        refused, messages = 0, set()
        for _ in range(number):
            state = mutated(rng, saved)
            before, hyper, deviations = engine.state.buffer.clone(), engine.hyper, engine.state.deviations
            try:
                run.cbp.load_state_dict(state)
            except ValueError as error:
                refused += 1
                messages.add(str(error))
                assert torch.equal(engine.state.buffer, before)
                assert (engine.hyper, engine.state.deviations) == (hyper, deviations)
            else:
                file = io.BytesIO()
                torch.save(run.cbp.state_dict(), file)
                file.seek(0)
                run.cbp.load_state_dict(torch.load(file, weights_only=True))
                assert not engine.state.buffer.requires_grad
                run.cbp.load_state_dict(saved)
        assert 0.5 * number < refused < number
        assert all("state_dict" in message for message in messages)


@pytest.mark.parametrize("rule", ["nature", "transfer", "as attached"])
def test_whatever_a_state_holds_it_loads_or_changes_nothing(rule):
    check_mutations(700, rule, 0)


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_many_states_hold_they_load_or_change_nothing(rule, seed):
    check_mutations(2000, rule, seed)


class Unguessed(nn.Module):
    """Its groups are found in the first training forward."""

    def __init__(self, width=7):
        super().__init__()
        self.a, self.b = nn.Linear(5, width), nn.Linear(width, 3)

    def forward(self, batch, scale):
        return self.b(torch.relu(self.a(batch["x"])) * scale)


def unguessed(width=7, steps=0, **options):
    model = Unguessed(width)
    cbp = ContinualBackprop(model, **{"replacement_rate": 0.3, "maturity_threshold": 1, **options})
    for _ in range(steps):
        model({"x": torch.randn(4, 5)}, scale=2.0)
        cbp.step()
    return model, cbp


def test_states_loaded_before_the_groups_are_found_are_checked_and_copied():
    _, trained = unguessed(steps=4)
    good = trained.state_dict()
    model, cbp = unguessed()
    rng, refused = random.Random(0), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(300):
            try:
                cbp.load_state_dict(mutated(rng, good))
            except ValueError:
                refused += 1
    assert refused > 150
    mine = copy.deepcopy(good)
    cbp.load_state_dict(mine)
    mine["groups"]["a"]["num_replaced"] = 10**6
    mine["groups"]["a"]["utility"].fill_(7)
    cbp.state_dict()["groups"]["a"]["utility"].fill_(7)
    cbp.replacement_rate = 0.1
    model({"x": torch.randn(4, 5)}, scale=2.0)
    assert cbp.num_replaced == trained.num_replaced
    assert torch.equal(cbp.utility["a"], good["groups"]["a"]["utility"])
    assert cbp.replacement_rate == 0.1
    assert cbp.state_dict()["replacement_rate"] == 0.1


def test_a_state_that_does_not_fit_the_groups_is_said_once_and_training_starts_without_it():
    _, other = unguessed(width=8, steps=4, replacement_rate=0.2)
    model, cbp = unguessed()
    cbp.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"does not fit .* starts without it: .*utility of group 'a'"):
        model({"x": torch.randn(4, 5)}, scale=2.0)
    assert cbp.replacement_rate == 0.3
    model({"x": torch.randn(4, 5)}, scale=2.0)
    cbp.step()
    assert cbp.age["a"].tolist() == [1] * 7


@pytest.mark.parametrize(
    ("rate", "threshold", "seed"),
    [
        (np.float64(0.25), np.int64(3), np.uint64(2**64 - 1)),
        (np.float32(0.25), np.float32(3), np.int8(-1)),
        (Fraction(1, 4), np.uint8(3), np.int64(-1)),
    ],
)
def test_numbers_of_any_kind_are_numbers_and_enter_no_file(rate, threshold, seed):
    run = Run("cpp", replacement_rate=rate, maturity_threshold=threshold, seed=seed)
    run.cbp.decay_rate = rate
    state = run.cbp.state_dict()
    assert [type(state[key]) for key in ("replacement_rate", "decay_rate", "seed")] == [float, float, int]
    assert (state["replacement_rate"], state["maturity_threshold"], state["seed"]) == (0.25, 3, -1)
    Run("cpp").load(run.save())
    state["groups"]["0"]["pending"] = np.float64(0.5)
    state["groups"]["0"]["num_replaced"] = np.int32(4)
    run.cbp.load_state_dict(state)
    assert torch.load(run.save(), weights_only=True)[2]["groups"]["0"]["num_replaced"] == 4
