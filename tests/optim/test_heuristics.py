"""Heuristics: exact orders, literal values of the random hash, and what each refuses."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from id3_optim import heuristics
from id3_optim.fisher import fisher_scores
from id3_optim.heuristics import D3, Bias, Fisher, Magnitude, Random, scores

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def norm_score(param, grad):
    return (param.float() * grad.float()).abs()


def all_selectable(score):
    tiny = torch.finfo(score.dtype).tiny
    return bool(((score >= tiny) & score.isfinite()).all())


@pytest.mark.parametrize(
    ("eps", "exp", "message"),
    [
        (0.0, 1.0, r"eps: expected > 0 \(in float32\) with exp = 1.0 > 0, got 0.0"),
        (1e-60, 2.0, "eps: expected > 0"),
        (-1.0, 0.0, "eps: expected a finite number >= 0, got -1.0"),
        (float("nan"), 1.0, "eps: expected a finite number >= 0, got nan"),
        (float("inf"), 1.0, "eps: expected a finite number >= 0, got inf"),
        (1.0, float("nan"), "exp: expected a finite number"),
        (1.0, float("inf"), r"exp: expected a finite number .*Magnitude\(\).*, got inf"),
        (1.0, float("-inf"), "exp: expected a finite number"),
    ],
)
def test_d3_refuses(eps, exp, message):
    with pytest.raises(ValueError, match=message):
        D3(eps, exp)


def test_d3_takes_numbers_only():
    assert D3() == D3(eps=1, exp=2) and D3(0, -1) == D3(0.0, -1.0)
    for wrong in ("1", None, True):
        with pytest.raises(TypeError, match="eps: expected"):
            D3(eps=wrong)


@given(bits=st.lists(st.integers(0, 0x7EFFFFFF), min_size=1, max_size=50), signs=st.integers(0, 2**50))
def test_magnitude_reverses_the_order_of_size_exactly(bits, signs):
    size = torch.tensor(bits, dtype=torch.int32)
    sign = torch.tensor([signs >> i & 1 for i in range(len(bits))], dtype=torch.int32)
    param = torch.where(sign == 1, size | -(2**31), size).view(torch.float32)
    score = scores(Magnitude(), param, param, 0, None)
    assert all_selectable(score)
    by_score = score.view(torch.int32).numpy().astype(np.int64)
    order = np.sign(by_score[:, None] - by_score[None, :])
    assert (order == np.sign(size.numpy()[None, :].astype(np.int64) - size.numpy()[:, None])).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_in_every_dtype(dtype):
    generator = torch.Generator().manual_seed(0)
    param = (torch.randn(40, 30, generator=generator) * 1e-3).to(dtype)
    param[3, 4], param[5, 6] = 0.0, -0.0
    score = scores(Magnitude(), param.t(), param.t(), 0, None)
    assert score.shape == (30, 40)
    assert score.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert all_selectable(score)
    by_size = torch.sort(param.t().reshape(-1).abs().double(), stable=True).indices
    assert torch.equal(torch.sort(score.reshape(-1), descending=True, stable=True).indices, by_size)
    assert set(by_size[:2].tolist()) == {4 * 40 + 3, 6 * 40 + 5}


@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitude_at_the_ends_of_the_range(dtype):
    info = torch.finfo(dtype)
    param = torch.tensor([0.0, info.tiny, 1.0, info.max, torch.inf, torch.nan], dtype=torch.float64).to(dtype)
    score = scores(Magnitude(), param, param, 0, None)
    assert all_selectable(score[:4]) and (score[:3] > score[1:4]).all()
    assert score[4:].tolist() == [0.0, 0.0]


def splitmix(seed, position, index):
    """The written hash in Python's integers, with no wrapping to rely on."""
    mask, increment = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(z):
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    key = mix(mix((seed + increment) & mask) + position * increment & mask)
    return ((mix(index * increment + key & mask) >> 33) * 0x7F000000 >> 31) + 0x00800000


