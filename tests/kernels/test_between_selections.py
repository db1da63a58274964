"""A capturable step between two selections reads gradients at active entries alone, on every backend.

A graph replays the launches of a selection in each step. Between selections the number of wanted entries,
which lies on the device, is 0, and kernels return before they read any.
"""

import emulated
import pytest
import torch

from id3_optim import D3, ID3AdamW

SIZE = 20_000  # of the tensors without active entries: more than a chunk of any backend


@pytest.mark.parametrize("budget", [2, 40, 2000])  # few, a quarter, most of the tiles are scored again
@pytest.mark.parametrize("exp", [0.0, 2.0])
def test_nothing_else_is_read(backend, budget, exp):
    if backend.device.type != "cpu":
        pytest.skip("guards the host's memory")
    torch.manual_seed(0)
    apart = [emulated.pages(SIZE) for _ in range(4)]  # weights and gradients, one at each end
    trained = torch.nn.Parameter(torch.randn(60, 50))
    params = [torch.nn.Parameter(apart[0]), trained, torch.nn.Parameter(apart[1])]
    params[0].grad, params[2].grad = apart[2:]
    optimizer = ID3AdamW(
        params, budget=budget, total_steps=6, select_every=3, heuristic=D3(1.0, exp), max_grad_norm=1.0,
        capturable=True, backend=backend.name,
    )  # fmt: skip
    counts = []
    for step in range(8):
        for tensor in apart:
            emulated.protect(tensor, readable=step % 3 == 0)
        trained.grad = torch.randn(60, 50)
        before = trained.detach().clone()
        optimizer.step()
        assert not torch.equal(trained, before)
        counts.append(optimizer.n_active)
    assert counts == [budget // 2] * 3 + [budget] * 5
    for tensor in apart:
        emulated.protect(tensor, readable=True)
    assert not any(tensor.any() for tensor in apart)
