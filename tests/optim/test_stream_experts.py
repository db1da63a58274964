"""Streams and the names of a checkpoint that keeps the experts of a layer apart."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="the experts are those of transformers' models")

import transformers
from safetensors.torch import load_file

from id3_optim import ID3AdamW, WeightReceiver, WeightStream
from id3_optim.delta.coordinates import Part, checkpoint_parts, part_views

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "intermediate_size": 24}


def mixtral():
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def qwen2_moe():
    sizes = {"num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**SIZES, **sizes))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=True))


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("build", [mixtral, qwen2_moe, llama])
def test_the_parts_are_the_weights_of_the_checkpoint(build, tmp_path):
    model = build()
    views, weights = part_views(model), saved(model, tmp_path)
    assert views.keys() == weights.keys()
    assert all(torch.equal(views[name], weights[name]) for name in weights)
    views["model.norm.weight"].fill_(7)
    assert (model.model.norm.weight == 7).all()


FAMILY = {**SIZES, "num_key_value_heads": 2, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4}
FAMILY |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2}
FAMILY |= {"n_group": 1, "topk_group": 1, "head_dim": 8, "pad_token_id": 0, "first_k_dense_replace": 1}
FAMILY |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}


@pytest.mark.parametrize(
    "kind", ["deepseek_v3", "gpt_oss", "jamba", "llama4_text", "phimoe", "qwen3_moe", "qwen3_next", "gpt2"]
)
def test_the_families_of_transformers(kind, tmp_path):
    config = transformers.AutoConfig.for_model(kind, **FAMILY)
    model = transformers.AutoModelForCausalLM.from_config(config)
    views, weights = part_views(model), saved(model, tmp_path)
    assert views.keys() == weights.keys() - {name for name, _ in model.named_buffers()}
    assert all(torch.equal(views[name], weights[name]) for name in views)


@pytest.mark.parametrize("build", [mixtral, qwen2_moe])
def test_updates_have_the_names_and_indices_of_the_checkpoint(build, tmp_path):
    torch.manual_seed(0)
    model = build()
    receiver = WeightReceiver(copy.deepcopy(model))
    before = saved(model, tmp_path)
    optimizer = ID3AdamW(model.named_parameters(), lr=1e-2, budget=0.5, total_steps=3)
    stream = WeightStream(model, optimizer)
    for step in range(3):
        ids = torch.arange(2 * step, 2 * step + 8)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    update = stream.next()
    assert any(".experts.3." in name for name in update.changes)
    after = saved(model, tmp_path)
    for name, change in update.changes.items():
        assert change.shape == tuple(before[name].shape)
        before[name].view(-1)[change.indices.long()] = change.values
    assert all(torch.equal(before[name], after[name]) for name in after)
    receiver.apply_patch(update)
    assert all(torch.equal(weight, after[name]) for name, weight in receiver._weights.items())


@pytest.mark.parametrize("strides", [(4, 1), (1, 3)])
def test_a_part_finds_its_indices(strides):
    """Row-major, and transposed in the parameter."""
    part, param = Part("part", (3, 4), 24, strides), torch.arange(48.0).view(4, 4, 3)
    indices = torch.arange(0, 48, 3, dtype=torch.int32)
    selected, flat = part.locate(indices)
    assert flat.numel() == 4 and bool((flat.diff() > 0).all())
    assert torch.equal(part.view(param).reshape(-1)[flat.long()], indices[selected].float())


def test_every_other_column_is_a_part():
    part, param = Part("part", (4, 3), 1, (6, 2)), torch.arange(24.0).view(4, 6)
    indices = torch.tensor([0, 1, 2, 7, 8, 23], dtype=torch.int32)
    selected, flat = part.locate(indices)
    assert indices[selected].tolist() == [1, 7, 23]
    assert torch.equal(part.view(param).reshape(-1)[flat.long()], indices[selected].float())


def test_a_conversion_that_copies_is_refused_by_name(monkeypatch):
    model = llama()
    optimizer = ID3AdamW(model.named_parameters(), lr=1e-2, budget=0.9, total_steps=1)
    name = "model.layers.0.mlp.up_proj.weight"

    def copied(_, state):
        return state | {name: state[name].clone()}

    monkeypatch.setattr("transformers.core_model_loading.revert_weight_conversion", copied)
    assert checkpoint_parts(model)[name] == []
    stream = WeightStream(model, optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(ValueError, match=f"{name}: expected a parameter whose checkpoint holds views of it"):
        stream.next()
