"""sparse_backward and a model that is moved, cast, copied, saved or loaded while it trains."""

import copy

import pytest
import torch
from sparse_twins import SparseTwins
from test_sparse_backward import RHYTHMS, Net, loss_at
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Gemma3ForCausalLM, Gemma3TextConfig
from transformers.pytorch_utils import Conv1D

from id3_optim import ID3AdamW, sparse_backward
from id3_optim.step.products import Product

OPTIONS = {"lr": 1e-2, "budget": 0.05, "total_steps": 12}


def trained(every, steps=3):
    """A model and its optimizer after some steps; with every=4 the next step selects nothing."""
    net = Net()
    optimizer = ID3AdamW(net.named_parameters(), select_every=every, **OPTIONS)
    sparse_backward(net, optimizer)
    go_on(net, optimizer, range(steps))
    return net, optimizer


def go_on(net, optimizer, steps):
    for step in steps:
        loss_at(step)(net).backward()
        optimizer.step()


# --- moved and cast -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", RHYTHMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_cast_before_the_first_step(every, dtype):
    twins = SparseTwins(Net(), select_every=every)
    for net, _ in (twins.released, twins.sparse):
        net.to(dtype)
    for step in range(9):
        twins.step(loss_at(step))
    twins.check_close(1e-10 if dtype == torch.float64 else 2e-2)
    assert {p.dtype for p in twins.sparse[0].parameters()} == {dtype}


@pytest.mark.parametrize("every", RHYTHMS)
def test_after_a_refused_cast_the_model_as_it_was_trains_on(every):
    (net, optimizer), straight = trained(every), trained(every)
    net.double()
    refused = r"expected torch\.float32 on cpu as at the first step, got torch\.float64 on cpu"
    with pytest.raises(ValueError, match=refused):
        loss_at(3)(net).backward()
    with pytest.raises(RuntimeError, match="expected a finished backward pass"):
        optimizer.step()
    optimizer.zero_grad()
    net.float()
    for pair in ((net, optimizer), straight):
        go_on(*pair, range(3, 9))
    assert all(map(torch.equal, net.parameters(), straight[0].parameters()))


@pytest.fixture
def replacing():
    """Casts make new parameters, as torch does on request, and always where a model moves to some devices."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(before)


@pytest.mark.parametrize("every", RHYTHMS)
@pytest.mark.parametrize("to", [torch.float64, "meta"], ids=str)
def test_new_parameters_in_place_of_the_optimizers_have_plain_layers(replacing, every, to):
    """The optimizer has the old ones, as torch's own would."""
    net, optimizer = trained(every)
    net.to(to)
    ids = torch.zeros(3, 8, dtype=torch.int64, device=net.up.weight.device)
    net(ids).square().mean().backward()
    assert optimizer.n_active
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in net.parameters())


# --- copied, saved and loaded -------------------------------------------------------------------------------


@pytest.mark.parametrize("every", RHYTHMS)
def test_a_copy_of_model_and_optimizer_goes_on_with_released_gradients(every):
    net, optimizer = trained(every)
    twin, copied = copy.deepcopy((net, optimizer))
    assert type(twin.up) is nn.Linear and type(net.up) is not nn.Linear
    for pair in ((net, optimizer), (twin, copied)):
        go_on(*pair, range(3, 9))
    assert all(p.grad is None for p in twin.parameters())
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("every", RHYTHMS)
def test_a_copy_that_is_changed_too_goes_on_with_the_same_bits(every):
    net, optimizer = trained(every)
    twin, copied = copy.deepcopy((net, optimizer))
    sparse_backward(twin, copied)
    for pair in ((net, optimizer), (twin, copied)):
        go_on(*pair, range(3, 9))
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


@pytest.mark.parametrize("every", RHYTHMS)
def test_loading_a_state_into_the_model_and_optimizer_that_train(every):
    """Back to an earlier point, in place: the layers stay as they are."""
    net, optimizer = trained(every)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    go_on(net, optimizer, range(3, 9))
    first = copy.deepcopy(net.state_dict())
    for thing, state in zip((net, optimizer), saved, strict=True):
        thing.load_state_dict(state)
    assert hasattr(net.up, "sparse_weight")
    go_on(net, optimizer, range(3, 9))
    assert all(torch.equal(value, first[name]) for name, value in net.state_dict().items())


def test_a_pretrained_model_is_saved_and_loaded(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    net = BertForSequenceClassification(BertConfig(vocab_size=50, **size))
    optimizer = ID3AdamW(net.named_parameters(), select_every=4, **OPTIONS)
    sparse_backward(net, optimizer)
    for step in range(3):
        ids = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(step))
        net(input_ids=ids, labels=torch.tensor([0, 1, 1])).loss.backward()
        optimizer.step()
    net.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded.bert.pooler.dense) is nn.Linear
    assert loaded.state_dict().keys() == net.state_dict().keys()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_weight_that_two_kinds_of_layers_share():
    """A Conv1D's weight is a linear layer's transposed: their inputs' features lie along other dimensions."""
    runs = []
    for way in ("dense", "released", "sparse"):
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Linear(12, 40, bias=False), Conv1D(12, 40)])
        model[1].weight = model[0].weight
        model[1].bias.requires_grad_(False)
        optimizer = ID3AdamW([model[0].weight], budget=20, total_steps=8, select_every=4)
        if way != "dense":
            optimizer.release_gradients()
        if way == "sparse":
            sparse_backward(model, optimizer)
        for step in range(8):
            x = torch.randn(5, 12, generator=torch.Generator().manual_seed(step))
            model[1](model[0](x).tanh()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(([t.indices.tolist() for t in optimizer.touched()], model[0].weight.detach()))
    for found, weight in runs[1:]:
        assert found == runs[0][0]
        torch.testing.assert_close(weight, runs[0][1])


def test_a_scaled_embedding_that_the_head_shares(monkeypatch):
    """Gemma's; its gradient has the scale in it, and is whole in steps that select alone."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    twins = SparseTwins(Gemma3ForCausalLM(config), select_every=4)
    (way,) = (way for way in twins.handle.ways if way.name == "model.embed_tokens.weight")
    assert way.way == "sparse" and "shared by model.embed_tokens and lm_head" in way.reason
    whole, of_product = [], Product.whole
    monkeypatch.setattr(Product, "whole", lambda *args: whole.append(step) or of_product(*args))
    for step in range(12):
        ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(step))
        twins.step(lambda net, ids=ids: net(input_ids=ids, labels=ids).loss)
    assert whole == [0, 4, 8]
    twins.check_close(1e-5)
    assert twins.handle.remove() is None and type(twins.sparse[0].get_input_embeddings()) is type(
        twins.released[0].get_input_embeddings()
    )
