"""The example of FSDP2 runs under torchrun, and its delta makes what one process trains."""

import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from id3_optim import ID3AdamW, load_delta

EXAMPLE = Path(__file__).parents[2] / "examples" / "fsdp2.py"


def trained_alone(steps, ranks):
    """The example's model, on the mean of the gradients that the ranks have, in one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))
    optimizer = ID3AdamW(model.named_parameters(), lr=1e-2, budget=0.05, total_steps=steps, max_grad_norm=1.0)
    for step in range(steps):
        for rank in range(ranks):
            x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step * ranks + rank))
            (nn.functional.cross_entropy(model(x), x[:, :8].argmax(1)) / ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_the_example_runs_and_trains_what_one_process_trains(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(EXAMPLE), "--output", str(tmp_path), "--steps", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    model, optimizer = trained_alone(8, 2)
    assert f"{optimizer.n_active} of {optimizer.n_entries} entries trained, 8 steps" in done.stdout
    delta = load_delta(tmp_path / "delta.safetensors")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))
    delta.apply(plain)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)  # the ranks add up their gradients in another order
