"""Many deltas on one model: each switch exact, the base between them, mixed batches in order."""

import copy

import pytest
import torch
from torch import nn

from id3_optim import DeltaBank, DeltaError, ID3AdamW, diff, load_delta, save_delta


def assert_same_bits(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p.contiguous().view(torch.uint8), q.contiguous().view(torch.uint8))


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def bank(model, make, train, tmp_path, request):
    """(the bank, the base, the tuned models by name): deltas that share entries, one with a whole head."""
    base = copy.deepcopy(model).to(request.param)
    bank, tuned = DeltaBank(copy.deepcopy(base)), {}
    for i, name in enumerate("abc"):
        twin = copy.deepcopy(base)
        first, second = list(twin[0].named_parameters("0")), list(twin[2].named_parameters("2"))
        groups = [{"params": first}, {"params": second, "dense": name == "c"}]
        optimizer = ID3AdamW(groups, lr=1e-2, budget=0.05, total_steps=4)
        train(twin, optimizer, 10 * i, 10 * i + 4)
        save_delta(tmp_path / name, twin, optimizer)
        bank.add(name, load_delta(tmp_path / name))
        tuned[name] = twin
    return bank, base, tuned


def test_every_switch_is_exact(bank):
    bank, base, tuned = bank
    assert len(bank) == 3 and "a" in bank and "d" not in bank
    for name in ["a", "b", "c", "c", "a", None, "c", "b", None]:
        bank.use(name)
        assert bank.active == name
        assert_same_bits(bank.model, base if name is None else tuned[name])


def test_a_block_returns_to_the_delta_before(bank):
    bank, _, tuned = bank
    bank.use("a")
    with pytest.raises(KeyError), bank.using("b") as inside:
        assert_same_bits(inside, tuned["b"])
        raise KeyError
    assert_same_bits(bank.model, tuned["a"])


def test_adding_and_removing_while_one_is_in_use(bank):
    bank, base, tuned = bank
    bank.use("a")
    bank.add("d", diff(base, tuned["b"]))
    assert_same_bits(bank.model, tuned["a"])
    bank.use("d")
    assert_same_bits(bank.model, tuned["b"])
    bank.remove("d")
    assert bank.active is None and "d" not in bank
    assert_same_bits(bank.model, base)


def test_a_mixed_batch_is_served_in_order_with_few_switches(bank):
    bank, base, tuned = bank
    models = {None: base, **tuned}
    dtype = next(base.parameters()).dtype
    names = ["b", None, "a", "b", "c", "a"]
    requests = [(name, torch.full((40,), float(i), dtype=dtype)) for i, name in enumerate(names)]
    bank.use("a")
    calls = []

    def run(rows):
        calls.append(bank.active)
        return bank.model(torch.stack(rows))

    answers = bank.serve(requests, run)
    assert calls[0] == "a" and sorted(map(str, calls)) == ["None", "a", "b", "c"]
    for (name, row), answer in zip(requests, answers, strict=True):
        # products of a batch are summed in another order than those of a row
        assert torch.allclose(answer, models[name](row), rtol=2e-2, atol=1e-3)
    with pytest.raises(ValueError, match="run: expected 2 answers for 'b', got 0"):
        bank.serve([("b", 0), ("b", 1)], lambda rows: [])
    before = bank.active
    with pytest.raises(KeyError, match=r"name: expected one of .*'a', 'b', 'c'.*got 'x'"):
        bank.serve([("a", 0), ("x", 1)], lambda rows: rows)
    assert bank.active == before


def test_a_delta_of_another_base_is_refused(bank):
    bank, base, tuned = bank
    other = copy.deepcopy(base)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    further = copy.deepcopy(other)
    with torch.no_grad():
        further[0].weight[0, 0] += 1
    bank.use("b")
    with pytest.raises(DeltaError, match="fingerprint"):
        bank.add("other", diff(other, further))
    assert "other" not in bank
    assert_same_bits(bank.model, tuned["b"])
    with pytest.raises(ValueError, match="name: expected one that is free, got 'a'"):
        bank.add("a", diff(base, tuned["b"]))


def test_a_delta_in_another_dtype(model):
    base = copy.deepcopy(model)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned[0].weight[3, :9] += 0.5
    bank = DeltaBank(copy.deepcopy(model).bfloat16())
    bank.add("a", diff(base, tuned), cast=True)
    with bank.using("a"):
        assert_same_bits(bank.model, tuned.bfloat16())
    assert_same_bits(bank.model, base.bfloat16())


def test_tied_and_strided_weights():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(6, 5), "b": nn.Linear(6, 5)})
    model["a"].weight.data = torch.randn(6, 5).t()
    model["b"].weight = model["a"].weight
    base, tuned = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        tuned["a"].weight[2, 1:4] = 7
    bank = DeltaBank(model)
    bank.add("x", diff(base, tuned))
    with bank.using("x"):
        assert_same_bits(model, tuned)
    assert_same_bits(model, base)


def test_a_moved_model_is_refused_by_name(bank):
    bank, _, _ = bank
    for param in bank.model.parameters():
        param.data = param.data.clone()
    with pytest.raises(ValueError, match=r"0\.weight: expected the memory .* when the bank was made"):
        bank.use("a")
