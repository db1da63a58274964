"""ReferenceModel in TRL's trainers: the losses of a copied reference, without the copy."""

import pytest
import torch

pytest.importorskip("trl", reason="TRL comes with the extra `trl`")

from datasets import Dataset
from tiny_models import word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from id3_optim import ID3AdamW, ReferenceModel
from id3_optim.integrations.huggingface import ID3Callback

ARGUMENTS = {"max_steps": 5, "per_device_train_batch_size": 4, "max_grad_norm": 0, "logging_steps": 1}
ARGUMENTS |= {
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "bf16": False,
}


@pytest.fixture
def llama(tmp_path):
    """A folder with a tiny model, which TRL loads its copied reference from."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = LlamaConfig(
        vocab_size=19, bos_token_id=None, eos_token_id=4, pad_token_id=0, initializer_range=0.3, **size
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def policy(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    return model, ID3AdamW(model.named_parameters(), lr=3e-2, budget=0.1)


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def dpo(folder, reference, **options):
    rows = [{"prompt": "the film was", "chosen": " good", "rejected": " awful"}] * 16
    model, optimizer = policy(folder)
    trainer = DPOTrainer(
        model,
        ref_model=ReferenceModel(model, optimizer) if reference else None,
        args=DPOConfig(output_dir=folder, **ARGUMENTS, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=word_tokenizer(eos_token="</s>", pad_token="[PAD]"),
        optimizers=(optimizer, None),
        callbacks=[ID3Callback()],
    )
    return trainer


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": False}])
def test_dpo_has_the_losses_of_a_copied_reference(llama, options):
    copied, ours = dpo(llama, False, **options), dpo(llama, True, **options)
    assert sum(p.numel() for p in copied.ref_model.parameters()) > 0 == len(list(ours.ref_model.parameters()))
    for trainer in (copied, ours):
        trainer.train()
    losses = logged(copied, "loss")
    assert losses == logged(ours, "loss") and len(set(losses)) == 5
    assert logged(copied, "rewards/margins") == logged(ours, "rewards/margins")
    pairs = zip(copied.model.parameters(), ours.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_reference_that_is_synchronised_is_refused(llama):
    """TRL would write into the reference's weights, which are the policy's."""
    trainer = dpo(llama, True, sync_ref_model=True, ref_model_sync_steps=1)
    with pytest.raises(ValueError, match="zip"):
        trainer.train()


def grpo(folder, reference):
    model, optimizer = policy(folder)
    arguments = GRPOConfig(
        output_dir=folder, num_generations=4, max_completion_length=4, beta=0.1, **ARGUMENTS
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "the film was"}] * 16),
        processing_class=word_tokenizer(eos_token="</s>", pad_token="[PAD]"),
        optimizers=(optimizer, None),
        callbacks=[ID3Callback()],
    )
    if reference:
        trainer.ref_model = ReferenceModel(trainer.model, optimizer)
    return trainer


def test_grpo_has_the_losses_of_a_copied_reference(llama):
    found = []
    for reference in (False, True):
        torch.manual_seed(0)
        trainer = grpo(llama, reference)
        trainer.train()
        found.append((logged(trainer, "loss"), logged(trainer, "kl")))
    assert found[0] == found[1]
    assert any(kl != 0 for kl in found[0][1])
