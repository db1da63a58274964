"""`id3_optim.analysis`: where the budget went, on optimizers whose answer is known."""

import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from id3_optim import analysis, plots
from id3_optim.analysis import Place, locate


class Touched(NamedTuple):
    param: torch.nn.Parameter
    indices: torch.Tensor
    originals: torch.Tensor | None


def selective(*touched):
    return SimpleNamespace(touched=lambda: iter([Touched(*entry) for entry in touched]))


def entries(count):
    return torch.arange(count, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "layer", "role"),
    [
        ("bert.encoder.layer.3.attention.self.query.weight", 3, "query"),
        ("bert.encoder.layer.3.attention.self.key.bias", 3, "key"),
        ("bert.encoder.layer.11.attention.self.value.weight", 11, "value"),
        ("bert.encoder.layer.3.attention.output.dense.weight", 3, "attention output"),
        ("bert.encoder.layer.3.attention.output.LayerNorm.bias", 3, "LayerNorm"),
        ("bert.encoder.layer.3.intermediate.dense.weight", 3, "FFN1"),
        ("bert.encoder.layer.3.output.dense.weight", 3, "FFN2"),
        ("bert.encoder.layer.3.output.LayerNorm.weight", 3, "LayerNorm"),
        ("bert.embeddings.word_embeddings.weight", None, "embeddings"),
        ("bert.embeddings.LayerNorm.weight", None, "LayerNorm"),
        ("bert.pooler.dense.weight", None, "pooler"),
        ("classifier.weight", None, "head"),
        ("roberta.encoder.layer.0.output.dense.bias", 0, "FFN2"),
        ("classifier.out_proj.weight", None, "head"),
        ("deberta.encoder.layer.7.attention.self.query_proj.weight", 7, "query"),
        ("deberta.encoder.layer.7.attention.self.value_proj.bias", 7, "value"),
        ("deberta.encoder.layer.7.attention.self.pos_key_proj.weight", 7, "key"),
        ("deberta.encoder.rel_embeddings.weight", None, "embeddings"),
        ("deberta.encoder.LayerNorm.weight", None, "LayerNorm"),
        ("model.layers.31.self_attn.q_proj.weight", 31, "query"),
        ("base_model.model.model.layers.5.self_attn.v_proj.lora_A.default.weight", 5, "value"),
        ("model.layers.31.self_attn.o_proj.weight", 31, "attention output"),
        ("model.layers.31.mlp.gate_proj.weight", 31, "FFN1"),
        ("model.layers.31.mlp.up_proj.weight", 31, "FFN1"),
        ("model.layers.31.mlp.down_proj.weight", 31, "FFN2"),
        ("model.layers.31.input_layernorm.weight", 31, "LayerNorm"),
        ("model.layers.31.post_attention_layernorm.weight", 31, "LayerNorm"),
        ("model.embed_tokens.weight", None, "embeddings"),
        ("model.norm.weight", None, "LayerNorm"),
        ("lm_head.weight", None, "head"),
        ("transformer.h.2.attn.c_attn.weight", 2, "query, key, value"),
        ("transformer.h.2.attn.c_proj.weight", 2, "attention output"),
        ("transformer.h.2.mlp.c_fc.weight", 2, "FFN1"),
        ("transformer.h.2.mlp.c_proj.bias", 2, "FFN2"),
        ("transformer.h.2.ln_1.weight", 2, "LayerNorm"),
        ("transformer.ln_f.weight", None, "LayerNorm"),
        ("transformer.wte.weight", None, "embeddings"),
        ("distilbert.transformer.layer.1.attention.out_lin.weight", 1, "attention output"),
        ("distilbert.transformer.layer.1.ffn.lin1.weight", 1, "FFN1"),
        ("model.layers.4.attn.Wqkv.weight", 4, "query, key, value"),
        ("model.layers.4.attn.Wo.weight", 4, "attention output"),
        ("conv1.weight", None, "other"),
    ],
)
def test_locate(name, layer, role):
    assert locate(name) == Place(layer, role)


