"""Layers that are added or unfrozen after the first step: what they get of the budget, and `grow_budget`."""

import copy
import io
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from id3_optim import ID3AdamW, load_delta, save_delta, schedules
from id3_optim.schedules import cosine, one_shot, uniform

OPTIONS = {"lr": 1e-2, "budget": 0.1, "total_steps": 12}


def layered(model, **options):
    """The model of `conftest.py`, of which the optimizer has only the first layer (2460 entries)."""
    twin = copy.deepcopy(model)
    named = list(twin.named_parameters())
    return twin, named[2:], ID3AdamW(named[:2], **OPTIONS | options)


def counts(optimizer):
    return optimizer.n_active, optimizer.budget, optimizer.n_entries


def test_a_spent_budget_is_said_once(model, train):
    twin, rest, optimizer = layered(model, total_steps=3)
    train(twin, optimizer, 0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # there is budget left for which all compete
        optimizer.add_param_group({"params": rest[:2]})
    train(twin, optimizer, 2, 3)
    message = (
        r"add_param_group: the budget of 246 entries is spent, so that no entry of the new group will be "
        r"trained; grow_budget\(\) extends it, dense=True trains the group whole"
    )
    with warnings.catch_warnings(), pytest.raises(UserWarning):  # an error leaves all as it was
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": rest[2:]})
    assert counts(optimizer) == (246, 246, 2580) and len(optimizer.param_groups) == 2
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer.add_param_group({"params": rest[2:]})
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(twin, optimizer, 3, 6)
    assert counts(optimizer) == (246, 246, 3617)


@pytest.mark.parametrize(
    ("options", "group"),
    [
        ({"strategy": "repeat"}, {}),  # every step chooses anew
        ({}, {"dense": True}),
        ({"budget": 0}, {}),
    ],
)
def test_no_warning_where_none_is_due(model, train, options, group):
    twin, rest, optimizer = layered(model, **options | {"total_steps": 1})
    train(twin, optimizer, 0, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": rest} | group)


def test_an_int_budget_does_not_grow(model, train):
    twin, rest, optimizer = layered(model, budget=20, total_steps=2)
    with pytest.raises(ValueError, match="budget: expected a share, which grows with N, got 20 entries"):
        optimizer.grow_budget()
    train(twin, optimizer, 0, 2)
    with pytest.warns(
        UserWarning, match="of the new group will be trained; dense=True trains the group whole"
    ):
        optimizer.add_param_group({"params": rest})


@pytest.mark.parametrize("schedule", [uniform, cosine])
def test_the_share_of_new_layers_is_spent_over_the_steps_left(model, train, schedule):
    twin, rest, optimizer = layered(model, schedule=schedule)
    optimizer.grow_budget()  # nothing to do yet
    train(twin, optimizer, 0, 4)
    optimizer.add_param_group({"params": rest})
    optimizer.grow_budget()
    optimizer.grow_budget()  # N is the same, so nothing grows
    assert counts(optimizer)[1:] == (361, 3617)
    for t in range(4, 14):
        train(twin, optimizer, t, t + 1)
        last = min(t, 11)
        assert optimizer.n_active == schedule(last, 12, 246) + schedule(last - 4, 8, 361 - 246)
    assert sum(t.indices.numel() for t in list(optimizer.touched())[2:]) > 0
    assert optimizer.n_active == 361


def test_what_is_added_joins_in_the_steps_that_select(model, train):
    twin, rest, optimizer = layered(model, select_every=4)
    joined = []
    for t in range(14):
        if t == 5:
            optimizer.add_param_group({"params": rest})
            optimizer.grow_budget()
        before = optimizer.n_active
        train(twin, optimizer, t, t + 1)
        joined += [t] if optimizer.n_active > before else []
    assert joined == [0, 4, 8] and counts(optimizer) == (361, 361, 3617)


def test_unfrozen_layers_count_too(model, train):
    twin = copy.deepcopy(model)
    twin[0].requires_grad_(False)
    optimizer = ID3AdamW(twin.named_parameters(), **OPTIONS)

    def steps(begin, end):
        for step in range(begin, end):
            torch.manual_seed(step)
            twin(torch.randn(4, 40)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    steps(0, 6)
    assert counts(optimizer) == (57, 115, 1157)
    twin[0].requires_grad_(True)
    optimizer.grow_budget()
    steps(6, 12)
    assert counts(optimizer) == (361, 361, 3617)
    twin[2].requires_grad_(False)  # N never falls
    optimizer.grow_budget()
    assert counts(optimizer) == (361, 361, 3617)


@pytest.mark.parametrize("strategy", ["increment", "static", "repeat"])
def test_after_the_last_step_and_for_other_strategies_the_next_step_takes_all(model, train, strategy):
    twin, rest, optimizer = layered(model, strategy=strategy, total_steps=3)
    train(twin, optimizer, 0, 5)
    before = {t.param: t.indices.clone() for t in optimizer.touched()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.add_param_group({"params": rest})
    optimizer.grow_budget()
    train(twin, optimizer, 5, 6)
    assert counts(optimizer) == (361, 361, 3617)
    for touched in list(optimizer.touched())[:2]:
        assert torch.isin(before[touched.param], touched.indices).all()
    train(twin, optimizer, 6, 8)
    assert optimizer.n_active == 361


def test_with_released_gradients(model):
    runs = []
    for release in (False, True):
        twin, rest, optimizer = layered(model, release_gradients=release)
        for step in range(12):
            if step == 5:
                optimizer.add_param_group({"params": rest})
                optimizer.grow_budget()
            torch.manual_seed(step)
            twin(torch.randn(4, 40)).square().sum().backward()
            optimizer.step()
            twin.zero_grad()
        runs.append((twin, counts(optimizer)))
    assert runs[0][1] == runs[1][1] == (361, 361, 3617)
    assert all(map(torch.equal, runs[0][0].parameters(), runs[1][0].parameters()))


@pytest.mark.parametrize("at", [5, 12])
def test_between_a_backward_pass_and_its_step(model, at):
    """With released gradients the candidates of that pass are already kept; the next step makes up for it."""
    for release in (False, True):
        twin, rest, optimizer = layered(model, release_gradients=release)
        for step in range(15):
            torch.manual_seed(step)
            twin(torch.randn(4, 40)).square().sum().backward()
            if step == at:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    optimizer.add_param_group({"params": rest})
                optimizer.grow_budget()
            optimizer.step()
            twin.zero_grad()
        assert counts(optimizer) == (361, 361, 3617)


@pytest.mark.parametrize("stop", [5, 7, 11, 13])
def test_resume_is_bit_exact(model, train, tmp_path, stop):
    """The state holds what the budget has grown by, and when."""

    def grow(optimizer, rest, step):
        if step in (3, 6):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.add_param_group({"params": rest[:2] if step == 3 else rest[2:]})
            optimizer.grow_budget()

    def run(twin, rest, optimizer, begin, end):
        for step in range(begin, end):
            grow(optimizer, rest, step)
            train(twin, optimizer, step, step + 1)

    straight = layered(model)
    run(*straight, 0, 14)
    first = layered(model)
    run(*first, 0, stop)
    file = io.BytesIO()
    torch.save(first[2].state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(first[0])
    named = list(twin.named_parameters())
    groups = [named[:2], named[2:4], named[4:]][: len(first[2].param_groups)]
    resumed = ID3AdamW([{"params": group} for group in groups], **OPTIONS)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.settings() == first[2].settings()
    run(twin, named[2:], resumed, stop, 14)
    assert all(map(torch.equal, straight[0].parameters(), twin.parameters()))
    assert counts(resumed) == counts(straight[2]) == (361, 361, 3617)
    assert resumed.settings()["budget_growth"] == [[3, 12], [6, 103]]
    path = tmp_path / "delta.safetensors"
    save_delta(path, twin, resumed)
    assert load_delta(path).settings["budget_growth"] == [[3, 12], [6, 103]]


def test_another_budget_without_strict_forgets_the_growth(model, train):
    twin, rest, optimizer = layered(model)
    train(twin, optimizer, 0, 4)
    optimizer.add_param_group({"params": rest})
    optimizer.grow_budget()
    named = list(twin.named_parameters())
    groups = [{"params": named[:2]}, {"params": named[2:]}]
    other = ID3AdamW(groups, **OPTIONS | {"budget": 0.2})
    with pytest.raises(
        ValueError, match=r"budget: expected 0\.2 as in the optimizer, got 361 in the saved state"
    ):
        other.load_state_dict(optimizer.state_dict())
    other.load_state_dict(optimizer.state_dict(), strict=False)
    train(twin, other, 4, 12)
    assert counts(other) == (723, 723, 3617) and "budget_growth" not in other.settings()


def test_a_run_that_never_grows_has_the_settings_of_before(model, train):
    twin, _, optimizer = layered(model)
    train(twin, optimizer, 0, 2)
    assert "budget_growth" not in optimizer.settings()


@given(
    budget=st.integers(0, 50),
    total=st.integers(1, 12),
    growth=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), max_size=4),
    schedule=st.sampled_from([uniform, cosine, one_shot]),
)
def test_grown_targets(budget, total, growth, schedule):
    """They never fall, are those of before until each growth, and end at all that was given."""
    growth = sorted(growth)
    first = schedules.tabulate(schedule, total, budget)
    targets = schedules.grown(first, schedule, growth)
    assert all(a <= b for a, b in pairwise(targets))
    assert targets[-1] == budget + sum(entries for _, entries in growth)
    assert len(targets) == max([total, *(step + 1 for step, _ in growth)])
    before = growth[0][0] if growth else total
    assert targets[: min(before, total)] == first[:before]
    assert len(first) == total  # unchanged
