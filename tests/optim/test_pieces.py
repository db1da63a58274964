"""Tensors of more entries than int32 counts, as pieces of rows. A limit of 40 entries stands for 2^31 - 1.

A run whose tensors have pieces is held to the same run without: entries, bits, states, deltas.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

from id3_optim import (
    D3,
    Bias,
    DeltaBank,
    Fisher,
    ID3AdamW,
    Magnitude,
    Random,
    diff,
    load_delta,
    original_weights,
    pieces,
    save_delta,
    sparse_backward,
    weight_patches,
)
from id3_optim.distributed.blocks import Blocks
from id3_optim.distributed.part import Level, Part
from id3_optim.heuristics import snip
from id3_optim.masks import mask_of
from id3_optim.state import flat

STEPS, LIMIT = 6, 40
SIZES = {"experts": (7, 3, 5), "table": (11, 9), "flat": (97,), "bias": (9,)}


class Model(nn.Module):
    """Large tensors between small ones, one of them strided, whose gradients are the inputs."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SIZES.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        self.strided = nn.Parameter(torch.randn(9, 11, generator=generator).to(dtype).t())

    def loss(self, step):
        generator = torch.Generator().manual_seed(step)
        terms = [(p * torch.randn(p.shape, generator=generator).to(p.dtype)).sum() for p in self.parameters()]
        return sum(terms)


def trained(large, monkeypatch, dtype=torch.float32, steps=STEPS, begin=None, **options):
    """The model and its optimizer after some steps, with pieces where `large`."""
    monkeypatch.setattr(pieces, "LARGEST", LIMIT if large else 2**31 - 1)
    model = Model(dtype)
    options = {"budget": 90, "total_steps": STEPS, "lr": 0.1, "max_grad_norm": 1.0, **options}
    optimizer = ID3AdamW(model.named_parameters(), **options)
    if begin is not None:
        model.load_state_dict(begin[0])
        optimizer.load_state_dict(begin[1])
    for step in range(optimizer.steps_done, steps):
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def assert_same(one, other):
    """Models, active sets and states of the same bits; indices may be of another dtype."""
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one[1].touched(), other[1].touched(), strict=True):
        assert torch.equal(a.indices.long(), b.indices.long()) and torch.equal(a.originals, b.originals)
    states = [run[1].state_dict()["state"] for run in (one, other)]
    assert states[0].keys() == states[1].keys()
    for position, state in states[0].items():
        for name, value in state.items():
            found = states[1][position][name]
            assert torch.equal(value.long(), found.long()) if "indices" in name else equal(value, found)


def equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


