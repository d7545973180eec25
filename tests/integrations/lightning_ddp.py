"""Trains in two processes by Lightning's ddp strategy: python lightning_ddp.py FOLDER leaves FOLDER/0 and FOLDER/1."""

import sys

import torch
from lightning import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from cbp_fast.integrations.lightning import ContinualBackpropCallback


class _Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 2))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


class _Keep(ContinualBackpropCallback):
    def on_fit_end(self, trainer, module):
        state = {"model": module.state_dict(), "cbp": self.cbp.state_dict()}
        torch.save(state, f"{sys.argv[1]}/{trainer.global_rank}")
        super().on_fit_end(trainer, module)


if __name__ == "__main__":
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    data = TensorDataset(torch.randn(64, 4), torch.randn(64, 2))
    Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_Keep(replacement_rate=0.1, maturity_threshold=2)],
    ).fit(_Model(), DataLoader(data, batch_size=4, shuffle=True))
