"""The example of data parallelism runs under torchrun, and its delta makes what one process trains."""

from pathlib import Path

import torch
from torch import nn
from torchrun_example import check_example

from id3_optim import ID3AdamW

EXAMPLE = Path(__file__).parents[2] / "examples" / "data_parallel.py"


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))


def trained_alone(steps, ranks, micro_batches=2):
    """The example's model, on the mean of the gradients that the ranks have, in one process."""
    model = plain()
    options = {"lr": 1e-2, "budget": 0.05, "total_steps": steps, "max_grad_norm": 1.0, "select_every": 4}
    optimizer = ID3AdamW(model.named_parameters(), **options, release_gradients=True)
    for step in range(steps):
        for micro in range(micro_batches):
            losses = []
            for rank in range(ranks):
                seed = micro_batches * (step * ranks + rank) + micro
                x = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed))
                losses.append(nn.functional.cross_entropy(model(x), x[:, :8].argmax(1)))
            (sum(losses) / ranks / micro_batches).backward()
        optimizer.step()
    return model, optimizer


def test_the_example_runs_and_trains_what_one_process_trains(tmp_path):
    check_example(EXAMPLE, tmp_path, trained_alone, plain)