SCORES = {n: torch.rand(s, generator=torch.Generator().manual_seed(1)) for n, s in SIZES.items()}
SCORES["strided"] = torch.rand(11, 9)
WAYS = {
    "d3": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "exp": {"heuristic": D3(eps=0.5, exp=1.0)},
    "windows": {"select_every": 3},
    "released": {"release_gradients": True},
    "released-max": {"release_gradients": True, "select_from": "max"},
    "released-magnitude": {"release_gradients": True, "heuristic": Magnitude()},
    "magnitude": {"heuristic": Magnitude(), "strategy": "static"},
    "random": {"heuristic": Random(3), "strategy": "static"},
    "fisher": {"heuristic": Fisher(SCORES), "strategy": "static"},
    "bias": {"heuristic": Bias(), "strategy": "static", "budget": 9},
    "repeat": {"strategy": "repeat"},
    "warm-up": {"entry_warmup": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_pieces_change_no_bit(way, monkeypatch):
    whole = trained(False, monkeypatch, **WAYS[way])
    cut = trained(True, monkeypatch, **WAYS[way])
    assert_same(whole, cut)
    kinds = {t.indices.dtype for t in cut[1].touched() if t.param.numel() > LIMIT}
    assert kinds == {torch.int64} and cut[1].n_active == whole[1].n_active > 0


def test_a_run_goes_on_with_its_pieces(monkeypatch):
    expected = trained(True, monkeypatch)
    model, optimizer = trained(True, monkeypatch, steps=3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert_same(expected, trained(True, monkeypatch, begin=saved))


def test_a_state_with_indices_of_the_other_width_is_refused(monkeypatch):
    model, optimizer = trained(False, monkeypatch, steps=3)
    saved = model.state_dict(), optimizer.state_dict()
    with pytest.raises(ValueError, match=r"state\[0\]: indices: expected ascending int64 below 105"):
        trained(True, monkeypatch, begin=saved)


def test_a_delta_has_the_ranges_of_rows_and_fits(monkeypatch, tmp_path):
    base = Model()
    base.strided.data = base.strided.data.contiguous()
    model, optimizer = trained(True, monkeypatch)
    save_delta(tmp_path / "delta", model, optimizer, originals=True)
    delta = load_delta(tmp_path / "delta")
    assert {"experts[0:2]", "experts[6:7]", "bias"} <= delta.changes.keys() and "experts" not in delta.changes
    with delta.applied(base):
        for a, b in zip(base.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)
    model.strided.data = model.strided.data.contiguous()
    found = diff(base, model).changes
    assert all(set(found[n].indices.tolist()) <= set(delta.changes[n].indices.tolist()) for n in found)


def test_originals_come_and_go(monkeypatch):
    base = [p.detach().clone() for p in Model().parameters()]
    model, optimizer = trained(True, monkeypatch)
    after = [p.detach().clone() for p in model.parameters()]
    with original_weights(model, optimizer):
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), base, strict=True))
    assert all(torch.equal(p, a) for p, a in zip(model.parameters(), after, strict=True))


def test_weight_patches_have_int64_indices(monkeypatch):
    base = Model()
    model, optimizer = trained(True, monkeypatch)
    patches = list(weight_patches(model, optimizer))
    assert {p.name: p.indices.dtype for p in patches}["table"] == torch.int64
    for name, indices, values in patches:
        param = base.get_parameter(name).data
        param[torch.unravel_index(indices.long(), param.shape)] = values
    for a, b in zip(base.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_memory_that_a_trainer_moves_is_followed(monkeypatch):
    whole = trained(False, monkeypatch)
    model, optimizer = trained(True, monkeypatch, steps=2)
    for p in model.parameters():
        p.data = p.data.clone()
    for step in range(2, STEPS):
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(whole, (model, optimizer))


def test_groups_that_come_later_keep_the_order(monkeypatch):
    def run(large):
        monkeypatch.setattr(pieces, "LARGEST", LIMIT if large else 2**31 - 1)
        model, late = Model(), Model()
        groups = [{"params": list(model.parameters())}]
        optimizer = ID3AdamW(groups, budget=0.2, total_steps=STEPS, lr=0.1)
        for step in range(STEPS):
            if step == 2:
                optimizer.add_param_group({"params": list(late.parameters())})
                optimizer.grow_budget()
            (model.loss(step) + late.loss(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return nn.ModuleList([model, late]), optimizer

    assert_same(run(False), run(True))


def test_sparse_backward_leaves_large_weights_to_released_gradients(monkeypatch):
    monkeypatch.setattr(pieces, "LARGEST", LIMIT)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 20))
    optimizer = ID3AdamW(model.named_parameters(), budget=20, total_steps=2)
    report = sparse_backward(model, optimizer).report()
    assert "80  released  of more entries than int32 counts" in report
    for _ in range(2):
        model(torch.ones(3, 8)).sum().backward()
        optimizer.step()
    assert optimizer.n_active == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_cap": 0.1}, "tensor_cap: does not apply to experts: it has more entries than int32 counts"),
        ({"heuristic": snip}, "heuristic: does not apply to experts: .*, and a function scores whole"),
    ],
)
def test_what_cannot_be_cut_is_refused(options, message, monkeypatch):
    monkeypatch.setattr(pieces, "LARGEST", LIMIT)
    with pytest.raises(ValueError, match=message):
        ID3AdamW(Model().named_parameters(), budget=9, total_steps=2, **options)


