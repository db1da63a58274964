"""Lightning's ModelParallelStrategy with FSDP2, in two processes: the example, its checkpoints and deltas."""

from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("lightning", reason="Lightning comes with the extra `lightning`")

from torchrun import LEAVES, launch

from id3_optim import ID3AdamW, load_delta

EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_fsdp2.py"
STEPS = 8


def run(output, *more):
    return launch(LEAVES, EXAMPLE, "--output", output, "--steps", STEPS, *more, timeout=200)


def built():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))


def trained_alone():
    """The example's model in one process, on the mean of the gradients that the ranks have."""
    model = built()
    options = {"lr": 1e-2, "budget": 0.05, "total_steps": STEPS, "max_grad_norm": 1.0}
    optimizer = ID3AdamW(model.named_parameters(), **options)
    rows = torch.randn(16 * STEPS, 32, generator=torch.Generator().manual_seed(1))
    samplers = [torch.utils.data.DistributedSampler(rows, 2, rank) for rank in range(2)]  # as Lightning's
    for step in range(STEPS):
        epoch, batch = divmod(step, STEPS // 2)
        for sampler in samplers:
            sampler.set_epoch(epoch)
            x = rows[list(sampler)[16 * batch : 16 * batch + 16]]
            (nn.functional.cross_entropy(model(x), x[:, :8].argmax(1)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_example_trains_what_one_process_trains_and_resumes(tmp_path):
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    done = run(tmp_path / "a")
    assert done.returncode == 0, done.stderr[-3000:]
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["step=4.ckpt", "step=4.delta.safetensors", "step=8.ckpt", "step=8.delta.safetensors"]
    delta, plain = load_delta(tmp_path / "a/step=8.delta.safetensors"), built()
    assert delta.settings["step"] == STEPS
    delta.apply(plain)
    for p, q in zip(trained_alone().parameters(), plain.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)  # the ranks add up their gradients in another order

    done = run(tmp_path / "b", "--resume", tmp_path / "a/step=4.ckpt")
    assert done.returncode == 0, done.stderr[-3000:]
    again = (tmp_path / "b/step=8.delta.safetensors").read_bytes()
    assert again == (tmp_path / "a/step=8.delta.safetensors").read_bytes()
