"""Small models and real-looking gradients for the optimizer's tests."""

import copy

import pytest
import torch
from plugin_interfaces import plugin  # noqa: F401 - a fixture

from id3_optim import ID3AdamW


@pytest.fixture
def model():
    """Linear, LayerNorm, Linear: 3 kinds of tensors, 3617 entries."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.LayerNorm(60), torch.nn.Linear(60, 17))


@pytest.fixture
def give_gradients():
    """Fills the gradients of parameter lists: the same for each list, heavy-tailed, new at each step."""

    def give(step, *parameter_lists):
        generator = torch.Generator().manual_seed(1000 + step)
        for row in zip(*(list(params) for params in parameter_lists), strict=True):
            shape = row[0].shape
            g = torch.randn(shape, generator=generator) ** 3 * 10 ** torch.randn((), generator=generator)
            for p in row:
                p.grad = g.to(p.dtype).clone()

    return give


@pytest.fixture
def train(give_gradients):
    """Runs steps begin … end − 1 of an optimizer on the deterministic gradients."""

    def run(model, optimizer, begin, end):
        for step in range(begin, end):
            give_gradients(step, model.parameters())
            optimizer.step()

    return run


@pytest.fixture
def make():
    """A copy of a model with an optimizer of its own."""

    def build(model, dtype=torch.float32, **options):
        twin = copy.deepcopy(model).to(dtype)
        options = {"lr": 1e-2, "budget": 0.05, "total_steps": 40} | options
        return twin, ID3AdamW(twin.named_parameters(), **options)

    return build
