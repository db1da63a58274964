"""Apply and revert of a delta on a live model."""

import pytest

from benchmarks.cases import DTYPES
from benchmarks.deltas import Swap, timed_delta
from benchmarks.shapes import MODELS


@pytest.mark.parametrize("dtype", DTYPES)
def test_delta(dtype, inputs_of, measure, request):
    model = "MiniLM-L6" if request.config.getoption("--quick") else "DeBERTa-v3-base"
    methods, entries = timed_delta(Swap(inputs_of(model, DTYPES[dtype])))
    measure(
        methods, "apply", kind="delta", case={"model": model, "dtype": dtype}, n=MODELS[model][2], b=entries
    )
