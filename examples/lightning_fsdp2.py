"""FSDP2 in Lightning: `torchrun --nproc-per-node 2 examples/lightning_fsdp2.py --output runs/lightning`."""

import argparse
import os
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from id3_optim import ID3AdamW
from id3_optim.integrations.lightning import ID3Callback


class Classifier(L.LightningModule):
    def configure_model(self):
        if hasattr(self, "model"):
            return
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))
        for layer in self.model:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch), batch[:, :8].argmax(1))

    def configure_optimizers(self):  # Lightning calls this behind `configure_model`
        return ID3AdamW(self.named_parameters(), lr=1e-2, budget=0.05, max_grad_norm=1.0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--resume", type=Path)
    arguments = parser.parse_args()
    devices = int(os.environ["LOCAL_WORLD_SIZE"])  # torchrun's
    every = {"every_n_train_steps": arguments.steps // 2, "save_top_k": -1}
    trainer = L.Trainer(
        strategy=ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1),
        devices=devices,
        max_steps=arguments.steps,
        # The delta has the names of `self.model`.
        callbacks=[ID3Callback(submodule="model"), ModelCheckpoint(arguments.output, "{step}", **every)],
        logger=False,
        enable_progress_bar=False,
    )
    n = 16 * devices * (arguments.steps // 2)  # two epochs, a checkpoint after each
    rows = torch.randn(n, 32, generator=torch.Generator().manual_seed(1))
    trainer.fit(Classifier(), torch.utils.data.DataLoader(rows, batch_size=16), ckpt_path=arguments.resume)


if __name__ == "__main__":
    main()
