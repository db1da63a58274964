"""Released gradients under scalers, clipping, Accelerate, the Trainer and several processes."""

import pytest
import torch
from twins import Twins, loss_at

from id3_optim import GradScaler, ID3AdamW, Magnitude


@pytest.mark.parametrize("unscale", [False, True])
def test_our_scaler_gives_the_bits_of_torchs(model, unscale):
    """Steps 3 and 4 overflow; only a scaler that looks can tell."""
    twins = Twins(model, max_grad_norm=0.05, budget=0.2)
    scalers = [
        kind("cpu", init_scale=2.0**12, growth_interval=4) for kind in (torch.amp.GradScaler, GradScaler)
    ]
    for step in range(12):
        for (net, optimizer), scaler in zip((twins.dense, twins.released), scalers, strict=True):
            loss = loss_at(step)(net)
            if step in (3, 4):
                loss = loss * float("inf" if step == 3 else "nan")
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    twins.check_same()
    assert twins.released[1].steps_done == 10
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert scalers[1].get_scale() == 2.0**11


def test_an_overflow_forgets_the_gradients(model):
    twins = Twins(model, strategy="static")
    twins.step(loss_at(0))
    net, optimizer = twins.released
    scaler = GradScaler("cpu", init_scale=1.0)
    scaler.scale(loss_at(7)(net) * float("inf")).backward()
    scaler.step(optimizer)
    assert optimizer.steps_done == 1
    twins.step(loss_at(1))
    twins.check_same()


def test_our_scaler_serves_other_optimizers_and_none_as_torchs(model):
    scaler = GradScaler("cpu", init_scale=8.0)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    scaler.scale(loss_at(0)(model)).backward()
    scaler.step(plain)
    scaler.update()
    assert not torch.equal(model[0].weight, before)
    plain.zero_grad()
    optimizer = ID3AdamW(model.parameters(), budget=50, total_steps=5, release_gradients=True)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)  # without a gradient
    scaler.update()
    assert optimizer.steps_done == 1 and optimizer.n_active == 0


@pytest.mark.parametrize("unscale", [False, True])
def test_torchs_scaler_is_refused_by_name(model, unscale):
    scaler = torch.amp.GradScaler("cpu")
    optimizer = ID3AdamW(model.parameters(), budget=50, total_steps=5, release_gradients=True)
    scaler.scale(loss_at(0)(model)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"use id3_optim\.GradScaler"):
        scaler.step(optimizer)
    assert optimizer.steps_done == 0


def test_clip_grad_norm_finds_nothing_to_clip(model):
    optimizer = ID3AdamW(model.parameters(), budget=50, total_steps=5, release_gradients=True)
    loss_at(0)(model).backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-9) == 0
    optimizer.step()
    moments = [state["exp_avg"] for state in optimizer.state_dict()["state"].values()]
    assert torch.cat(moments).abs().max() > 1e-6


def test_several_processes_are_refused(model, monkeypatch):
    optimizer = ID3AdamW(model.parameters(), budget=50, total_steps=5, release_gradients=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"of FSDP2, got 2 processes: .* DistributedDataParallel"):
        loss_at(0)(model).backward()
    with pytest.raises(ValueError, match="expected one process, or parameters of FSDP2, got 2"):
        ID3AdamW(model.parameters(), budget=50, total_steps=5, release_gradients=True)
    assert ID3AdamW(model.parameters(), budget=50, total_steps=5).n_active == optimizer.n_active == 0


def test_what_does_not_go_together_is_refused(model):
    options = {"budget": 50, "total_steps": 5}
    with pytest.raises(ValueError, match="strategy 'repeat'"):
        ID3AdamW(model.parameters(), release_gradients=True, strategy="repeat", **options)
    with pytest.raises(ValueError, match="select_from: expected one of last, max, got 'best'"):
        ID3AdamW(model.parameters(), release_gradients=True, select_from="best", **options)
    with pytest.raises(ValueError, match="needs release_gradients=True"):
        ID3AdamW(model.parameters(), select_from="max", **options)
    optimizer = ID3AdamW(model.parameters(), budget=50, release_gradients=True)
    with pytest.raises(ValueError, match="total_steps: expected"):
        loss_at(0)(model).backward()
    assert optimizer.n_entries is None


def test_accelerate(model):
    accelerate = pytest.importorskip("accelerate", reason="comes with the extra `hf`")
    twins = Twins(model, strategy="static")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared = [accelerator.prepare(*pair) for pair in (twins.dense, twins.released)]
    for step in range(8):
        for net, optimizer in prepared:
            accelerator.gradient_state._set_sync_gradients(step % 2 == 1)
            loss = loss_at(step if step > 1 else 0)(net)
            if step > 0:
                accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    twins.check_same()
    assert twins.released[1].steps_done == 4


transformers = pytest.importorskip("transformers", reason="the Trainer comes with the extra `hf`")


def trained(folder, accumulate, reentrant, **options):
    from id3_optim.integrations.huggingface import ID3Callback, parameter_groups

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    net = transformers.BertForSequenceClassification(config)
    head = {"classifier.weight", "classifier.bias"}
    optimizer = ID3AdamW(parameter_groups(net, head), lr=1e-2, budget=0.05, max_grad_norm=1.0, **options)
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        gradient_checkpointing=reentrant is not None,
        gradient_checkpointing_kwargs={"use_reentrant": bool(reentrant)},
        num_train_epochs=1,
        logging_steps=1,
        max_grad_norm=0,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"input_ids": torch.randint(0, 50, (8,), generator=generator), "labels": i % 2} for i in range(12)
    ]
    callback = ID3Callback()
    trainer = transformers.Trainer(
        net, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[callback]
    )
    trainer.train()
    return net, optimizer, trainer.state.log_history


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_trainer_runs_unchanged(tmp_path, reentrant):
    dense, want, _ = trained(tmp_path, 1, reentrant)
    released, optimizer, history = trained(tmp_path, 1, reentrant, release_gradients=True)
    assert all(map(torch.equal, dense.parameters(), released.parameters()))
    assert optimizer.n_active == want.n_active == optimizer.budget
    assert all(0 < row["grad_norm"] < 100 for row in history if "grad_norm" in row)  # of the dense head alone


def test_the_trainer_accumulates(tmp_path):
    """Magnitude picks the same entries whatever the gradients; after that both train by the same sums."""
    _, dense, _ = trained(tmp_path, 3, None, strategy="static", heuristic=Magnitude())
    _, released, _ = trained(
        tmp_path, 3, None, strategy="static", heuristic=Magnitude(), release_gradients=True
    )
    assert dense.steps_done == released.steps_done == 2
    for mine, theirs in zip(dense.touched(), released.touched(), strict=True):
        assert torch.equal(mine.indices, theirs.indices)
