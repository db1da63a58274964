"""The updates and joins of a growing run."""

import torch

from benchmarks.cases import SPREAD
from benchmarks.growth import SHARE, timed_growth
from benchmarks.shapes import MODELS


def test_growth(inputs_of, measure, request):
    model = "MiniLM-L6" if request.config.getoption("--quick") else "DeBERTa-v3-base"
    n = MODELS[model][2]
    k = round(SHARE * n / SPREAD)
    methods, budget = timed_growth(inputs_of(model, torch.float32), k)
    measure(methods, "static", kind="growth", case={"model": model, "dtype": "float32"}, n=n, b=budget, k=k)
