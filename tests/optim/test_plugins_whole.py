"""Whole runs of other packages' trainers from their YAML files, where a package is installed.

`make test-plugins` installs each in a fresh environment."""

import json
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="the trainers need the extra `hf`")

from tiny_models import save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from id3_optim import diff, load_delta


def models(folder):
    return [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("base", "out")]


def test_axolotl(tmp_path, monkeypatch):
    pytest.importorskip("axolotl", reason="make test-plugins")
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    save_llama(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text('{"text": "the film was good"}\n' * 32)
    (tmp_path / "config.yml").write_text(f"""
        base_model: {tmp_path}/base
        plugins: [id3_optim.integrations.axolotl.ID3Plugin]
        id3: {{budget: 300, max_grad_norm: 1.0}}
        optimizer: adamw_torch
        max_grad_norm: 0
        learning_rate: 0.01
        lr_scheduler: constant
        datasets: [{{path: {tmp_path}/data.jsonl, ds_type: json, type: completion}}]
        dataset_prepared_path: {tmp_path}/prepared
        dataset_num_proc: 1
        output_dir: {tmp_path}/out
        sequence_len: 32
        micro_batch_size: 2
        gradient_accumulation_steps: 1
        max_steps: 6
        save_steps: 3
        val_set_size: 0
        attn_implementation: eager
        bf16: false
    """)
    cfg = load_cfg(str(tmp_path / "config.yml"))
    train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    delta = load_delta(tmp_path / "out/checkpoint-6/delta.safetensors")
    assert delta.inspect()["entries"] == 300 and delta.settings["total_steps"] == 6
    base, tuned = models(tmp_path)
    delta.apply(base)
    assert all(map(torch.equal, base.parameters(), tuned.parameters()))


TEMPLATE = """{% for m in messages %}{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}
{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"""


def test_llamafactory(tmp_path, monkeypatch):
    pytest.importorskip("llamafactory", reason="make test-plugins")
    from llamafactory.v1.trainers.sft_trainer import run_sft

    import id3_optim.integrations.llamafactory  # noqa: F401 - registers the optimizer

    tokenizer = AutoTokenizer.from_pretrained(save_llama(tmp_path / "base"))
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, "[PAD]"
    tokenizer.save_pretrained(tmp_path / "base")
    facts = [{"instruction": "the film was", "input": "", "output": "good"}] * 32
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    data = f"facts: {{path: {tmp_path}/facts.json, source: local, converter: alpaca}}"
    (tmp_path / "data.yaml").write_text(data)
    (tmp_path / "config.yaml").write_text(f"""
model: {tmp_path}/base
train_dataset: {tmp_path}/data.yaml
output_dir: {tmp_path}/out
micro_batch_size: 2
global_batch_size: 2
cutoff_len: 32
max_steps: 6
max_grad_norm: 1.0e+9
bf16: false
batching_workers: 0
optim_config: {{name: id3, lr: 0.01, budget: 300, total_steps: 6, max_grad_norm: 1.0}}
""")
    monkeypatch.setattr(sys, "argv", ["llamafactory", str(tmp_path / "config.yaml")])
    run_sft()
    base, tuned = models(tmp_path)
    changes = diff(base, tuned).inspect()
    assert 0 < changes["entries"] <= 300 and not changes["dense_entries"]