@pytest.mark.parametrize("seed", [0, 7, -3, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("position", [0, 2, 100_000])
def test_random_is_the_written_hash(seed, position, monkeypatch):
    monkeypatch.setattr(heuristics, "SLICE", 64)
    score = scores(Random(seed), torch.zeros(10, 25), torch.zeros(10, 25), position, None)
    assert score.view(torch.int32).reshape(-1).tolist() == [splitmix(seed, position, i) for i in range(250)]
    assert all_selectable(score)


def test_random_literals():
    """These numbers are part of the file format of a training run: they may never change."""
    score = scores(Random(42), torch.zeros(4), torch.zeros(4), 3, None)
    assert score.view(torch.int32).tolist() == [0x3C532EEA, 0x275BEEA2, 0x6AD5921E, 0x2CECC1C4]


def test_random_spreads_evenly_and_differs_by_seed_and_tensor():
    param = torch.zeros(20_000, dtype=torch.float64)
    first, seed, place = (scores(Random(s), param, param, p, None) for s, p in [(1, 0), (2, 0), (1, 1)])
    assert first.dtype == torch.float64 and first.unique().numel() > 19_990
    for a, b in [(first, seed), (first, place), (seed, place)]:
        both = (a.argsort().argsort() < 10_000) & (b.argsort().argsort() < 10_000)
        assert abs(both.sum().item() - 5_000) < 300  # 8 standard deviations of the hypergeometric law


def test_bias_by_the_end_of_the_name():
    param = torch.zeros(3, dtype=torch.bfloat16)
    assert torch.equal(scores(Bias(), param, param, 0, "encoder.0.bias"), torch.ones(3))
    assert torch.equal(scores(Bias(), param, param, 0, "bias"), torch.ones(3))
    assert torch.equal(scores(Bias(), param, param, 0, "attention.in_proj_bias"), torch.ones(3))
    for name in ("encoder.0.weight", "bias.weight", "encoder.bias_scale"):
        assert scores(Bias(), param, param, 0, name) is None
    with pytest.raises(ValueError, match="heuristic Bias: expected named parameters"):
        scores(Bias(), param, param, 0, None)


def test_nothing_without_a_gradient():
    param = torch.ones(3)
    for heuristic in (Magnitude(), Random(0), Bias(), Fisher({}), norm_score):
        assert scores(heuristic, param, None, 0, None) is None


def test_fisher_by_name_and_by_position():
    param, score = torch.zeros(2, 3, dtype=torch.float64), torch.arange(6.0).view(2, 3)
    for heuristic in (Fisher({"a.weight": score}), Fisher([torch.ones(1), score])):
        assert torch.equal(scores(heuristic, param, param, 1, "a.weight"), score.double())


@pytest.mark.parametrize(
    ("given_scores", "name", "message"),
    [
        ({"a": torch.ones(3)}, "b", "heuristic Fisher: expected scores for 'b', got none"),
        ({"a": torch.ones(3)}, None, "heuristic Fisher: expected named parameters for scores by name"),
        ({"a": torch.ones(4)}, "a", r"heuristic Fisher: expected shape \(3,\), got \(4,\)"),
        ({"a": torch.ones(3, dtype=torch.int64)}, "a", "heuristic Fisher: expected float32 or float64"),
        ([torch.ones(3)], "a", "heuristic Fisher: expected scores for parameter 1, got 1"),
    ],
)
def test_fisher_that_does_not_fit(given_scores, name, message):
    with pytest.raises(ValueError, match=message):
        scores(Fisher(given_scores), torch.zeros(3), torch.zeros(3), 1, name)


def test_a_function_of_ones_own():
    param, grad = torch.randn(2, 3).bfloat16().requires_grad_(), torch.randn(2, 3).bfloat16()
    score = scores(norm_score, param, grad, 0, None)
    assert torch.equal(score, norm_score(param.detach(), grad)) and not score.requires_grad


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [(torch.ones(3), ValueError, r"<lambda>: expected shape \(2, 3\), got \(3,\)"),
     (torch.ones(2, 3).half(), ValueError, "<lambda>: expected float32 or float64 scores, got torch.float16"),
     (1.0, TypeError, "<lambda>: expected a tensor, got float")],
)  # fmt: skip
def test_a_function_that_answers_wrongly(answer, error, message):
    with pytest.raises(error, match=message):
        scores(lambda param, grad: answer, torch.zeros(2, 3), torch.zeros(2, 3), 0, None)


def test_descriptions_tell_heuristics_apart():
    every = [D3(), D3(exp=1), Magnitude(), Random(1), Random(2), Bias(), norm_score,
             Fisher([torch.ones(2)]), Fisher([torch.full((2,), 2.0)])]  # fmt: skip
    described = [tuple(heuristics.describe(h).items()) for h in every]
    assert len(set(described)) == len(every)
    for heuristic in every:
        for same in (pickle.loads(pickle.dumps(heuristic)), copy.deepcopy(heuristic)):
            assert heuristics.describe(same) == heuristics.describe(heuristic)


@pytest.mark.parametrize("wrong", ["d3", None, D3, 3])
def test_what_is_no_heuristic(wrong):
    with pytest.raises(TypeError, match=r"heuristic: expected D3\(\)"):
        heuristics.describe(wrong)


def test_fisher_scores_are_mean_squared_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)).requires_grad_(True)
    model[1].bias.requires_grad_(False)
    batches = [torch.randn(1, 3) for _ in range(5)]
    result = fisher_scores(model, batches, lambda m, x: m[1](m[0](x)).square().sum(), samples=4)
    assert set(result) == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(result["2.weight"], torch.zeros(2, 2))
    expected = torch.zeros(4, 3)
    for batch in batches[:4]:
        (grad,) = torch.autograd.grad(model[1](model[0](batch)).square().sum(), [model[0].weight])
        expected += grad.square() / 4
    torch.testing.assert_close(result["0.weight"], expected)
    with pytest.raises(ValueError, match="loader: expected at least one batch"):
        fisher_scores(model, [], lambda m, x: m(x).sum())
    with pytest.raises(ValueError, match="loss_fn: expected a loss of the model's parameters, got no grad"):
        fisher_scores(model, [torch.ones(2, 3)], lambda m, x: x.clone().requires_grad_().sum())