@pytest.fixture
def model():
    """Two layers with a key and a value each, and an embedding."""
    keys = [
        torch.nn.ModuleDict({"key": torch.nn.Linear(4, 4), "value": torch.nn.Linear(4, 4)}) for _ in range(2)
    ]
    return torch.nn.ModuleDict({"embed": torch.nn.Embedding(10, 4), "layer": torch.nn.ModuleList(keys)})


def test_allocation_counts_every_entry_once(model):
    counts = {"embed.weight": 8, "layer.0.key.weight": 3, "layer.1.key.bias": 1, "layer.1.value.weight": 4}
    optimizer = selective(*((p, entries(counts.get(name, 0)), None) for name, p in model.named_parameters()))
    found = analysis.allocation(model, optimizer)
    assert found.roles == ["key", "value", "embeddings"]
    assert found.layers == [None, 0, 1]
    assert found.active.tolist() == [[0, 3, 1], [0, 0, 4], [8, 0, 0]]
    assert found.entries.tolist() == [[0, 20, 20], [0, 20, 20], [40, 0, 0]]
    assert found.share().sum() == 1.0 and found.share()[2, 0] == 0.5


def test_sparsity_of_tensors(model):
    parameters = list(model.parameters())
    assert len(parameters) == 9
    assert analysis.tensor_sparsity(selective(*((p, entries(0), None) for p in parameters))) == 1.0
    assert (
        analysis.tensor_sparsity(selective(*((p, entries(i % 3), None) for i, p in enumerate(parameters))))
        == 3 / 9
    )


def test_entropy_by_hand():
    """Densities ½, ¼, ¼ of tensors of different size: ½ ln 2 + ½ ln 4."""
    sizes_counts = [(8, 4), (16, 4), (4, 1), (5, 0)]
    optimizer = selective(*((torch.zeros(size), entries(count), None) for size, count in sizes_counts))
    assert analysis.sparsity_entropy(optimizer) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))


def test_entropy_at_its_ends():
    even = selective(*((torch.zeros(10 * n), entries(n), None) for n in range(1, 8)))
    assert analysis.sparsity_entropy(even) == pytest.approx(math.log(7))
    assert analysis.sparsity_entropy(selective((torch.zeros(4), entries(2), None))) == 0.0
    assert analysis.sparsity_entropy(selective((torch.zeros(4), entries(0), None))) == 0.0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_changed_entries_are_counted_by_flat_index(memory_format):
    param = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=memory_format)
    indices = torch.tensor([1, 5, 13, 23], dtype=torch.int32)
    assert analysis.entries_of(param, indices).tolist() == [1.0, 5.0, 13.0, 23.0]
    optimizer = selective(
        (param, indices, torch.tensor([1.0, 6.0, 13.0, 22.0])), (torch.zeros(3), entries(0), None)
    )
    assert analysis.count_changed(optimizer) == 2
    assert analysis.count_changed(selective((param, indices, None))) is None


def test_picture(model, tmp_path):
    pytest.importorskip("matplotlib", reason="the plots need matplotlib")
    history = [
        {"step": step, "loss": 1.0 / step, "tensor_sparsity": 0.5, "sparsity_entropy": 1.0}
        for step in range(1, 5)
    ]
    optimizer = selective(*((p, entries(2), None) for p in model.parameters()))
    curves = {"one": history, "another": [*history, {"step": 5, "eval_loss": 2.0}]}
    plots.save_plots(tmp_path / "new" / "plots.png", curves, model, optimizer)
    assert (tmp_path / "new" / "plots.png").read_bytes().startswith(b"\x89PNG")
    plots.save_plots(tmp_path / "losses.png", curves, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (tmp_path / "losses.png").stat().st_size > 1000


def test_loss_curve_leaves_evaluations_out():
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "eval_loss": 9.0}, {"step": 2, "loss": 1.0}]
    assert plots.loss_curve(history) == ([1, 2], [2.0, 1.0])
