"""An example for torchrun: it runs in two processes, and its delta makes what one process trains."""

import subprocess
import sys
from pathlib import Path

import torch

from id3_optim import load_delta

LEAVES = Path(__file__).parent / "run_and_leave.py"


def check_example(example, folder, trained_alone, plain):
    """trained_alone: (steps, ranks) -> the example's model and optimizer; plain: () -> the model before."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(LEAVES), str(example), "--output", str(folder), "--steps", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(example.read_text().splitlines()) <= 60
    model, optimizer = trained_alone(8, 2)
    assert f"{optimizer.n_active} of {optimizer.n_entries} entries trained, 8 steps" in done.stdout
    base = plain()
    load_delta(folder / "delta.safetensors").apply(base)
    for p, q in zip(model.parameters(), base.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)  # sums over tokens and ranks have another order
