"""Options and fixtures of the benchmark cases; `pytest benchmarks` runs them, plain `pytest` does not."""

import gc

import pytest
import torch

from benchmarks.cases import fastest_reads
from benchmarks.measure import Interleaved, Timed, summary
from benchmarks.shapes import make_inputs


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the small model and one case of each kind")
    parser.addoption("--threads", type=int, default=2, help="threads for every method (the bars are for two)")
    parser.addoption("--rounds", type=int, default=None, help="rounds per case (15, or 3 with --quick)")


def pytest_configure(config):
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc):
    for fixture, listed in (("case", "cases"), ("layer", "layers")):
        if fixture in metafunc.fixturenames:
            made = getattr(metafunc.module, listed)(metafunc.config.getoption("--quick"))
            metafunc.parametrize(fixture, made, ids=str)


@pytest.fixture(scope="session")
def inputs_of():
    """make_inputs with a cache of one set: two sets of the large model leave too little for the methods."""
    newest: dict = {}

    def get(model: str, dtype: torch.dtype):
        if (model, dtype) not in newest:
            newest.clear()
            newest[model, dtype] = make_inputs(model, dtype)
        return newest[model, dtype]

    return get


@pytest.fixture
def measure(benchmark, request):
    """measure(methods, subject, **about): each round's set-up times every method but the subject.

    pytest-benchmark times the subject itself. `extra_info` gets `about`, which describes the case, and all
    medians as "methods".
    """

    def run(methods: dict[str, Timed], subject: str, **about) -> None:
        quick = request.config.getoption("--quick")
        rounds = request.config.getoption("--rounds") or (3 if quick else 15)
        turns = Interleaved(methods, subject)
        turns.warm_up()
        benchmark.pedantic(methods[subject].run, setup=turns.ready, rounds=rounds)
        runs = benchmark.stats.stats.data if benchmark.stats else []
        methods[subject].seconds = [seconds / methods[subject].per_run for seconds in runs]
        done = {name: summary(method.seconds) for name, method in methods.items() if method.seconds}
        benchmark.extra_info.update(about, methods=fastest_reads(done))

    yield run
    gc.collect()
