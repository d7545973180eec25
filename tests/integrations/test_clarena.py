"""`cbp_fast.integrations.clarena.CBP` beside the installed clarena's CBP, in Lightning's trainer."""

import copy
import pickle
from functools import partial

import lightning
import numpy as np
import pytest
import torch
from clarena.backbones import CLMLP, CLBackbone, CLResNet18, HATMaskMLP, ResNet18
from clarena.cl_algorithms import CBP as ClarenaCBP
from clarena.heads import HeadsCIL, HeadsTIL
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cbp_fast import ContinualBackprop, Rule
from cbp_fast.integrations.clarena import CBP, _Network

HEADS = [HeadsTIL, HeadsCIL]
RULES = ["nature", "clarena"]
# clarena replaces only where rate * units is at least one
RATE = {"nature": 0.02, "clarena": 0.1}


class HeadDIL(nn.Module):
    """One head for all tasks, as clarena's repository has it; clarena 1.1.0 sets it up as it does the others."""

    def __init__(self, input_dim):
        super().__init__()
        self.input_dim, self.head = input_dim, None

    def setup_task_id(self, task_id, num_classes):
        if self.head is None:
            self.head = nn.Linear(self.input_dim, num_classes)

    def forward(self, feature, task_id=None):
        return self.head(feature)


def make(rule="nature", heads=HeadsTIL, cls=CBP, rate=None, **backbone):
    torch.manual_seed(0)
    name = rule if isinstance(rule, str) else rule.name
    options = {"rule": rule} if issubclass(cls, CBP) else {}
    mlp = CLMLP(16, [16, 12], 10, **backbone)
    return cls(mlp, heads(10), RATE.get(name, 0.02) if rate is None else rate, 5, 0.9, {}, **options)


