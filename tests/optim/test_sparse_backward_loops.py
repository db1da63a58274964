"""sparse_backward inside what surrounds a training step: checkpoints, scalers, compile, transformers, TRL."""

import copy

import pytest
import torch
from sparse_twins import SparseTwins
from test_release_checkpoints import Blocks
from test_sparse_backward import RHYTHMS, Net, ids_of, loss_at
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from twins import loss_at as dense_loss_at

from id3_optim import GradScaler, ID3AdamW, sparse_backward
from id3_optim.backward.weight import Use


@pytest.mark.parametrize("every", RHYTHMS)
@pytest.mark.parametrize("outside", ["first and last", "first", "last", "nothing"])
@pytest.mark.parametrize("how", ["not reentrant", "reentrant", "own"])
def test_gradient_checkpoints(outside, how, every):
    twins = SparseTwins(Blocks(outside), budget=300, total_steps=6, select_every=every)
    twins.sparse[0].how = how
    for step in range(6):
        for i in range(2):
            for net in (twins.released[0], twins.sparse[0]):
                dense_loss_at(10 * step + i)(net).backward()
        for _, optimizer in (twins.released, twins.sparse):
            optimizer.step()
        twins.check_close(1e-5)


@pytest.mark.parametrize("how", ["not reentrant", "own"])
def test_a_checkpointed_layer_is_not_taken_for_one_called_twice(how, monkeypatch):
    """Its gradient is made in parts, although its forward pass runs twice."""
    from id3_optim.step import products

    monkeypatch.setattr(products.Product, "whole", lambda *_: pytest.fail("made whole"))
    net = Blocks("first and last")
    net.how = how
    optimizer = ID3AdamW(net.named_parameters(), budget=300, total_steps=6)
    sparse_backward(net, optimizer)
    for step in range(3):
        dense_loss_at(step)(net).backward()
        optimizer.step()


@pytest.mark.parametrize("every", RHYTHMS)
def test_a_grad_scaler(every):
    net = Net()
    plain, scaled = SparseTwins(net, select_every=every).sparse, SparseTwins(net, select_every=every).sparse
    scaler = GradScaler("cpu", init_scale=2.0**10)
    for step in range(9):
        loss_at(step)(plain[0]).backward()
        plain[1].step()
        scaler.scale(loss_at(step)(scaled[0])).backward()
        scaler.step(scaled[1])
        scaler.update()
    for p, q in zip(plain[0].parameters(), scaled[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_an_overflow_changes_nothing_and_the_step_is_taken_again():
    net = Net()
    optimizer = ID3AdamW(net.named_parameters(), budget=50, total_steps=8, select_every=2)
    sparse_backward(net, optimizer)
    scaler = GradScaler("cpu", init_scale=2.0**4)
    for step in range(6):
        before = copy.deepcopy(net.state_dict())
        loss = loss_at(step)(net) * (float("inf") if step == 3 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        same = all(map(torch.equal, before.values(), net.state_dict().values()))
        assert same == (step == 3)
    assert optimizer.steps_done == 5


@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "by block"])
def test_torch_compile(whole):
    """Each layer breaks the graph; what is around it is compiled."""
    torch._dynamo.reset()
    twins = SparseTwins(Net(), select_every=4)
    net = twins.sparse[0]
    if whole:
        compiled = torch.compile(net, backend="eager")
    else:
        net.up, net.mix = (torch.compile(layer, backend="eager") for layer in (net.up, net.mix))
        compiled = net
    for step in range(8):
        for run, optimizer in ((twins.released[0], twins.released[1]), (compiled, twins.sparse[1])):
            loss_at(step)(run).backward()
            optimizer.step()
    twins.check_close(1e-5)


MODELS = {
    "albert": lambda: AlbertModel(AlbertConfig(  # whose layers are one layer
        vocab_size=60, embedding_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )),
    "bert": lambda: BertModel(BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        tie_word_embeddings=False,
    )),
}  # fmt: skip


def transformer_loss(step):
    def loss(net):
        ids = ids_of(step, (4, 12))
        if isinstance(net, AlbertModel | BertModel):
            return net(input_ids=ids).last_hidden_state.square().mean()
        return net(input_ids=ids, labels=ids).loss

    return loss


@pytest.mark.parametrize("every", RHYTHMS)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("checkpoints", [False, True], ids=["", "checkpoints"])
def test_transformers(kind, every, checkpoints):
    torch.manual_seed(0)
    model = MODELS[kind]().train()
    twins = SparseTwins(model, select_every=every, max_grad_norm=1.0)
    if checkpoints:
        if not model.supports_gradient_checkpointing:
            pytest.skip(f"{type(model).__name__} has no gradient checkpoints")
        twins.sparse[0].gradient_checkpointing_enable()
    for step in range(8):
        one, other = twins.step(transformer_loss(step))
        assert other == pytest.approx(one, rel=1e-4)
    twins.check_same_entries()
    ways = {way.name: way for way in twins.handle.ways}
    sparse = [name for name, way in ways.items() if way.way == "sparse"]
    assert len(sparse) >= 2 * 4
    if kind == "gpt2":
        shared = "whole in steps that select: shared by transformer.wte and lm_head"
        assert ways["transformer.wte.weight"].reason == shared


def test_a_recurrent_layer_looks_at_each_call_a_few_times(monkeypatch):
    looks, runs = [], Use.runs
    monkeypatch.setattr(Use, "runs", lambda use: looks.append(1) or runs(use))
    torch.manual_seed(0)
    twins = SparseTwins(nn.Linear(12, 12), budget=40, total_steps=4)
    calls = 60

    def loss(net):
        x = torch.ones(2, 12)
        for _ in range(calls):
            x = net(x).tanh()
        return x.square().sum()

    for _ in range(3):
        twins.step(loss)
    twins.check_close(1e-5)
    assert 0 < len(looks) < 3 * 3 * calls
