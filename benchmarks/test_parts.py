"""Selection alone, update alone, and the update time summed over a run."""

from dataclasses import asdict

import pytest
import torch

from benchmarks.cases import SPREAD, part_cases
from benchmarks.growth import SHARE, timed_growth
from benchmarks.parts import timed_selections, timed_updates
from benchmarks.shapes import MODELS

cases = part_cases


@pytest.mark.parametrize("kind, timed", [("selection", timed_selections), ("update", timed_updates)])
def test_part(kind, timed, case, inputs_of, measure):
    n, budget, active, k = case.counts()
    methods = timed(case, inputs_of(case.model, torch.float32))
    measure(methods, "id3", kind=kind, case=asdict(case), n=n, b=budget, n_active=active, k=k)


def test_growth(inputs_of, measure, request):
    model = "MiniLM-L6" if request.config.getoption("--quick") else "DeBERTa-v3-base"
    n = MODELS[model][2]
    k = round(SHARE * n / SPREAD)
    methods, budget = timed_growth(inputs_of(model, torch.float32), k)
    measure(methods, "static", kind="growth", case={"model": model, "dtype": "float32"}, n=n, b=budget, k=k)
