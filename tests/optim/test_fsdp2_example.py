"""The example of FSDP2 runs under torchrun, and its delta makes what one process trains."""

from pathlib import Path

import torch
from torch import nn
from torchrun_example import check_example

from id3_optim import ID3AdamW

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2.py"


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))


def trained_alone(steps, ranks):
    """The example's model, on the mean of the gradients that the ranks have, in one process."""
    model = plain()
    optimizer = ID3AdamW(model.named_parameters(), lr=1e-2, budget=0.05, total_steps=steps, max_grad_norm=1.0)
    for step in range(steps):
        for rank in range(ranks):
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step * ranks + rank))
            (nn.functional.cross_entropy(model(x), x[:, :8].argmax(1)) / ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_the_example_runs_and_trains_what_one_process_trains(tmp_path):
    check_example(EXAMPLE, tmp_path, trained_alone, plain)
