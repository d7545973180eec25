"""clarena's own pipeline from a config to its table of accuracies: SplitMNIST, filled with scikit-learn's digits."""

import csv
import statistics
import struct

import pytest
import torch
from clarena.pipelines import CLMainExperiment
from omegaconf import OmegaConf
from sklearn.datasets import load_digits

CBP = {"replacement_rate": 0.004, "maturity_threshold": 40, "utility_decay_rate": 0.99}
OURS = {"_target_": "cbp_fast.integrations.clarena.CBP", **CBP}
CLARENA = {"_target_": "clarena.cl_algorithms.CBP", **CBP}
FINETUNING = {"_target_": "clarena.cl_algorithms.Finetuning"}


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder with the files of MNIST, in which are 8 x 8 digits."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images * 15).astype("uint8"), labels.astype("uint8")
    root = tmp_path_factory.mktemp("data")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, part in (("train", slice(0, 700)), ("t10k", slice(700, 1000))):
        x, y = images[part], labels[part]
        # idx: zero, zero, type (8: unsigned byte), number of axes, sizes
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">BBBB3I", 0, 0, 8, 3, len(x), 8, 8) + x.tobytes()
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, len(y)) + y.tobytes())
    return root


def run(algorithm, paradigm, seed, mnist, output_dir):
    """Average accuracy over the three tasks at the end, and the model."""
    config = {
        "pipeline": "CL_MAIN_EXPR",
        "expr_name": "digits",
        "cl_paradigm": paradigm,
        "train_tasks": 3,
        "eval_after_tasks": 3,
        "global_seed": seed,
        "cl_dataset": {
            "_target_": "clarena.cl_datasets.SplitMNIST",
            "root": str(mnist),
            "class_split": {1: [0, 1, 2], 2: [3, 4, 5], 3: [6, 7, 8]},
            "validation_percentage": 0.1,
            "batch_size": 8,
        },
        "cl_algorithm": algorithm,
        "backbone": {"_target_": "clarena.backbones.CLMLP", "input_dim": 64, "hidden_dims": [256], "output_dim": 256},
        "optimizer": {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 5e-4},
        "lr_scheduler": {"_target_": "torch.optim.lr_scheduler.ConstantLR", "_partial_": True, "factor": 1.0},
        "trainer": {
            "_target_": "lightning.Trainer",
            "accelerator": "cpu",
            "max_epochs": 4,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
        },
        "metrics": [{"_target_": "clarena.metrics.CLAccuracy", "save_dir": str(output_dir)}],
        "lightning_loggers": {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(output_dir)}},
        "callbacks": [{"_target_": "clarena.callbacks.SaveModels", "save_dir": str(output_dir)}],
        "output_dir": str(output_dir),
        "misc": {"ignore_warnings": True},
    }
    experiment = CLMainExperiment(OmegaConf.create(config))
    experiment.run()
    with open(output_dir / "acc.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["after_training_task"] for row in rows] == ["1", "2", "3"]
    return float(rows[-1]["average_accuracy"]), experiment.model


@pytest.mark.parametrize("paradigm", ["TIL", "CIL"])
def test_finishes_where_clarena_stops_and_is_no_worse_than_finetuning(paradigm, mnist, tmp_path_factory):
    folder = tmp_path_factory.mktemp
    with pytest.raises(AttributeError, match="preceding_layer"):
        run(CLARENA, paradigm, 1, mnist, folder("clarena"))

    ours, plain = [], []
    for seed in (1, 2, 3):
        output = folder("ours")
        accuracy, model = run(OURS, paradigm, seed, mnist, output)
        ours.append(accuracy)
        assert sum(group["num_replaced"] for group in model._state()["groups"].values()) > 100
        # what clarena's evaluation loads
        saved = torch.load(output / "cl_model.pth", weights_only=False)
        torch.testing.assert_close(saved.age, model.age, rtol=0, atol=0)
        plain.append(run(FINETUNING, paradigm, seed, mnist, folder("plain"))[0])
    print(f"{paradigm}: average accuracy {ours} with continual backprop, {plain} without")
    spread = max(max(runs) - min(runs) for runs in (ours, plain))
    assert statistics.mean(ours) >= statistics.mean(plain) - spread
