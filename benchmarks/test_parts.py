"""Selection alone, update alone, and the sampled weight gradient of one layer."""

from dataclasses import asdict

import pytest
import torch

from benchmarks.cases import part_cases
from benchmarks.parts import timed_selections, timed_updates
from benchmarks.sampled import layer_cases, timed_layer

cases, layers = part_cases, layer_cases


@pytest.mark.parametrize("kind, timed", [("selection", timed_selections), ("update", timed_updates)])
def test_part(kind, timed, case, inputs_of, measure):
    n, budget, active, k = case.counts()
    methods = timed(case, inputs_of(case.model, torch.float32))
    measure(methods, "id3", kind=kind, case=asdict(case), n=n, b=budget, n_active=active, k=k)


def test_sampled(layer, measure):
    measure(timed_layer(layer), "sampled", kind="sampled", case=layer.about())
