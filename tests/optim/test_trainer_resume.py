"""transformers.Trainer's own checkpoints: a run resumed from one ends where the uninterrupted run does."""

import pytest
import torch

from id3_optim import ID3AdamW

transformers = pytest.importorskip("transformers", reason="the Trainer comes with the extra `hf`")


def run(folder, resume=None):
    """16 rows in batches of 2, accumulated over 2, for 2 epochs: 8 steps, a checkpoint every 3."""
    from id3_optim.integrations.huggingface import ID3Callback, parameter_groups

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForSequenceClassification(config)
    head = {"classifier.weight", "classifier.bias"}
    optimizer = ID3AdamW(parameter_groups(model, head), lr=1e-2, budget=0.05, max_grad_norm=1.0)
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        save_steps=3,
        max_grad_norm=0,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    generator = torch.Generator().manual_seed(1)
    rows = [
        {"input_ids": torch.randint(0, 50, (8,), generator=generator), "labels": i % 2} for i in range(16)
    ]
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, optimizers=(optimizer, None), callbacks=[ID3Callback()]
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, optimizer


@pytest.mark.parametrize("checkpoint", [3, 6])
def test_resume_from_checkpoint_is_bit_exact(tmp_path, checkpoint):
    straight, optimizer = run(tmp_path / "straight")
    resumed, second = run(tmp_path / "resumed", str(tmp_path / f"straight/checkpoint-{checkpoint}"))
    assert (second.steps_done, second.total_steps, second.n_active) == (8, 8, optimizer.budget)
    assert all(map(torch.equal, straight.parameters(), resumed.parameters()))
    for mine, theirs in zip(second.touched(), optimizer.touched(), strict=True):
        assert torch.equal(mine.indices, theirs.indices)
