"""Names of the plain model, whatever a trainer has put around it."""

import pytest
import torch
from torch import nn

from id3_optim.wrappers import plain_names, plain_parameters


class Forwarding(nn.Module):
    """Passes unknown attributes on to what it holds, as PEFT's models do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


class Fabric(nn.Module):
    """Keeps the model where Lightning's Fabric does."""

    def __init__(self, model):
        super().__init__()
        self._forward_module = model


def test_wrappers_are_looked_through():
    model = nn.Linear(2, 2)
    for wrapped in (nn.DataParallel(model), torch.compile(model), Fabric(torch.compile(model))):
        assert list(plain_parameters(wrapped)) == ["weight", "bias"]


def test_a_compiled_part_keeps_the_names_above_it():
    model = Forwarding(torch.compile(nn.Linear(2, 2)))
    assert list(plain_parameters(model)) == ["inner.weight", "inner.bias"]


def test_a_tied_weight_goes_by_its_first_name():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    assert list(plain_parameters(model)) == ["0.weight", "1.weight"]
    assert list(plain_names(model).values()) == ["0.weight"]


def test_two_parameters_of_one_name_are_refused():
    model = nn.Module()
    model.a = nn.Linear(2, 2)
    model.a._orig_mod = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"a\.weight: expected one parameter of this name"):
        plain_parameters(model)
