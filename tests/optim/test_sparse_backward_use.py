"""sparse_backward: what is kept between passes, what may come in between, refusals and the report."""

import copy
import io

import pytest
import torch
from sparse_twins import SparseTwins
from test_sparse_backward import RHYTHMS, Net, ids_of, loss_at
from torch import nn
from transformers.pytorch_utils import Conv1D

from id3_optim import ID3AdamW, save_delta, sparse_backward

# --- what is kept, and what may come in between ------------------------------------------------------------


def test_no_whole_gradient_ever_exists(monkeypatch):
    """Neither a product nor an embedding's sums are as large as a weight, on any step."""
    from id3_optim.step import products

    monkeypatch.setattr(products, "BLOCK_ENTRIES", 200)
    largest = []
    for name in ("_of",):
        original = getattr(products.Product, name)
        monkeypatch.setattr(
            products.Product, name, lambda *a, original=original: largest.append(original(*a)) or largest[-1]
        )
    sums = products._sum_rows
    monkeypatch.setattr(products, "_sum_rows", lambda *a: largest.append(sums(*a)) or largest[-1])
    twins = SparseTwins(Net(), select_every=4)
    for step in range(9):
        twins.step(loss_at(step))
    twins.check_close(1e-5)
    assert len(largest) > 20 and max(x.numel() for x in largest) <= 200


def test_a_layer_without_active_entries_keeps_no_input():
    net = Net()
    kept = []

    def pack(x):
        kept.append(x)
        return x

    heuristic = lambda p, g: g.abs() * (p.shape == net.down.weight.shape)  # noqa: E731
    optimizer = ID3AdamW(
        net.named_parameters(), budget=20, total_steps=1, select_every=9, heuristic=heuristic
    )
    sparse_backward(net, optimizer)
    for step in range(2):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            h = net.norm(net.up(net.embed(ids_of(step))))
            kept.clear()
            y = net.mix(h)
        assert any(x.shape == (24, 40) for x in kept) == (step == 0)
        net.down(y).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("every", RHYTHMS)
def test_gradients_forgotten_and_graphs_dropped(every):
    """zero_grad between forward and backward, a loss that is dropped, an exception, an evaluation."""
    twins = SparseTwins(Net(), select_every=every)
    for step in range(9):
        for net, optimizer in (twins.released, twins.sparse):
            net(ids_of(step + 50))  # never backward
            loss = loss_at(step)(net)
            optimizer.zero_grad()
            with torch.no_grad():
                net(ids_of(step + 60))
            loss.backward()
            optimizer.step()
    twins.check_close(1e-5)


@pytest.mark.parametrize("every", RHYTHMS)
def test_an_exception_in_the_middle_of_a_pass(every):
    def failing(net):
        handle = net.up.weight if net.up.weight.requires_grad else None
        y = net.norm(net.up(net.embed(ids_of(0))))
        y.register_hook(lambda g: (_ for _ in ()).throw(KeyError("in the middle")))
        return handle, net.down(net.mix(y)).square().mean()

    twins = SparseTwins(Net(), select_every=every)
    for step in range(6):
        if step == 3:
            for net, optimizer in (twins.released, twins.sparse):
                with pytest.raises(KeyError, match="in the middle"):
                    failing(net)[1].backward()
                optimizer.zero_grad()
        twins.step(loss_at(step))
    twins.check_close(1e-5)


def test_a_pass_that_comes_after_the_step_is_refused():
    net = Net()
    optimizer = ID3AdamW(net.named_parameters(), budget=5, total_steps=8, select_every=2)
    sparse_backward(net, optimizer)
    for step in range(2):
        if step == 1:
            with torch.autograd.graph.save_on_cpu():  # copies, which torch does not compare with the weights
                late = loss_at(9)(net)
        loss_at(step)(net).backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"expected the backward pass of .* before the optimizer's step"):
        late.backward()


def test_create_graph_is_refused():
    net = Net()
    optimizer = ID3AdamW(net.named_parameters(), budget=5, total_steps=8)
    sparse_backward(net, optimizer)
    with pytest.raises(RuntimeError, match="sparse_backward: does not apply to create_graph=True"):
        loss_at(0)(net).backward(create_graph=True)


@pytest.mark.parametrize("every", RHYTHMS)
def test_remove_in_the_middle_of_training(every):
    twins = SparseTwins(Net(), select_every=every)
    classes = {name: type(m) for name, m in twins.released[0].named_modules()}
    for step in range(9):
        if step == 5:
            twins.handle.remove()
            assert {name: type(m) for name, m in twins.sparse[0].named_modules()} == classes
        twins.step(loss_at(step))
    twins.check_close(1e-5)


