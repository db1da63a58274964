"""What each of two processes runs for `test_lightning_ranks.py`, under torchrun."""

import os
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed import group

from id3_optim import ID3AdamW, load_delta
from id3_optim.cli.processes import leave
from id3_optim.integrations.lightning import ID3Callback
from id3_optim.integrations.lightning_data_parallel import SparseDataParallelStrategy

RANK = int(os.environ["RANK"])
OPTIONS = {"lr": 1e-2, "budget": 0.05, "max_grad_norm": 1.0, "select_every": 2}
STEPS, BATCH = 8, 4
ROWS = torch.randn(STEPS // 2 * 2 * 2 * BATCH, 32, generator=torch.Generator().manual_seed(1))


def built(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))


def loss_of(model, x):
    return nn.functional.cross_entropy(model(x), x[:, :8].argmax(1))


class Classifier(L.LightningModule):
    """Each process begins with weights of its own; those of the first one count."""

    def __init__(self, make=None):
        super().__init__()
        self.model, self.make = built(RANK), make or (lambda named: id3(named, group.WORLD))
        self.model.register_buffer("begun", torch.tensor(float(RANK)))

    def training_step(self, batch, batch_idx):
        return loss_of(self.model, batch)

    def configure_optimizers(self):
        return self.make(self.model.named_parameters())


def id3(named, process_group, **options):
    return ID3AdamW(named, **OPTIONS | options, process_group=process_group)


def fit(folder, checkpoint=None, make=None, sparse=True, **options):
    """Two epochs, a checkpoint after each; two batches a step."""
    every = ModelCheckpoint(folder, "{step}", every_n_train_steps=STEPS // 2, save_top_k=-1)
    trainer = L.Trainer(
        strategy=SparseDataParallelStrategy(),
        accelerator="cpu",
        devices=2,
        max_epochs=2,
        accumulate_grad_batches=2,
        callbacks=[ID3Callback(submodule="model", sparse_backward=sparse), every],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    module = Classifier(make)
    trainer.fit(module, torch.utils.data.DataLoader(ROWS, batch_size=BATCH), ckpt_path=checkpoint)
    return module, trainer.optimizers[0]


def check_equal(model):
    """All processes have the same bits."""
    own = torch.cat([tensor.detach().reshape(-1) for tensor in model.state_dict().values()])
    held = [torch.empty_like(own) for _ in range(2)]
    torch.distributed.all_gather(held, own)
    assert torch.equal(*held)


def alone(own):
    """One process, a group of its own, on all rows, in the order that Lightning's samplers give them."""
    model = built(0)
    optimizer = id3(model.named_parameters(), own, total_steps=STEPS, release_gradients=True)
    samplers = [torch.utils.data.DistributedSampler(ROWS, 2, rank) for rank in range(2)]
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        held = [ROWS[list(sampler)].split(BATCH) for sampler in samplers]
        for i, pair in enumerate(zip(*held, strict=True)):  # the last micro-batch of a step chooses
            (sum(loss_of(model, x) for x in pair) / 4).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
    return model


def check_training(folder, own):
    module, optimizer = fit(folder)
    assert (optimizer.steps_done, optimizer.n_active) == (STEPS, optimizer.budget)
    assert module.model.begun == 0
    check_equal(module.model)
    straight = alone(own)
    for (name, p), q in zip(module.model.named_parameters(), straight.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), name
    resumed, _ = fit(folder, folder / "step=4.ckpt")
    for p, q in zip(module.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    if RANK == 0:
        base = built(0)
        load_delta(folder / "step=8.delta.safetensors").apply(base)
        for p, q in zip(module.model.parameters(), base.parameters(), strict=True):
            assert torch.equal(p, q)


def check_the_largest(folder):
    """With select_from="max" each batch of a step is sent, since each has its say."""
    released = {"release_gradients": True, "select_from": "max"}
    _, optimizer = fit(
        folder / "max",
        make=lambda named: id3(named, torch.distributed.group.WORLD, **released),
        sparse=False,
    )
    assert optimizer.n_active == optimizer.budget


def refused(folder, message, **options):
    try:
        fit(folder, **options)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"expected {message}")


def check_refusals(folder, own):
    expected = "optimizer: expected ID3AdamW with a process_group, got"
    refused(folder, f"{expected} none", make=lambda named: id3(named, None), sparse=False)
    refused(folder, f"{expected} AdamW", make=lambda named: torch.optim.AdamW(dict(named).values()))
    refused(folder, "expected all 2 processes, got 1 of them", make=lambda named: id3(named, own))
    refused(folder, "gradient_clip_val: expected none, got 1.0, by which each", gradient_clip_val=1.0)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    alone_here = torch.distributed.new_subgroups(1)[0]
    check_training(Path(sys.argv[1]), alone_here)
    check_the_largest(Path(sys.argv[1]))
    check_refusals(Path(sys.argv[1]), alone_here)
    leave(0)
