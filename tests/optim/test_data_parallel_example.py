"""The example of data parallelism runs under torchrun, and its delta makes what one process trains."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from id3_optim import ID3AdamW, load_delta

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
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLE), "--output", str(tmp_path), "--steps", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    model, optimizer = trained_alone(8, 2)
    assert f"{optimizer.n_active} of {optimizer.n_entries} entries trained, 8 steps" in done.stdout
    base = plain()
    load_delta(tmp_path / "delta.safetensors").apply(base)
    for p, q in zip(model.parameters(), base.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)  # sums over tokens and replicas have another order
