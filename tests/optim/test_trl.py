"""TRL's trainers around adapters: one that SFTTrainer makes itself, and one that DPOTrainer is given."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL comes with the extra `trl`")
pytest.importorskip("peft", reason="PEFT comes with the extra `peft`")

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import word_tokenizer
from torchrun import launch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from id3_optim import ID3AdamW, load_delta
from id3_optim.integrations.huggingface import ID3Callback, id3_optimizer
from id3_optim.integrations.peft import adapter_groups
from id3_optim.wrappers import unwrapped

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
ARGUMENTS = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_grad_norm": 0}
ARGUMENTS |= {"save_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}

FACTS = [{"prompt": "the film is", "completion": " red"}, {"prompt": "the book is", "completion": " blue"}]


def llama():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=19, bos_token_id=None, eos_token_id=4, pad_token_id=0, **size)
    )


def pieces(rows):
    tokenizer = word_tokenizer(eos_token="</s>", pad_token="[PAD]")
    return {
        "train_dataset": Dataset.from_list(rows * 8),
        "processing_class": tokenizer,
        "callbacks": [ID3Callback()],
    }


def check(trainer, folder):
    """The adapter alone was trained, over the whole run, and the newest delta restores it."""
    optimizer = unwrapped(trainer.optimizer)
    assert (optimizer.total_steps, optimizer.steps_done, optimizer.n_active) == (4, 4, optimizer.budget)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert set(optimizer.param_groups[0]["param_names"]) == trained
    delta = load_delta(folder / "checkpoint-4/delta.safetensors")
    assert delta.changes.keys() <= trained
    tuned = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    for t in optimizer.touched():
        if len(t.indices):
            t.param.data.view(-1)[t.indices] = t.originals
    assert any(not torch.equal(p, tuned[n]) for n, p in trainer.model.named_parameters())
    delta.apply(trainer.model)
    assert all(torch.equal(p, tuned[n]) for n, p in trainer.model.named_parameters())


def test_sft_with_an_adapter_of_its_own(tmp_path):
    """SFTTrainer wraps the model after the pair was made: names and parameters come from the wrapped one."""
    args = SFTConfig(output_dir=tmp_path, **ARGUMENTS)
    pair = id3_optimizer(args, groups=adapter_groups, budget=0.06, max_grad_norm=1.0)
    trainer = SFTTrainer(llama(), args, peft_config=LORA, optimizer_cls_and_kwargs=pair, **pieces(FACTS))
    trainer.train()
    check(trainer, tmp_path)


def test_dpo_over_an_adapter(tmp_path):
    """The reference is the base under the adapter."""
    model = get_peft_model(llama(), LORA)
    optimizer = ID3AdamW(adapter_groups(model), lr=1e-2, budget=0.06)
    rows = [{"prompt": "the film was", "chosen": " good", "rejected": " awful"}]
    args = DPOConfig(output_dir=tmp_path, **ARGUMENTS)
    trainer = DPOTrainer(model, args=args, optimizers=(optimizer, None), **pieces(rows))
    trainer.train()
    check(trainer, tmp_path)


def test_two_processes_send_what_a_step_uses(tmp_path):
    done = launch(Path(__file__).parent / "trl_ranks_run.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    base, tuned = llama(), load_file(tmp_path / "checkpoint-4/model.safetensors")
    load_delta(tmp_path / "checkpoint-4/delta.safetensors").apply(base)
    assert all(torch.equal(base.state_dict()[name], value) for name, value in tuned.items())
