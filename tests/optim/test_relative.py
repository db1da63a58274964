"""Relative: D3 over its mean in each tensor."""

import pytest
import torch
from test_resume import through_a_file

from id3_kernels import d3_score
from id3_optim import D3, ID3AdamW
from id3_optim.relative import Relative


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scores_are_d3s_over_their_mean(dtype):
    torch.manual_seed(0)
    param, grad = torch.randn(30, 7, dtype=dtype), torch.randn(30, 7, dtype=dtype)
    scores, d3 = Relative(D3(0.5, 1.0))(param, grad), d3_score(param, grad, eps=0.5, exp=1.0)
    assert torch.allclose(scores, d3 / d3.mean(), rtol=1e-6) and scores.dtype == d3.dtype
    assert torch.equal(scores.flatten().argsort(stable=True), d3.flatten().argsort(stable=True))


def test_the_scale_of_a_gradient_does_not_decide_over_tensors():
    """Of two tensors with like gradients, one 1000 times as large, D3 takes one alone."""
    torch.manual_seed(0)
    grads = torch.randn(2, 500)
    counts = {}
    for name, heuristic in (("d3", D3(1.0, 0.0)), ("relative", Relative(D3(1.0, 0.0)))):
        params = [torch.nn.Parameter(torch.zeros(500)) for _ in range(2)]
        optimizer = ID3AdamW(params, budget=100, total_steps=1, heuristic=heuristic)
        for p, grad, scale in zip(params, grads, (1.0, 1000.0), strict=True):
            p.grad = grad * scale
        optimizer.step()
        counts[name] = [t.indices.numel() for t in optimizer.touched()]
    best = torch.cat([g.abs() / g.abs().mean() for g in grads]).topk(100).indices
    assert counts == {"d3": [0, 100], "relative": [int((best < 500).sum()), int((best >= 500).sum())]}
    assert min(counts["relative"]) > 30


def test_a_tensor_without_a_gradient_above_zero_gives_no_entry():
    params = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    optimizer = ID3AdamW(params, budget=8, total_steps=1, heuristic=Relative())
    params[0].grad, params[1].grad = torch.zeros(5), torch.ones(5)
    optimizer.step()
    assert [t.indices.numel() for t in optimizer.touched()] == [0, 5]


def test_a_resumed_run_needs_its_numbers(model, make, train):
    begun, first = make(model, heuristic=Relative(D3(1.0, 1.0)))
    train(begun, first, 0, 3)
    state = through_a_file(first.state_dict())
    make(begun, heuristic=Relative(D3(1.0, 1.0)))[1].load_state_dict(state)
    with pytest.raises(ValueError, match=r"heuristic: expected .*'exp': 2.0.* got .*'exp': 1.0"):
        make(begun, heuristic=Relative())[1].load_state_dict(state)
