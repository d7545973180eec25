"""The share of continual backprop in a training step of clarena, with its own class and with ours.

Run in the environment of `make test-integrations`:

    .venv-integrations/bin/python benchmarks/clarena_step.py

Lightning's Trainer fits clarena's MLP, three hidden layers of equal width and Adam, with one algorithm after the other,
in turns. A step is timed from the start of its batch to the start of the next; the share of continual backprop is the
time within clarena's on_train_batch_end, or ours or the hook after the optimizer. Noting what a forward has seen, some
microseconds a layer, is not in it. No unit matures, because clarena's own class stops when it replaces one.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import torch
from clarena.backbones import CLMLP
from clarena.cl_algorithms import CBP as ClarenaCBP
from clarena.heads import HeadsTIL
from torch.utils.data import DataLoader, TensorDataset

from cbp_fast.cli.info import cpu_name, versions
from cbp_fast.integrations.clarena import CBP

RATES = (1e-4, 10**9, 0.99)
ALGORITHMS = {"clarena": (ClarenaCBP, {}), "rule clarena": (CBP, {"rule": "clarena"}), "rule nature": (CBP, {})}
WARM_UP = 3


class Clock(lightning.Callback):
    """Milliseconds of steps, and of continual backprop in them, after the first few of every fit."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.inside: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # ours steps before the module's own hook
        owner, name = pl_module, "_after_batch" if isinstance(pl_module, CBP) else "on_train_batch_end"
        if getattr(pl_module, "_attached", None):
            owner, name = pl_module._attached, "step"
        run, self.spent = getattr(owner, name), 0.0

        @functools.wraps(run)
        def timed(*args: Any) -> None:
            start = time.perf_counter()
            run(*args)
            self.spent += 1e3 * (time.perf_counter() - start)

        setattr(owner, name, timed)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if batch_idx > WARM_UP:
            self.steps.append(1e3 * (now - self.start))
            self.inside.append(self.spent)
        self.start, self.spent = now, 0.0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for name in ("_after_batch", "on_train_batch_end"):
            vars(pl_module).pop(name, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6, help="timed steps a turn")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "clarena_step.json")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    samples = args.batch * (args.steps + WARM_UP + 1)
    data = TensorDataset(torch.randn(samples, args.width), torch.randint(0, 2, (samples,)))

    models, clocks = {}, {}
    for name, (algorithm, options) in ALGORITHMS.items():
        torch.manual_seed(0)
        backbone = CLMLP(args.width, [args.width] * 2, args.width)
        models[name], clocks[name] = algorithm(backbone, HeadsTIL(args.width), *RATES, {}, **options), Clock()
        models[name].setup_task_id(1, 2, functools.partial(torch.optim.Adam, lr=1e-4), None)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for _ in range(args.turns):
        for name, model in models.items():
            trainer = lightning.Trainer(accelerator="cpu", max_epochs=1, callbacks=[clocks[name]], **quiet)
            trainer.fit(model, DataLoader(data, batch_size=args.batch))

    results = {}
    for name, clock in clocks.items():
        shares = [inside / step for inside, step in zip(clock.inside, clock.steps, strict=True)]
        columns = {"step": clock.steps, "continual_backprop": clock.inside, "share": shares}
        results[name] = {
            column: dict(zip(("low", "median", "high"), statistics.quantiles(values, n=10)[::4], strict=True))
            for column, values in columns.items()
        }
        step, cbp, share = (results[name][column]["median"] for column in columns)
        print(f"{name:13} step {step:7.1f} ms, continual backprop {cbp:6.2f} ms, {share:.1%}")
    about = {
        **versions(),
        "clarena": version("clarena"),
        "lightning": version("lightning"),
        "cpu": cpu_name(),
        "threads": args.threads,
        "command": " ".join(["python", "benchmarks/clarena_step.py", *sys.argv[1:]]),
    }
    case = {"name": f"3 x {args.width}", "batch": args.batch, "optimizer": "Adam", "steps": args.steps * args.turns}
    args.json.write_text(json.dumps({"about": about, "case": case, "milliseconds": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
