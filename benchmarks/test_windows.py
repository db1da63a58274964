"""Whole windows of steps of which one selects."""

import torch

from benchmarks.cases import Case
from benchmarks.windows import timed_windows


def test_windows(inputs_of, measure, request):
    model = "MiniLM-L6" if request.config.getoption("--quick") else "DeBERTa-v3-base"
    case = Case(model)
    n, budget, _, k = case.counts()
    timed = timed_windows(case, inputs_of(model, torch.float32))
    measure(timed, "every_1", kind="windows", case={"model": model, "dtype": "float32"}, n=n, b=budget, k=k)
