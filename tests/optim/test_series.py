"""Deltas at chosen budgets of one run: each a model of its own."""

import copy

import pytest
import torch

from id3_optim import DeltaSeries, load_delta
from id3_optim.schedules import one_shot


def test_each_file_is_the_model_of_that_moment(model, make, train, tmp_path):
    base = copy.deepcopy(model)
    model, optimizer = make(model, budget=100, total_steps=20)
    series = DeltaSeries(tmp_path / "series", model, optimizer, [10, 37, 0.02])  # 0.02 of 3617: 72
    moments = {}
    for step in range(20):
        train(model, optimizer, step, step + 1)
        moments[optimizer.n_active] = copy.deepcopy(model.state_dict())
    assert [path.name for path in series.paths] == [f"delta-{n}.safetensors" for n in (10, 40, 75)]
    assert sorted(series.paths) == sorted((tmp_path / "series").iterdir())
    for path, n in zip(series.paths, (10, 40, 75), strict=True):
        delta = load_delta(path)
        assert delta.inspect()["entries"] == n
        with delta.applied(base):
            for name, value in base.state_dict().items():
                assert torch.equal(value, moments[n][name])


def test_a_step_that_passes_several_budgets_writes_one_file(model, make, train, tmp_path):
    model, optimizer = make(model, budget=100, schedule=one_shot)
    series = DeltaSeries(tmp_path, model, optimizer, [10, 50, 100])
    train(model, optimizer, 0, 3)
    assert [path.name for path in series.paths] == ["delta-100.safetensors"]


def test_a_resumed_run_goes_on_where_the_saved_one_stood(model, make, train, tmp_path):
    model, optimizer = make(model, budget=100, total_steps=20)
    train(model, optimizer, 0, 10)
    twin, resumed = make(model, budget=100, total_steps=20)
    series = DeltaSeries(tmp_path, twin, resumed, [10, 50, 60])
    resumed.load_state_dict(optimizer.state_dict())
    train(twin, resumed, 10, 20)
    assert [path.name for path in series.paths] == ["delta-60.safetensors"]


def test_removed_it_writes_no_more(model, make, train, tmp_path):
    model, optimizer = make(model, budget=100, total_steps=20)
    series = DeltaSeries(tmp_path, model, optimizer, [10, 50])
    train(model, optimizer, 0, 3)
    series.remove()
    train(model, optimizer, 3, 20)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("budget", [0, 101, 0.5])
def test_a_budget_that_is_never_reached_is_refused(model, make, tmp_path, budget):
    model, optimizer = make(model, budget=100)
    with pytest.raises(ValueError, match=f"budgets: expected 1 to 100 entries.*got {budget}"):
        DeltaSeries(tmp_path / "none", model, optimizer, [10, budget])
    assert not (tmp_path / "none").exists()


def test_a_strategy_without_growth_is_refused(model, make, tmp_path):
    model, optimizer = make(model, strategy="static")
    with pytest.raises(ValueError, match="expected the strategy increment, got static"):
        DeltaSeries(tmp_path, model, optimizer, [10])


def test_another_model_is_refused_before_training(model, make, tmp_path):
    model, optimizer = make(model)
    with pytest.raises(ValueError, match="model: expected every trained parameter in it, got none for"):
        DeltaSeries(tmp_path / "none", copy.deepcopy(model), optimizer, [10])
    assert not (tmp_path / "none").exists()


def test_what_never_trains_may_be_elsewhere(model, make, tmp_path):
    model, optimizer = make(model)
    optimizer.add_param_group(
        {"params": [("frozen", torch.nn.Parameter(torch.zeros(2), requires_grad=False))]}
    )
    DeltaSeries(tmp_path, model, optimizer, [10])


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_writes(model, make, train, tmp_path, monkeypatch, rank):
    model, optimizer = make(model, budget=100, total_steps=20)
    series = DeltaSeries(tmp_path, model, optimizer, [10])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    train(model, optimizer, 0, 5)
    assert len(series.paths) == len(list(tmp_path.iterdir())) == 1 - rank
