"""Selection alone and update alone."""

from dataclasses import asdict

import pytest
import torch

from benchmarks.cases import part_cases
from benchmarks.parts import timed_selections, timed_updates

cases = part_cases


@pytest.mark.parametrize("kind, timed", [("selection", timed_selections), ("update", timed_updates)])
def test_part(kind, timed, case, inputs_of, measure):
    n, budget, active, k = case.counts()
    methods = timed(case, inputs_of(case.model, torch.float32))
    measure(methods, "id3", kind=kind, case=asdict(case), n=n, b=budget, n_active=active, k=k)
