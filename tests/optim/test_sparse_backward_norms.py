"""sparse_backward on models of transformers with RMSNorms: the same bits, and less is kept."""

import pytest
import torch
from sparse_twins import SparseTwins
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from id3_optim import ID3AdamW, sparse_backward
from id3_optim.backward import handle

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen():
    """It has norms of queries and keys, too."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))


def ids_at(step):
    return torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(step))


def loss_at(step, dtype=torch.float32):
    ids = ids_at(step)

    def loss(model):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            return model(input_ids=ids, labels=ids).loss

    return loss


def norms_of(model):
    """The class names of its norms."""
    return [type(m).__name__ for m in model.modules() if type(m).__name__.endswith("RMSNorm")]


def plain_norms(monkeypatch):
    monkeypatch.setattr(handle, "norm_class", lambda plain: None)


@pytest.fixture(params=["none", "reentrant", "not reentrant"])
def checkpointed(request):
    def of(model):
        if request.param != "none":
            kwargs = {"use_reentrant": request.param == "reentrant"}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
            model.enable_input_require_grads()
            model.train()
        return model

    return of


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("make", [llama, qwen])
def test_the_bits_of_norms_that_keep_everything(monkeypatch, checkpointed, make, every):
    options = {"select_every": every, "budget": 0.9, "total_steps": 7}
    ours = SparseTwins(checkpointed(make()), **options)
    with monkeypatch.context() as patch:
        plain_norms(patch)
        plain = SparseTwins(checkpointed(make()), **options)
    assert all(name.startswith("Sparse") for name in norms_of(ours.sparse[0]))
    assert not any(name.startswith("Sparse") for name in norms_of(plain.sparse[0]))
    for step in range(7):
        for dtype in (torch.float32, torch.bfloat16)[: 1 + step % 2]:  # two passes in every other step
            for twins in (ours, plain):
                loss_at(step, dtype)(twins.sparse[0]).backward()
        for twins in (ours, plain):
            twins.sparse[1].step()
    for one, other in zip(ours.sparse[0].parameters(), plain.sparse[0].parameters(), strict=True):
        assert torch.equal(one, other)
    assert any(t.indices.numel() for t in ours.sparse[1].touched() if t.param.dim() == 1), (
        "no norm is trained"
    )


def kept_bytes(model, step):
    """Of all tensors that the forward pass keeps for the backward pass, each storage once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = loss_at(step)(model)
    loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(x.untyped_storage().nbytes() for at, x in storages.items() if at not in weights)


def test_a_step_that_selects_keeps_one_tensor_less_for_each_norm(monkeypatch):
    kept = {}
    for ours in (True, False):
        model = llama()
        optimizer = ID3AdamW(model.named_parameters(), budget=200, total_steps=9, select_every=3)
        with monkeypatch.context() as patch:
            if not ours:
                plain_norms(patch)
            sparse_backward(model, optimizer)
        kept[ours] = []
        for step in range(3):
            kept[ours].append(kept_bytes(model, step))
            optimizer.step()
    # The normalised input, and what it was multiplied by.
    norms, hidden, scales = 5, 2 * 6 * 16 * 4, 2 * 6 * 4
    assert kept[False][0] - kept[True][0] == norms * (hidden + scales)
    assert kept[False][1:] == kept[True][1:]


def test_a_graph_that_is_kept_and_gradients_of_a_norm_alone():
    model = llama()
    optimizer = ID3AdamW(model.named_parameters(), budget=200, total_steps=9)
    weight = model.model.norm.weight
    wanted = torch.autograd.grad(loss_at(0)(model), weight)[0]
    sparse_backward(model, optimizer)
    loss = loss_at(0)(model)
    assert torch.equal(torch.autograd.grad(loss, weight, retain_graph=True)[0], wanted)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()


def test_a_replaced_forward_pass_stays_and_remove_gives_plain_norms_back():
    model = llama()
    replaced, other = model.model.norm, model.model.layers[0].input_layernorm
    calls = []
    replaced.forward = lambda x: calls.append(1) or type(replaced).forward(replaced, x)
    optimizer = ID3AdamW(model.named_parameters(), budget=200, total_steps=9)
    changed = sparse_backward(model, optimizer)
    assert type(replaced).__name__ == "LlamaRMSNorm" and type(other).__name__ == "SparseLlamaRMSNorm"
    loss_at(0)(model).backward()
    assert calls == [1]
    changed.remove()
    assert type(other).__name__ == "LlamaRMSNorm"


def test_compiled_blocks_compute_the_same():
    results = []
    for compiled in (False, True):
        model = llama()
        optimizer = ID3AdamW(model.named_parameters(), budget=200, total_steps=4, select_every=2)
        sparse_backward(model, optimizer)
        if compiled:
            for layer in model.model.layers:
                layer.compile(backend="eager")
        for step in range(3):
            loss_at(step)(model).backward()
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
