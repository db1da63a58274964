"""Whole optimizer steps, interleaved with every rival's."""

from dataclasses import asdict

from benchmarks.cases import DTYPES, step_cases, timed_steps

cases = step_cases


def test_step(case, inputs_of, measure):
    n, budget, active, k = case.counts()
    methods = timed_steps(case, inputs_of(case.model, DTYPES[case.dtype]))
    measure(methods, "id3", kind="step", case=asdict(case), n=n, b=budget, n_active=active, k=k)
