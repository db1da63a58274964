"""ID3AdamW in a plain loop with Accelerate: prepare, accumulate, clip, save_state and load_state."""

import pytest
import torch

pytest.importorskip("accelerate", reason="Accelerate comes with the extra `hf`")

from accelerate import Accelerator
from accelerate.state import AcceleratorState

from id3_optim import ID3AdamW, load_delta, save_delta


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps precision and device for the process; the next test wants its own."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def rows():
    x = torch.randn(48, 20, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.TensorDataset(x, x[:, :4].argmax(1))


def tiny():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Dropout(0.1), torch.nn.Linear(30, 4))


def run(folder, resume=None, mixed_precision="no", clip=None, dtype=torch.float32, **options):
    """3 epochs of 12 batches, accumulated over 3: 12 steps; the state is saved after every epoch."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3, mixed_precision=mixed_precision)
    model = tiny().to(dtype)
    optimizer = ID3AdamW(model.named_parameters(), **{"lr": 1e-2, "budget": 60} | options)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12)
    loader = torch.utils.data.DataLoader(rows(), batch_size=4, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    inner = optimizer.optimizer
    first = 0
    if resume is not None:
        accelerator.load_state(resume)
        first = inner.steps_done // 4
    if inner.total_steps is None:
        inner.set_total_steps(12)
    for epoch in range(first, 3):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.cross_entropy(model(x.to(dtype)), y))
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.save_state(folder / f"epoch-{epoch + 1}")
    accelerator.free_memory()
    return model, optimizer, inner


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bit_exact(tmp_path, mixed_precision, dtype):
    options = {"clip": 0.5, "mixed_precision": mixed_precision, "dtype": dtype}
    torch.manual_seed(5)
    straight, _, optimizer = run(tmp_path / "straight", **options)
    assert (optimizer.steps_done, optimizer.total_steps, optimizer.n_active) == (12, 12, 60)
    for epoch in (1, 2):
        resumed, _, second = run(tmp_path / "resumed", tmp_path / f"straight/epoch-{epoch}", **options)
        assert (second.steps_done, second.total_steps, second.n_active) == (12, 12, 60)
        assert all(map(torch.equal, straight.parameters(), resumed.parameters()))
        for mine, theirs in zip(second.touched(), optimizer.touched(), strict=True):
            assert torch.equal(mine.indices, theirs.indices)


def test_the_wrapped_pair_saves_its_delta(tmp_path):
    model, wrapped, optimizer = run(tmp_path, max_grad_norm=1.0)
    save_delta(tmp_path / "delta.safetensors", model, wrapped)
    base = tiny()
    delta = load_delta(tmp_path / "delta.safetensors")
    delta.apply(base)
    assert delta.settings["step"] == optimizer.steps_done == 12
    assert all(map(torch.equal, base.parameters(), model.parameters()))


def test_another_budget_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(
        ValueError, match="budget: expected 50 as in the optimizer, got 60 in the saved state"
    ):
        run(tmp_path, tmp_path / "epoch-1", budget=50)