@pytest.mark.parametrize("dense", [False, True])
def test_rows_that_are_too_large_and_dense_groups_are_refused(dense, monkeypatch):
    monkeypatch.setattr(pieces, "LARGEST", LIMIT if dense else 3)
    expected = "with dense=True, got 60" if dense else "expected rows of at most 3 entries, got 6"
    params = [("weight", nn.Parameter(torch.ones(10, 6)))]
    with pytest.raises(ValueError, match=f"^weight: .*{expected}"):
        ID3AdamW([{"params": params, "dense": dense}], budget=9, total_steps=2)


def test_a_sparse_gradient_is_refused_as_of_a_small_tensor(monkeypatch):
    monkeypatch.setattr(pieces, "LARGEST", LIMIT)
    model = nn.Embedding(10, 6, sparse=True)
    optimizer = ID3AdamW(model.named_parameters(), budget=9, total_steps=2)
    model(torch.tensor([1, 7])).sum().backward()
    with pytest.raises(ValueError, match=r"gradient of weight: expected a dense tensor, got layout torch.sp"):
        optimizer.step()
    with pytest.raises(ValueError, match="expected an embedding without sparse, got sparse=True"):
        sparse_backward(model, optimizer)


def test_a_mask_of_its_delta_and_a_bank(monkeypatch, tmp_path):
    """The delta's names are those of parts; a bank, which would write part of it, refuses it."""
    model, optimizer = trained(True, monkeypatch)
    save_delta(tmp_path / "delta", model, optimizer, originals=True)
    delta, base = load_delta(tmp_path / "delta"), Model()
    base.strided.data = base.strided.data.contiguous()
    options = {"heuristic": mask_of(delta, base), "strategy": "static", "budget": 90, "total_steps": 1}
    again = ID3AdamW(base.named_parameters(), **options)
    base.loss(0).backward()
    again.step()
    for a, b in zip(again.touched(), optimizer.touched(), strict=True):
        assert torch.equal(a.indices, b.indices)
    base = Model()
    base.strided.data = base.strided.data.contiguous()
    with pytest.raises(ValueError, match=r"experts\[0:2\]: expected whole parameters in the bank's deltas"):
        DeltaBank(base).add("one", delta)


def test_a_pickle_has_no_whole_tensor_for_each_piece(monkeypatch):
    model, optimizer = trained(True, monkeypatch, steps=3)
    optimizer.state_dict()  # settles
    pickled = pickle.dumps((model, optimizer))
    assert len(pickled) < len(pickle.dumps(model)) + 30_000
    model, optimizer = pickle.loads(pickled)
    for step in range(3, STEPS):
        model.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same(trained(True, monkeypatch), (model, optimizer))


def test_places_in_tensors_of_more_than_int32_counts():
    """Of 2^33 entries a rank holds 2^31 - 8 from 2^32 on."""
    block = Part((Level(2**33, 2**32, 2**31 - 8, 2**31 - 8),), (), "")
    blocks, first = (
        Blocks([block, block], [True, True], torch.device("cpu")),
        torch.zeros(2, dtype=torch.long),
    )
    own = torch.tensor([0, 2**31 - 9])
    at = blocks.whole_index(first, own)
    assert at.tolist() == [2**32, 2**32 + 2**31 - 9]
    assert [x.tolist() for x in blocks.local_index(first, at)] == [own.tolist(), [True, True]]
    assert not blocks.local_index(first, at - torch.tensor([1, -1]))[1].any()
    bits = pieces.index_bits([7, 2**33])
    assert bits == 33 and pieces.index_bits([2**32]) == pieces.index_bits([7]) == 32
    place = torch.tensor([3, (1 << bits) | 2**33 - 1, -1])
    rows = flat._by_position({"place": place}, 2, bits)
    assert [row["indices"].tolist() for row in rows] == [[3], [2**33 - 1]]
