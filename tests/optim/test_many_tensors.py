"""What the optimizer does for each tensor is done once: no work grows with the square of their number."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from id3_optim import ID3AdamW


def size(result):
    if isinstance(result, torch.Tensor):
        return 1 + result.numel()
    return 1 + sum(map(size, result)) if isinstance(result, list | tuple) else 1


class Work(TorchFunctionMode):
    """Adds up the sizes of all results of torch: entries of tensors, and numbers that Python reads."""

    def __init__(self):
        super().__init__()
        self.done = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.done += size(result)
        return result


def small(n):
    params = [torch.nn.Parameter(torch.randn(4)) for _ in range(n)]
    for p in params:
        p.grad = torch.randn(4)
    return params


def start(n, **options):
    return ID3AdamW(small(n), **{"budget": n, "total_steps": 4} | options)


def stepped(n, **options):
    optimizer = start(n, **options)
    optimizer.step()
    return optimizer


# What is measured, given an optimizer of n tensors after its first step and another before it.
DOES = {
    "first step": lambda n, old, new: new.step(),
    "later step": lambda n, old, new: old.step(),
    "state_dict": lambda n, old, new: old.state_dict(),
    "load_state_dict": lambda n, old, new: new.load_state_dict(old.state_dict()),
    "touched": lambda n, old, new: list(old.touched()),
    "changed_since": lambda n, old, new: list(old.changed_since(0)),
    "add_param_group": lambda n, old, new: old.add_param_group({"params": small(n)}),
}
VARIANTS = {
    "plain": {},
    "repeat": {"strategy": "repeat"},
    "capturable": {"capturable": True},
    "entry": {"bias_correction": "entry"},
    "released": {"release_gradients": True},
}


def work(what, n, options):
    old, new = stepped(n, **options), start(n, **options)
    with Work() as work:
        DOES[what](n, old, new)
    return work.done


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("what", DOES)
def test_twice_the_tensors_are_twice_the_work(what, variant):
    few, many = (work(what, n, VARIANTS[variant]) for n in (100, 200))
    assert many < 2.2 * few


def test_one_tensor_more_costs_its_tables_alone():
    """A tensor that is added after the first step copies the tables of all tensors and no state."""

    def one_more(n):
        optimizer = stepped(n)
        with Work() as work:
            optimizer.add_param_group({"params": small(1)})
        return work.done

    assert one_more(200) - one_more(100) < 10 * 100
