"""load_state_dict(cast=True): the state of a run in another dtype. Without it such a state is refused."""

import copy

import pytest
import torch

from id3_optim import ID3AdamW

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PAIRS = [(a, b) for a in DTYPES for b in DTYPES if a != b]


@pytest.mark.parametrize("options", [{}, {"strategy": "repeat"}, {"keep_originals": False}])
@pytest.mark.parametrize(("saved", "own"), PAIRS)
def test_a_state_of_another_dtype(model, make, train, saved, own, options):
    begun, first = make(model, saved, bias_correction="entry", **options)
    train(begun, first, 0, 4)
    state = first.state_dict()
    kept = copy.deepcopy(state["state"])
    twin, second = make(begun, own, bias_correction="entry", **options)
    unseen = {saved, own} == {torch.bfloat16, torch.float16} and options == {"keep_originals": False}
    if not unseen:  # the states of both kinds are alike then
        with pytest.raises(
            ValueError, match=r"state\[0\]: \w+: expected .*; cast=True converts the state of"
        ):
            second.load_state_dict(state)
        assert second.n_entries is None and second.steps_done == 0
    second.load_state_dict(state, cast=True)
    now = second.state_dict()["state"]
    wide = torch.float64 if own == torch.float64 else torch.float32
    for i, p in enumerate(twin.parameters()):
        a, b = kept[i], now[i]
        for name in ("indices", "age", "step", "ever_indices"):
            assert name not in a or torch.equal(a[name], b[name])
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(a[name].to(wide), b[name])
        for name in ("originals", "ever_originals"):
            assert name not in a or torch.equal(a[name].to(own), b[name])
        assert ("master" in b) == (own in (torch.bfloat16, torch.float16))
        if "master" in b:
            mine = p.detach().reshape(-1)[b["indices"].long()].float()
            assert torch.equal(b["master"], a.get("master", mine))
        assert all(torch.equal(state["state"][i][k], v) for k, v in a.items() if k != "shape")
    train(twin, second, 4, 6)
    assert second.steps_done == 6 and second.n_active >= first.n_active


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_the_same_dtype_a_cast_changes_nothing(model, make, train, dtype):
    begun, first = make(model, dtype)
    train(begun, first, 0, 4)
    twins = []
    for cast in (False, True):
        twin, second = make(begun, dtype)
        second.load_state_dict(first.state_dict(), cast=cast)
        train(twin, second, 4, 8)
        twins.append(twin)
    assert all(map(torch.equal, *(twin.parameters() for twin in twins)))


def test_float32_to_float64_goes_on_as_in_float64(model, make, train):
    """After a cast both trainings are the same but for rounding."""
    begun, first = make(model, torch.float32, max_grad_norm=1.0)
    train(begun, first, 0, 10)
    twin, second = make(begun, torch.float64, max_grad_norm=1.0)
    second.load_state_dict(first.state_dict(), cast=True)
    train(begun, first, 10, 14)
    train(twin, second, 10, 14)
    for p, q in zip(begun.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)
    assert first.n_active == second.n_active


def test_a_damaged_state_is_refused_with_a_cast_too(model, make, train):
    begun, first = make(model, torch.float32)
    train(begun, first, 0, 4)
    for name, damage in (
        ("indices", lambda x: x.flip(0)),
        ("indices", lambda x: x + 2**30),
        ("indices", lambda x: x.long()),
        ("exp_avg", lambda x: x[1:]),
    ):
        state = copy.deepcopy(first.state_dict())
        row = next(i for i, s in state["state"].items() if s["indices"].numel() > 1)
        state["state"][row][name] = damage(state["state"][row][name])
        _, second = make(begun, torch.bfloat16)
        with pytest.raises(ValueError, match=rf"state\[{row}\]: {name}: expected"):
            second.load_state_dict(state, cast=True)
        assert second.n_entries is None


@pytest.mark.parametrize("damage", [lambda x: x[1:], lambda x: x.double()])
def test_the_values_of_entries_that_left_are_checked(model, make, train, damage):
    begun, first = make(model, strategy="repeat")
    train(begun, first, 0, 4)
    state = copy.deepcopy(first.state_dict())
    state["state"][0]["ever_originals"] = damage(state["state"][0]["ever_originals"])
    _, second = make(begun, strategy="repeat")
    with pytest.raises(ValueError, match=r"state\[0\]: ever_originals: expected torch.float32 of shape"):
        second.load_state_dict(state)


def test_dense_groups_are_cast_by_torch_as_ever(model, give_gradients):
    def build(dtype):
        twin = copy.deepcopy(model).to(dtype)
        groups = [
            {"params": list(twin[:2].parameters())},
            {"params": list(twin[2].parameters()), "dense": True},
        ]
        return twin, ID3AdamW(groups, budget=20, total_steps=2)

    twin, optimizer = build(torch.float32)
    give_gradients(0, twin.parameters())
    optimizer.step()
    wide, second = build(torch.float64)
    second.load_state_dict(optimizer.state_dict(), cast=True)
    own = second.state[wide[2].weight]
    assert own["exp_avg"].dtype == torch.float64 and own["step"].dtype == torch.float32
    assert torch.equal(own["exp_avg"], optimizer.state[twin[2].weight]["exp_avg"].double())
