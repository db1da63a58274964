"""How many kernels a step of the CUDA backend launches, counted where the kernels run on the host."""

import shutil
from collections import Counter

import emulated
import pytest
import torch

from id3_kernels import cuda
from id3_optim import ID3AdamW

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
# What the emulation leaves out: an op stores the rows of its tensors, a selection clears its counters.
NOT_EMULATED = {"select_topk": 1, "gather": 1, "adamw_": 1}
OPS = ("select_topk", "join_", "adamw_", "gather", "scatter_", "squared_norm")


@pytest.fixture
def launched(emulated_cuda, monkeypatch):
    """Op -> kernels launched."""
    counts, library = Counter(), emulated.library()

    def counted(name, op):
        def call(*arguments):
            before = library.launches_emulated()
            result = op(*arguments)
            counts[name] += library.launches_emulated() - before + NOT_EMULATED.get(name, 0)
            return result

        return call

    for name in OPS:
        monkeypatch.setattr(cuda, name, counted(name, getattr(cuda, name)))
    return counts


def test_a_steady_step_launches_few_kernels(launched):
    """291 tensors in two groups."""
    params = [torch.nn.Parameter(torch.randn(40, 10)) for _ in range(291)]
    groups = [{"params": params[:200]}, {"params": params[200:], "weight_decay": 0.0}]
    optimizer = ID3AdamW(groups, lr=1e-3, budget=2000, total_steps=50, backend="cuda")
    for _ in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        launched.clear()
        optimizer.step()
    assert set(launched) == {"select_topk", "gather", "join_", "adamw_"}
    assert launched.total() <= 26, launched
