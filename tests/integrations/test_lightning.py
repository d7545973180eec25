"""`ContinualBackpropCallback` in Lightning's Trainer."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cbp_fast import ContinualBackprop
from cbp_fast.integrations.lightning import ContinualBackpropCallback

EAGER = {"replacement_rate": 0.02, "maturity_threshold": 5, "decay_rate": 0.9}


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4 * 4, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.norm(self.fc(torch.flatten(self.conv(x).relu(), 1))).relu())

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def loader(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(160, 1, 4, 4, generator=generator), torch.randint(0, 2, (160,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def fit(module, callback, ckpt_path=None, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [callback, *options.pop("callbacks", [])]
    trainer = lightning.Trainer(
        **({"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1} | quiet | options), callbacks=callbacks
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def replaced(callback):
    return {name: group["num_replaced"] for name, group in callback.state_dict()["groups"].items()}


def test_same_as_the_attached_object_in_a_loop():
    module, callback = Module(), ContinualBackpropCallback(seed=1, **EAGER)
    fit(module, callback)
    plain = Module()
    optimizer = plain.configure_optimizers()
    cbp = ContinualBackprop(plain, optimizer, seed=1, **EAGER)
    for batch in loader():
        optimizer.zero_grad()
        plain.training_step(batch, 0).backward()
        optimizer.step()
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert replaced(callback) == cbp.num_replaced
    assert sum(cbp.num_replaced.values()) > 2


def test_hooks_are_gone_after_a_fit_and_after_one_that_failed():
    class Fail(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("no more")

    module, callback = Module(), ContinualBackpropCallback(**EAGER)
    with pytest.raises(RuntimeError, match="no more"):
        fit(module, callback, callbacks=[Fail()])
    for _ in range(2):
        assert "removed" in repr(callback.cbp)
        assert callback.cbp.age["fc"].max() > 0
        assert not any(m._forward_pre_hooks for m in module.modules())
        fit(module, callback)
    assert max(group["age"].max() for group in callback.state_dict()["groups"].values()) == 41


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, half = ContinualBackpropCallback(**EAGER), ContinualBackpropCallback(**EAGER)
    module = Module()
    fit(module, whole, max_epochs=3)
    fit(Module(), half, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(5)
    resumed, other = ContinualBackpropCallback(**EAGER), Module()
    torch.manual_seed(5)
    fit(other, resumed, max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(whole.state_dict()["groups"], resumed.state_dict()["groups"], rtol=0, atol=0)
    assert sum(replaced(whole).values()) > sum(replaced(half).values()) > 2


def test_gradient_accumulation():
    callback = ContinualBackpropCallback(**EAGER | {"replacement_rate": 0.0})
    fit(Module(), callback, accumulate_grad_batches=4)
    assert {int(group["age"].max()) for group in callback.state_dict()["groups"].values()} == {5}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision(precision):
    callback = ContinualBackpropCallback(**EAGER)
    module = Module()
    fit(module, callback, precision=precision)
    assert sum(replaced(callback).values()) > 2
    assert all(p.isfinite().all() for p in module.parameters())


def test_what_is_logged(tmp_path):
    class Look(lightning.Callback):
        measured = 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.before = copy.deepcopy(pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged = {k: v.item() for k, v in trainer.logged_metrics.items()}
            for name, count in callback.cbp.num_replaced.items():
                assert logged[f"continual_backprop/{name}/replaced"] == count
            if batch_idx in (0, 8, 16):
                self.measured += 1
                with torch.no_grad():
                    h = self.before.norm(self.before.fc(self.before.conv(batch[0]).relu().flatten(1))).relu()
                dead = (h == 0).all(0).float().mean()
                assert logged["continual_backprop/fc/dormant"] == pytest.approx(dead.item())
                p = torch.linalg.svdvals(h.double())
                p = p[p > 0] / p.sum()
                assert logged["continual_backprop/fc/effective_rank"] == pytest.approx(
                    (-p * p.log()).sum().exp().item()
                )
                weights = torch.cat([p.flatten() for p in pl_module.parameters()])
                assert logged["continual_backprop/weight_magnitude"] == pytest.approx(weights.abs().mean().item())

    callback, look = ContinualBackpropCallback(metrics_every_n_steps=8, **EAGER), Look()
    fit(Module(), callback, callbacks=[look])
    assert look.measured == 3


def test_the_network_may_be_a_part_and_other_optimizers_are_not_waited_for():
    class Two(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net, self.other = Module(), nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            loss = self.net.training_step(batch, batch_idx)
            first.zero_grad()
            self.manual_backward(loss)
            first.step()
            if batch_idx == 0:
                second.step()

        def configure_optimizers(self):
            return [torch.optim.Adam(self.net.parameters()), torch.optim.SGD(self.other.parameters(), lr=0.1)]

    callback = ContinualBackpropCallback("net", **EAGER | {"replacement_rate": 0.0})
    fit(Two(), callback)
    assert {int(group["age"].max()) for group in callback.state_dict()["groups"].values()} == {20}


class Pair(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = Module(), Module()

    def training_step(self, batch, batch_idx):
        for optimizer, net in zip(self.optimizers(), (self.a, self.b), strict=True):
            optimizer.zero_grad()
            self.manual_backward(net.training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [self.a.configure_optimizers(), self.b.configure_optimizers()]


def test_two_submodules_have_a_callback_each(tmp_path):
    a, b = ContinualBackpropCallback("a", **EAGER), ContinualBackpropCallback("b", **EAGER | {"replacement_rate": 0.0})
    trainer = fit(Pair(), a, callbacks=[b])
    assert sum(replaced(a).values()) > sum(replaced(b).values()) == 0
    for callback, name in ((a, "a"), (b, "b")):
        assert f"continual_backprop/{name}.weight_magnitude" in trainer.logged_metrics
        for group, count in replaced(callback).items():
            assert trainer.logged_metrics[f"continual_backprop/{name}.{group}/replaced"] == count
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = ContinualBackpropCallback("a"), ContinualBackpropCallback("b")
    fit(Pair(), again[0], callbacks=[again[1]], ckpt_path=tmp_path / "last.ckpt")
    for callback, before in zip(again, (a, b), strict=True):
        torch.testing.assert_close(callback.state_dict()["groups"], before.state_dict()["groups"], rtol=0, atol=0)
    # what checkpoints of the whole module's have
    assert ContinualBackpropCallback().state_key == "ContinualBackpropCallback"


def test_a_network_that_is_not_called_is_said_once():
    class Around(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.loss = Module(), nn.CrossEntropyLoss()

        def training_step(self, batch, batch_idx):
            return self.loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return self.net.configure_optimizers()

    with pytest.warns(UserWarning, match="continual backprop found no units") as caught:
        fit(Around(), ContinualBackpropCallback(**EAGER), max_epochs=2)
    said = [str(w.message) for w in caught if "ContinualBackpropCallback(" in str(w.message)]
    assert len(said) == 1
    assert "Around.forward() was not called" in said[0]
    assert said[0].endswith("training_step calls: ContinualBackpropCallback('net')")
    callback = ContinualBackpropCallback("net", **EAGER)
    fit(Around(), callback)
    assert sum(replaced(callback).values()) > 2


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
@pytest.mark.parametrize("given", [{}, {"example_inputs": {"x": torch.ones(2, 1, 4, 4)}}], ids=["module's", "option"])
def test_example_inputs_have_the_precision_of_the_trainer(given, precision):
    module, callback = Module(), ContinualBackpropCallback(**EAGER, **given)
    module.example_input_array = torch.ones(2, 1, 4, 4)
    fit(module, callback, precision=precision)
    assert sum(replaced(callback).values()) > 2


def test_groups_may_be_found_in_the_first_forward(tmp_path):
    class Chosen(Module):
        """What it takes cannot be told from its layers."""

        def forward(self, x, scale):
            return scale * super().forward(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0], 1.0), batch[1])

    callback = ContinualBackpropCallback(**EAGER)
    trainer = fit(Chosen(), callback)
    assert sum(replaced(callback).values()) > 2
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = ContinualBackpropCallback(**EAGER)
    fit(Chosen(), again, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert max(group["age"].max() for group in again.state_dict()["groups"].values()) == 40


class Lazy(Module):
    """What it takes cannot be told from its layers."""

    def forward(self, x, scale=None):
        return super().forward(x) if scale is None else scale * super().forward(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0], torch.ones(())), batch[1])


class TwoHeads(Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList()

    def forward(self, x):
        h = self.norm(self.fc(torch.flatten(self.conv(x).relu(), 1))).relu()
        return sum([head(h) for head in self.heads], self.head(h))


def freeze(module):
    module.conv.requires_grad_(False)


def add_a_head(module):
    module.heads.append(nn.Linear(12, 2))


def widen(module):
    module.conv, module.fc = nn.Conv2d(1, 5, 3), nn.Linear(5 * 4, 12)


@pytest.mark.parametrize(
    ("make", "change", "goes_on"),
    [
        (Module, freeze, {"fc"}),
        (Lazy, freeze, {"fc"}),
        (TwoHeads, add_a_head, {"conv", "fc"}),
        (Module, widen, {"fc"}),
        (Lazy, widen, {"fc"}),
        (Lazy, lambda module: None, {"conv", "fc"}),
    ],
)
def test_a_fit_of_a_changed_network_goes_on_as_refresh_does(make, change, goes_on, tmp_path):
    module, callback = make(), ContinualBackpropCallback(seed=3, **EAGER | {"replacement_rate": 0.001})
    fit(module, callback)
    before = callback.cbp.num_replaced
    callback.cbp.replacement_rate = 0.0
    change(module)
    trainer = fit(module, callback)
    assert callback.cbp.replacement_rate == 0.0
    assert goes_on <= set(callback.cbp.age)
    for name, age in callback.cbp.age.items():
        assert int(age.max()) == (40 if name in goes_on else 20)
        assert callback.cbp.num_replaced[name] == (before[name] if name in goes_on else 0)
    # and what goes on is what a checkpoint holds
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = ContinualBackpropCallback(seed=3, **EAGER)
    twin = copy.deepcopy(module)
    fit(twin, again, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert max(int(age.max()) for age in again.cbp.age.values()) == 60


def test_a_state_that_does_not_fit_is_not_lost(tmp_path):
    callback = ContinualBackpropCallback(**EAGER)
    trainer = fit(Module(), callback)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again, other = ContinualBackpropCallback(**EAGER), Module()
    widen(other)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    again.load_state_dict(copy.deepcopy(saved))
    with pytest.raises(ValueError, match="group 'conv'"):
        fit(other, again)
    assert not any(module._forward_pre_hooks for module in other.modules())
    torch.testing.assert_close(again.state_dict()["groups"], saved["groups"], rtol=0, atol=0)
    fit(Module(), again)
    assert max(int(age.max()) for age in again.cbp.age.values()) == 40


def test_a_copy_of_the_callback_has_its_state():
    module, callback = Module(), ContinualBackpropCallback(**EAGER)
    fit(module, callback)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(callback)))
    torch.testing.assert_close(twin.state_dict()["groups"], callback.state_dict()["groups"], rtol=0, atol=0)
    assert twin.cbp is None
    fit(module, twin)
    assert max(int(age.max()) for age in twin.cbp.age.values()) == 40


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="metrics_every_n_steps is -1"):
        ContinualBackpropCallback(metrics_every_n_steps=-1)
    with pytest.raises(ValueError, match="maturity_threshold is -1"):
        fit(Module(), ContinualBackpropCallback(maturity_threshold=-1))
    with pytest.raises(AttributeError, match="nett"):
        fit(Module(), ContinualBackpropCallback("nett"))


def test_two_processes_stay_equal(tmp_path):
    script = Path(__file__).with_name("lightning_ddp.py")
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True, timeout=300)
    one, other = (torch.load(tmp_path / rank) for rank in "01")
    assert sum(group["num_replaced"] for group in one["cbp"]["groups"].values()) > 5
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name])
    for name, group in one["cbp"]["groups"].items():
        assert torch.equal(group["utility"], other["cbp"]["groups"][name]["utility"])
        assert torch.equal(group["age"], other["cbp"]["groups"][name]["age"])