def loader(task, batches=20):
    generator = torch.Generator().manual_seed(task)
    x, y = torch.randn(8 * batches, 16, generator=generator), torch.randint(0, 2, (8 * batches,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


ADAM = partial(torch.optim.Adam, lr=1e-3)


def fit(model, task, optimizer=ADAM, ckpt_path=None, new=True, data=None, **options):
    # the head is made here
    torch.manual_seed(task)
    if new:
        model.setup_task_id(task, 2, optimizer, None)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(**({"max_epochs": 1, "accelerator": "cpu"} | quiet | options))
    trainer.fit(model, data or loader(task), ckpt_path=ckpt_path)
    return trainer


def same(a, b):
    """Whether two modules have the same weights and the same statistics, bit for bit."""
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
    for what in ("contribution_utility", "age", "num_replacements"):
        torch.testing.assert_close(getattr(a, what), getattr(b, what), rtol=0, atol=0)
    a, b = dict(a._state()), dict(b._state())
    torch.testing.assert_close(a.pop("groups"), b.pop("groups"), rtol=0, atol=0)
    assert a == b


def replaced(model):
    return sum(group["num_replaced"] for group in model._state()["groups"].values())


class Twin(lightning.Callback):
    """Gives clarena's own object the batches and weights that ours has, and compares what each makes of them."""

    def __init__(self, twin):
        self.twin, self.replaced = twin, 0

    def on_train_start(self, trainer, ours):
        # what the published class calls and its backbone has not
        self.twin.backbone.preceding_layer = self.twin.preceding_layer
        self.twin.task_id = 1
        self.twin.on_train_start()

    def on_train_batch_end(self, trainer, ours, outputs, batch, batch_idx):
        self.before = copy.deepcopy(ours.backbone.state_dict())
        self.twin.backbone.load_state_dict(self.before)
        self.twin.on_train_batch_end(outputs, batch, batch_idx)

    def on_train_batch_start(self, trainer, ours, batch, batch_idx):
        if batch_idx == 0:
            return
        torch.testing.assert_close(ours.age, self.twin.age, rtol=0, atol=0)
        torch.testing.assert_close(ours.contribution_utility, self.twin.contribution_utility, rtol=1e-5, atol=1e-6)
        assert ours.num_replacements == self.twin.num_replacements
        theirs = self.twin.backbone.state_dict()
        for name, now in ours.backbone.state_dict().items():
            assert torch.equal(now != self.before[name], theirs[name] != self.before[name])
            new = now[now != self.before[name]]
            assert ((new >= 0) & (new < 1)).all()
        self.replaced += sum(int((age == 0).sum()) for age in ours.age.values())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("backbone", [{}, {"dropout": 0.3, "batch_normalization": True, "bias": False}], ids=str)
def test_rule_clarena_is_what_clarena_computes(heads, backbone):
    twin = Twin(make("clarena", heads, ClarenaCBP, **backbone))
    fit(make("clarena", heads, **backbone), 1, callbacks=[twin], max_epochs=1)
    assert twin.replaced > 10


def test_clarena_itself_stops_at_its_first_replacement():
    with pytest.raises(AttributeError, match="preceding_layer"):
        fit(make("clarena", cls=ClarenaCBP), 1)


@pytest.mark.parametrize("heads", HEADS)
def test_rule_nature_is_the_attached_object(heads):
    model = make(heads=heads, batch_normalization=True)
    model.setup_task_id(1, 2, None, None)
    network = _Network(copy.deepcopy(model.backbone), copy.deepcopy(model.heads), 1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    rates = {"replacement_rate": RATE["nature"], "maturity_threshold": 5, "decay_rate": 0.9}
    cbp = ContinualBackprop(network, optimizer, seed=1, **rates)
    model.optimizer_t = ADAM
    fit(model, 1, new=False)
    for x, y in loader(1):
        loss = nn.functional.cross_entropy(network(x)[0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), network.state_dict(), rtol=0, atol=0)
    assert replaced(model) == sum(cbp.num_replaced.values()) > 5
    for ours, theirs in zip(model.age.values(), cbp.age.values(), strict=True):
        assert torch.equal(ours, theirs.float())


@pytest.mark.parametrize("heads", [*HEADS, HeadDIL])
@pytest.mark.parametrize("rule", [*RULES, Rule.gnt(utility="zero_contribution", transfer_bias=True)], ids=str)
def test_state_goes_on_from_task_to_task(rule, heads):
    model = make(rule, heads)
    assert model.contribution_utility == model.age == model.num_replacements == {}
    counts = []
    for task in (1, 2, 3):
        fit(model, task)
        counts.append(replaced(model))
        assert list(model.age) == list(model.contribution_utility) == ["fc/0", "fc/1", "fc/2"]
        assert all(t.dtype == torch.float32 for t in (*model.age.values(), *model.contribution_utility.values()))
        # 20 batches a task; some unit was never replaced
        assert max(age.max() for age in model.age.values()) == 20 * task
    assert 0 < counts[0] < counts[1] < counts[2]


def test_a_replaced_unit_is_silent_in_all_heads_and_new_to_the_optimizer():
    model = make()
    fit(model, 1)

    class Look(lightning.Callback):
        seen = 0

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            state = trainer.optimizers[0].state
            for j in (pl_module.age["fc/2"] == 0).nonzero():
                for head in pl_module.heads.heads.values():
                    assert (head.weight[:, j] == 0).all()
                    assert (state[head.weight]["exp_avg"][:, j] == 0).all() if head.weight in state else True
                assert (state[pl_module.backbone.fc[2].weight]["exp_avg_sq"][j] == 0).all()
                self.seen += 1

    look = Look()
    fit(model, 2, callbacks=[look])
    assert look.seen > 2


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_uninterrupted_one(rule, heads, tmp_path):
    whole = make(rule, heads)
    fit(whole, 1)
    half = copy.deepcopy(whole)
    fit(whole, 2, max_epochs=2)

    trainer = fit(half, 2, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make(rule, heads)
    resumed.setup_task_id(1, 2, None, None)
    fit(resumed, 2, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    same(resumed, whole)
    assert replaced(whole) > replaced(half) > 5


@pytest.mark.parametrize("rule", RULES)
def test_a_checkpoint_within_an_epoch_is_of_its_batch(rule, tmp_path):
    # every batch the same, since the loader begins anew
    x, y = (tensor.repeat(20, *[1] * (tensor.dim() - 1)) for tensor in next(iter(loader(1))))
    batches = DataLoader(TensorDataset(x, y), batch_size=8)
    whole, resumed = make(rule), make(rule)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    fit(whole, 1, data=batches, callbacks=[saving], enable_checkpointing=True)
    fit(resumed, 1, data=batches, ckpt_path=tmp_path / "step=7.ckpt")
    same(resumed, whole)
    assert replaced(whole) > 5


@pytest.mark.parametrize("rule", RULES)
def test_a_trainer_may_fit_again(rule, caplog):
    model = make(rule, rate=0.0)
    trainer = fit(model, 1)
    with caplog.at_level("INFO"):
        trainer.validate(model, loader(1), verbose=False)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(model, loader(1))
    assert {age.max().item() for age in model.age.values()} == {40}
    # nor is it said that callbacks of the user are replaced
    assert "override" not in caplog.text
    # which may fit something else then
    trainer.fit_loop.max_epochs = 3
    other = make(cls=ClarenaCBP, rate=0.0)
    other.setup_task_id(1, 2, ADAM, None)
    trainer.fit(other, loader(1))


def test_a_subclass_that_loses_the_callback_steps_in_its_own_hook():
    class Own(CBP):
        def configure_callbacks(self):
            return []

    model, own = make("clarena"), make("clarena", cls=Own)
    for each in (model, own):
        fit(each, 1)
    assert replaced(model) > 2
    same(model, own)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("rule", RULES)
def test_hooks_are_gone_after_a_fit_that_failed(rule, error):
    class Fail(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 9:
                raise error

    model = make(rule)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(model, 1, callbacks=[Fail()])
    assert model._engine is None
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert max(age.max() for age in model.age.values()) == (10 if rule == "nature" else 9)


@pytest.mark.parametrize("rule", RULES)
def test_state_dict_is_clarenas_and_its_checkpoints_load(rule, tmp_path):
    theirs = make(cls=ClarenaCBP, rate=0.0)
    fit(theirs, 1).save_checkpoint(tmp_path / "old.ckpt")
    ours = make(rule)
    fit(ours, 1)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours = make(rule)
    fit(ours, 1, max_epochs=2, ckpt_path=tmp_path / "old.ckpt")
    assert max(age.max() for age in ours.age.values()) == 20


@pytest.mark.parametrize("rule", RULES)
def test_a_state_that_does_not_fit_is_not_lost(rule):
    model = make(rule)
    fit(model, 1)
    kept = model._kept
    groups = kept["groups"] | {"fc/1": kept["groups"]["fc/1"] | {"utility": torch.zeros(3)}}
    model._kept = kept | {"groups": groups}
    with pytest.raises(ValueError, match="utility of group 'fc/1'"):
        fit(model, 2)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model._kept["groups"] is groups
    model._kept = kept
    fit(model, 2, new=False)
    assert max(age.max() for age in model.age.values()) == 40


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("rule", RULES)
def test_copies_go_on_as_their_original(rule, how):
    model = make(rule)

    class Copy(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 10:
                self.taken, self.age = how(pl_module), pl_module.age

    taker = Copy()
    model.setup_task_id(1, 2, ADAM, None)
    fit(model, 1, new=False, callbacks=[taker])
    # one that is taken amid a fit is as of that moment, and can itself be fitted
    torch.testing.assert_close(taker.taken.age, taker.age, rtol=0, atol=0)
    fit(taker.taken, 1, new=False)
    assert max(age.max() for age in taker.taken.age.values()) == 30
    other = how(model)
    same(other, model)
    for m in (model, other):
        fit(m, 2)
    same(other, model)
    assert replaced(model) > 5


@pytest.mark.parametrize(("rule", "steps"), [("nature", 5), ("clarena", 20)])
def test_gradient_accumulation(rule, steps):
    model = make(rule, rate=0.0)
    fit(model, 1, accumulate_grad_batches=4)
    assert {age.max().item() for age in model.age.values()} == {steps}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("rule", RULES)
def test_precision(rule, precision):
    model = make(rule)
    fit(model, 1, precision=precision)
    assert replaced(model) > 5
    model, exact = make(rule, rate=0.0), make(rule, rate=0.0)
    # without learning only what was observed differs
    fit(model, 1, optimizer=partial(torch.optim.SGD, lr=0.0), precision=precision)
    fit(exact, 1, optimizer=partial(torch.optim.SGD, lr=0.0))
    tolerance = 1e-5 if precision == "64-true" else 0.03
    for ours, right in zip(model.contribution_utility.values(), exact.contribution_utility.values(), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, right, rtol=tolerance, atol=tolerance * right.max().item())


def test_rates_may_change_between_batches():
    class Stop(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 10:
                self.before, pl_module.replacement_rate = replaced(pl_module), 0.0

    model, stop = make(rate=0.1), Stop()
    fit(model, 1, callbacks=[stop])
    assert replaced(model) == stop.before > 0
    model.maturity_threshold = -1
    with pytest.raises(ValueError, match="maturity_threshold is -1"):
        fit(model, 2)


def test_hyperparameters_are_saved(tmp_path):
    model = make("clarena")
    assert model.hparams == {
        "replacement_rate": 0.1,
        "maturity_threshold": 5,
        "utility_decay_rate": 0.9,
        "rule": "clarena",
        "backend": None,
    }
    rule = Rule.gnt(utility="weight")
    model = make(rule)
    assert CBP(CLMLP(16, [], 10), HeadsTIL(10), **model.hparams).rule == rule
    fit(model, 1).save_checkpoint(tmp_path / "last.ckpt")
    backbone, heads = copy.deepcopy(model.backbone), copy.deepcopy(model.heads)
    loaded = CBP.load_from_checkpoint(tmp_path / "last.ckpt", backbone=backbone, heads=heads, weights_only=True)
    same(loaded, model)
    with pytest.raises(TypeError, match="colour"):
        CBP(model.backbone, model.heads, 0.1, 5, 0.9, colour="red")


def test_says_once_that_the_formulae_are_not_clarenas(caplog):
    from cbp_fast.integrations import clarena

    clarena._say_rule.cache_clear()
    with caplog.at_level("INFO"):
        fit(make("clarena"), 1)
        assert "nature" not in caplog.text
        fit(make(), 1)
        fit(make(), 1)
    assert caplog.text.count("stop with an AttributeError") == 1


class Shortcut(CLResNet18):
    """clarena's residual network, whose forward() the class of clarena 1.1.0 does not reach."""

    def forward(self, input, stage=None, task_id=None):
        return ResNet18.forward(self, input, stage)


class Dependent(CLBackbone):
    """It runs on no input that could be guessed."""

    def __init__(self):
        super().__init__(10)
        self.fc, self.weighted_layer_names = nn.Linear(16, 10), ["fc"]

    def forward(self, input, stage=None, task_id=None):
        if not input.any():
            raise ValueError("nothing to see")
        x = self.fc(input).relu()
        return x, {"fc": x}


@pytest.mark.parametrize(
    "example",
    [{"input": torch.ones(2, 16), "stage": "train", "task_id": 1}, (torch.ones(2, 16), "train", 1)],
    ids=["mapping", "tuple"],
)
def test_an_example_is_what_the_model_summary_takes(example):
    model = CBP(Dependent(), HeadsTIL(10), 0.1, 5, 0.9)
    model.example_input_array = example
    fit(model, 1, enable_model_summary=True)
    assert replaced(model) > 5


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-true"])
def test_an_example_is_used_where_the_input_cannot_be_guessed(precision):
    model = CBP(Dependent(), HeadsTIL(10), 0.1, 5, 0.9)
    model.example_input_array = torch.ones(2, 16)
    fit(model, 1, precision=precision)
    assert replaced(model) > 5


class Bare(CLMLP):
    """Its forward returns what `returned` makes of the pair."""

    returned = staticmethod(lambda feature, activations: feature)

    def __init__(self):
        super().__init__(16, [16, 12], 10)

    def forward(self, input, stage=None, task_id=None):
        return self.returned(*super().forward(input, stage, task_id))


class Silent(Bare):
    returned = staticmethod(lambda feature, activations: (feature, {"fc/0": activations["fc/0"]}))


def compiled():
    return torch.compile(CLMLP(16, [16, 12], 10), backend="eager")


def compiled_in_place():
    backbone = CLMLP(16, [16, 12], 10)
    backbone.compile(backend="eager")
    return backbone


NO_PAIR = r"^Bare.forward\(\) returns Tensor, not \(feature, activations\)$"
NO_TASK = r"^HATMaskMLP.forward\(\) does not take .*unexpected keyword argument 'task_id'$"


@pytest.mark.parametrize(
    ("rule", "backbone", "message"),
    [
        ("nature", lambda: Shortcut(1, 512), r"(?s)Shortcut.*conv2x/0/conv2.*conv2x.0.conv2.*several layers add"),
        ("nature", lambda: CLResNet18(1, 512), r"^CLResNet18.forward\(\) returns NoneType, not"),
        ("nature", Dependent, r"Dependent.*fc: .*example_input_array.*\{\"input\": "),
        ("nature", Bare, NO_PAIR),
        ("clarena", Bare, NO_PAIR),
        ("clarena", Silent, r"^Silent.forward\(\) returns no activations of fc/1, fc/2$"),
        ("nature", lambda: HATMaskMLP(16, [16, 12], 10, gate="sigmoid"), NO_TASK),
        ("clarena", lambda: HATMaskMLP(16, [16, 12], 10, gate="sigmoid"), NO_TASK),
        ("nature", compiled, "backbone is compiled.*the whole CBP"),
        ("nature", compiled_in_place, "backbone is compiled.*the whole CBP"),
        ("clarena", lambda: Shortcut(1, 512), "linear layers only.*'conv1' has convolutions; use rule='nature'$"),
        ("clarena", lambda: CLMLP(16, [20, 30], 10), "'backbone.fc.0' has 16 inputs and group 'fc/1' has 30 units"),
    ],
)
def test_a_backbone_that_cannot_be_read_is_refused_before_any_weight_moved(rule, backbone, message):
    backbone = backbone()
    model = CBP(backbone, HeadsTIL(backbone.output_dim), 0.1, 5, 0.9, rule=rule)
    model.setup_task_id(1, 2, partial(torch.optim.SGD, lr=0.1), None)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        fit(model, 1, new=False)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def freeze_first_head(model):
    fit(model, 1)
    model.heads.heads["1"].requires_grad_(False)


def test_an_old_head_may_be_frozen_under_the_rule_clarena():
    model, free = make("clarena"), make("clarena")
    freeze_first_head(model)
    fit(free, 1)
    for m in (model, free):
        fit(m, 2)
    same(model, free)
    assert max(age.max() for age in model.age.values()) == 40
    model = make()
    freeze_first_head(model)
    with pytest.raises(ValueError, match=r"(?s)for fc/2:.*heads.1.weight' is frozen.*rule='clarena'"):
        fit(model, 2)


def test_a_compiled_backbone_does_under_the_rule_clarena():
    torch.compiler.reset()
    model, plain = make("clarena"), make("clarena")
    model.backbone = torch.compile(model.backbone, backend="eager")
    for m in (model, plain):
        fit(m, 1)
    model.backbone = model.backbone._orig_mod
    same(model, plain)
    assert replaced(model) > 5


@pytest.mark.parametrize("rule", RULES)
def test_numbers_may_be_numpys(rule):
    backbone = CLMLP(16, [16, 12], 10)
    model = CBP(backbone, HeadsTIL(10), np.float32(0.25), np.int64(5), np.float64(0.5), rule=rule)
    assert [type(model.hparams[name]) for name in ("replacement_rate", "maturity_threshold")] == [float, int]
    fit(model, 1)
    assert replaced(model) > 5


@pytest.mark.parametrize("rule", RULES)
def test_the_whole_may_be_compiled(rule):
    torch.compiler.reset()
    model, plain = make(rule), make(rule)
    for m, wrap in ((model, partial(torch.compile, backend="eager")), (plain, lambda m: m)):
        torch.manual_seed(1)
        m.setup_task_id(1, 2, ADAM, None)
        fit(wrap(m), 1, new=False)
    same(model, plain)
    assert replaced(model) > 5


def test_an_example_that_does_not_fit_is_named():
    model = make()
    model.example_input_array = torch.ones(2, 5)
    with pytest.raises(ValueError, match=r"does not run on the example_inputs given: .*shapes") as caught:
        fit(model, 1)
    # there is one
    assert "set example_input_array" not in str(caught.value)


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(lightning.Trainer, "world_size", 2)
    with pytest.raises(RuntimeError, match="one process only"):
        fit(make("clarena"), 1)
