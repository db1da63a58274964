"""What ID3AdamW refuses, by its message, before anything changes."""

import functools
import json

import numpy as np
import pytest
import torch
from parameters import one_parameter

from id3_optim import Bias, ID3AdamW, Random, schedules


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": True}, TypeError, "budget: expected an int"),
        ({"budget": -1}, ValueError, "budget: expected .*, got -1"),
        ({"budget": 1.5}, ValueError, "budget: expected .*, got 1.5"),
        ({"total_steps": 0}, ValueError, "total_steps: expected at least 1, got 0"),
        (
            {"strategy": "decrement"},
            ValueError,
            "strategy: expected one of increment, static, repeat, got 'decrement'",
        ),
        (
            {"strategy": "repeat", "heuristic": Random(0)},
            ValueError,
            "strategy: expected 'static' with Random, .*, got 'repeat'",
        ),
        (
            {"strategy": "repeat", "heuristic": Bias()},
            ValueError,
            "strategy: expected 'static' with Bias, .*, got 'repeat'",
        ),
        (
            {"heuristic": Bias()},
            ValueError,
            r"params: expected model.named_parameters\(\) for the heuristic Bias",
        ),
        ({"heuristic": 3}, TypeError, "heuristic: expected D3"),
        (
            {"bias_correction": "none"},
            ValueError,
            "bias_correction: expected one of tensor, entry, got 'none'",
        ),
        (
            {"max_grad_norm": 0.0},
            ValueError,
            "max_grad_norm: expected a finite number above 0, or None, got 0",
        ),
        ({"max_grad_norm": float("inf")}, ValueError, "max_grad_norm: expected a finite number above 0"),
        ({"max_grad_norm": float("nan")}, ValueError, "max_grad_norm: expected a finite number above 0"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of reference, cpu, triton, cuda, got 'gpu'"),
        ({"backend": "cuda"}, ValueError, "backend: expected one that can run here, got 'cuda'"),
        ({"lr": -1.0}, ValueError, r"param_groups\[0\]: lr: expected at least 0, got -1\.0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\]: expected 0 to below 1, got 1\.0"),
        ({"amsgrad": True}, ValueError, "amsgrad: does not apply to ID3AdamW"),
        ({"fused": True}, ValueError, "fused: does not apply to ID3AdamW: the sparse step is always fused"),
        ({"foreach": True}, ValueError, "foreach: does not apply"),
        ({"budgett": 3}, TypeError, "budgett: expected an argument of ID3AdamW, got budgett=3"),
    ],
)
def test_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        ID3AdamW([one_parameter()], **{"budget": 10, "total_steps": 5} | options)


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (
            torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64)),
            "expected float32, bfloat16, float16 or float64",
        ),
        (torch.nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False), "got torch.int64"),
        (torch.nn.UninitializedParameter(dtype=torch.complex64), "or float64, got torch.complex64"),
        (torch.nn.Parameter(torch.zeros(1, 3).expand(4, 3)), r"give each entry its own memory, got \(0, 1\)"),
        (
            torch.nn.Parameter(torch.zeros(5).as_strided((3, 3), (1, 1))),
            r"layer.weight: expected strides that give each entry its own memory, got \(1, 1\) for shape "
            r"\(3, 3\); use contiguous\(\)",
        ),
    ],
)
def test_refused_parameters(param, message):
    with pytest.raises(ValueError, match=message):
        ID3AdamW([("layer.weight", param)], budget=1, total_steps=1)


def test_refused_at_the_first_step(model):
    unset = ID3AdamW([one_parameter()], budget=1)
    with pytest.raises(ValueError, match="total_steps: expected the number of steps"):
        unset.step()
    large = ID3AdamW([one_parameter()], budget=101, total_steps=1)
    with pytest.raises(ValueError, match=r"budget: expected 0 to 100 entries .*, got 101"):
        large.step()
    tiny = ID3AdamW([one_parameter()], budget=0.001, total_steps=1)
    with pytest.raises(ValueError, match="budget: expected a share of at least one"):
        tiny.step()
    late = ID3AdamW([one_parameter()], budget=1, total_steps=3)
    late.step()
    with pytest.raises(ValueError, match=r"total_steps: expected 3 as at the first step .*, got 4"):
        late.set_total_steps(4)
    late.set_total_steps(3)


def test_a_gradient_that_does_not_fit_is_refused_before_anything_changes():
    table = torch.nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    optimizer = ID3AdamW(table.named_parameters(), budget=4, total_steps=2)
    with pytest.raises(
        ValueError, match=r"gradient of weight: expected a dense tensor, got layout torch.sparse_coo"
    ):
        optimizer.step()
    assert optimizer.steps_done == 0 and optimizer.n_active == 0
    moved = one_parameter()
    optimizer = ID3AdamW([moved], budget=4, total_steps=2)
    optimizer.step()
    moved.grad, moved.data = None, moved.data.bfloat16()
    with pytest.raises(ValueError, match=r"parameter 0: expected torch.float32 on cpu as at the first step"):
        optimizer.step()


def test_numpy_numbers_become_plain_ones():
    options = {"budget": np.int64(3), "total_steps": np.int64(5), "max_grad_norm": np.float32(0.5)}
    optimizer = ID3AdamW([one_parameter()], **options)
    optimizer.step()
    json.dumps(optimizer.settings())
    assert (
        json.loads(json.dumps(ID3AdamW([one_parameter()], budget=np.float32(0.5)).settings()))["budget"]
        == 0.5
    )


def test_a_module_in_place_of_its_parameters(model):
    with pytest.raises(
        TypeError, match=r"^params: expected parameters or .*, got a Sequential; pass model.named"
    ):
        ID3AdamW(model, budget=0.1)


def unbound(share):
    return schedules.uniform


@pytest.mark.parametrize(
    "schedule", [schedules.front_loaded, schedules.exponential, schedules.from_name, unbound]
)
def test_a_schedule_that_is_not_bound(model, schedule):
    with pytest.raises(
        TypeError, match=r"^schedule: .* -> int, got \w+\(\w+\); pass the schedule that it returns"
    ):
        ID3AdamW(model.parameters(), budget=0.1, schedule=schedule)


def test_callables_of_all_kinds_are_schedules(model):
    class Half:
        def __call__(self, step, total_steps, budget):
            return budget // 2

    for schedule in (Half(), lambda t, T, B: B, functools.partial(schedules.uniform), schedules.uniform):
        ID3AdamW(model.parameters(), budget=0.1, schedule=schedule)
