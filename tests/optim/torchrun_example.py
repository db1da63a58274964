"""An example for torchrun: it runs in two processes, and its delta makes what one process trains."""

import torch
from torchrun import LEAVES, launch

from id3_optim import load_delta


def check_example(example, folder, trained_alone, plain):
    """trained_alone: (steps, ranks) -> the example's model and optimizer; plain: () -> the model before."""
    done = launch(LEAVES, example, "--output", folder, "--steps", 8, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(example.read_text().splitlines()) <= 60
    model, optimizer = trained_alone(8, 2)
    assert f"{optimizer.n_active} of {optimizer.n_entries} entries trained, 8 steps" in done.stdout
    base = plain()
    load_delta(folder / "delta.safetensors").apply(base)
    for p, q in zip(model.parameters(), base.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)  # sums over tokens and ranks have another order