def test_names_classes_copies_and_files_stay(tmp_path):
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = ID3AdamW(net.named_parameters(), budget=5, total_steps=8)
    sparse_backward(net, optimizer)
    assert list(net.state_dict()) == list(before)
    assert (
        isinstance(net.up, nn.Linear) and isinstance(net.mix, Conv1D) and isinstance(net.embed, nn.Embedding)
    )
    copied = copy.deepcopy(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        assert type(other.up) is nn.Linear and type(other.mix) is Conv1D
        loss_at(0)(other).backward()
        assert other.up.weight.grad is not None and other.embed.weight.grad is not None
    loss_at(0)(net).backward()
    optimizer.step()
    save_delta(tmp_path / "delta.safetensors", net, optimizer)


def test_without_its_optimizer_a_layer_is_plain():
    net = Net()
    sparse_backward(net, ID3AdamW(net.named_parameters(), budget=5, total_steps=8))
    loss_at(0)(net).backward()
    assert net.up.weight.grad is not None


@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_resume_is_bit_exact(stop):
    def build(net):
        optimizer = ID3AdamW(net.named_parameters(), lr=1e-2, budget=0.05, total_steps=9, select_every=4)
        return net, optimizer

    def run(net, optimizer, begin, end):
        for step in range(begin, end):
            loss_at(step)(net).backward()
            optimizer.step()

    straight = build(Net())
    sparse_backward(*straight)
    run(*straight, 0, 11)
    begun = build(Net())
    sparse_backward(*begun)
    run(*begun, 0, stop)
    resumed = build(copy.deepcopy(begun[0]))
    resumed[1].load_state_dict(copy.deepcopy(begun[1].state_dict()))
    sparse_backward(*resumed)  # a trainer calls it when the state is in
    run(*resumed, stop, 11)
    assert all(map(torch.equal, resumed[0].parameters(), straight[0].parameters()))


# --- refusals and the report ------------------------------------------------------------------------------


def test_two_optimizers_on_one_model_are_refused():
    net = Net()
    first, second = (ID3AdamW(net.named_parameters(), budget=5, total_steps=8) for _ in range(2))
    sparse_backward(net, first)
    with pytest.raises(ValueError, match="got embed with another optimizer's: call remove"):
        sparse_backward(net, second)


@pytest.mark.parametrize("options", [{"sparse": True}, {"max_norm": 1.0}], ids=str)
def test_embeddings_that_change_or_have_sparse_gradients_are_refused(options):
    net = nn.Sequential(nn.Embedding(9, 4, **options), nn.Linear(4, 2))
    optimizer = ID3AdamW(net.named_parameters(), budget=5, total_steps=8)
    with pytest.raises(ValueError, match=f"0: expected an embedding without {next(iter(options))}"):
        sparse_backward(net, optimizer)
    assert type(net[1]) is nn.Linear


def test_a_model_that_lacks_a_parameter_is_refused():
    net = Net()
    with pytest.raises(ValueError, match="model: expected every trained parameter in it"):
        sparse_backward(net.up, ID3AdamW(net.named_parameters(), budget=5, total_steps=8))


@pytest.mark.parametrize("options", [{"strategy": "repeat"}, {"capturable": True}], ids=str)
def test_what_released_gradients_refuse(options):
    net = Net()
    with pytest.raises(ValueError, match="does not apply"):
        sparse_backward(net, ID3AdamW(net.named_parameters(), budget=5, total_steps=8, **options))
    assert type(net.up) is nn.Linear


def test_the_report_names_every_parameter_and_the_reason():
    net = Net()
    handle = sparse_backward(net, ID3AdamW(net.named_parameters(), budget=5, total_steps=8))
    assert {way.name: way.way for way in handle.ways} == {
        "embed.weight": "sparse", "up.weight": "sparse", "norm.weight": "released", "norm.bias": "released",
        "mix.weight": "sparse", "mix.bias": "released", "down.weight": "sparse", "down.bias": "released",
    }  # fmt: skip
    assert [way.name for way in handle.ways if way.way == "frozen"] == []
    net.up.requires_grad_(False)
    handle = sparse_backward(net, ID3AdamW(net.named_parameters(), budget=5, total_steps=8))
    assert {way.name: way.entries for way in handle.ways if way.way == "frozen"} == {"up.weight": 24 * 40}
    assert handle.report().endswith(f"of {3399 - 24 * 40:,} entries")
    net.up.requires_grad_(True)
    handle = sparse_backward(net, ID3AdamW(net.named_parameters(), budget=5, total_steps=8))
    text = handle.report()
    assert "of a LayerNorm" in text and "the bias of a Conv1D" in text
    assert text.endswith(f"sparse: {50 * 24 + 24 * 40 + 40 * 24 + 24 * 7:,} of {3399:,} entries")
