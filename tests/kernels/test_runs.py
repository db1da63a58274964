"""Ops on an active set give the same bits for every split of it into runs, and touch nothing between."""

import cases
import numpy as np
import oracle
import pytest
import torch
from candidates import Candidates, collect, padded
from hypothesis import given
from hypothesis import strategies as st
from split_runs import JUNK, split
from updates import NUMBERS, Update

from id3_kernels import Entries
from id3_kernels.reference import wide_dtype

COUNTS = st.integers(1, 3)
SEEDS = st.integers(0, 2**32 - 1)
ADAMW = *NUMBERS.values(), False


def drawn(recipe, seed, count):
    """The problem, its active entries with junk behind them, and the same as runs."""
    problem, rng = cases.build(recipe), np.random.default_rng(seed)
    active = problem.active or cases.some_entries(problem.sizes(), 0.3, rng)
    return problem._replace(active=active), padded(active), split(active, count, rng)


@pytest.mark.parametrize("by_score", [False, True])
def test_selection_leaves_out_the_entries_of_all_runs(backend, by_score):
    @backend.examples(100, interpreted=6)
    @given(cases.recipes(backend.has_float64), SEEDS, COUNTS)
    def check(recipe, seed, count):
        problem, active, runs = drawn(recipe, seed, count)
        params, grads = backend.here(problem.params), backend.here(problem.grads)
        wanted = backend.count(problem.k), min(problem.k, sum(problem.sizes()))
        if by_score:
            grads = [
                None if g is None else g.to(wide_dtype(p.dtype)) for p, g in zip(params, grads, strict=True)
            ]
            selected, tensors, rule = backend.table.select_topk_by_score, (grads,), ()
        else:
            selected, tensors, rule = backend.table.select_topk, (params, grads), (1.0, 1.0)
        want = selected(*tensors, *backend.here(active), *wanted, *rule)
        got = selected(*tensors, *backend.here(runs[:2]), *wanted, *rule)
        for name, a, b in zip(("offsets", "indices", "scores"), got, want, strict=True):
            oracle.check_bits(a, b, name)

    check()


@pytest.mark.parametrize("again", [False, True])
def test_collect_takes_the_values_of_all_runs_and_no_candidate_among_them(backend, again):
    @backend.examples(60, interpreted=4)
    @given(cases.recipes(backend.has_float64), SEEDS, COUNTS)
    def check(recipe, seed, count):
        problem, active, runs = drawn(recipe, seed, count)
        dtype, k = wide_dtype(problem.params[0].dtype), min(problem.k, sum(problem.sizes()))
        order = range(len(problem.params))
        want, got = (Candidates.none(backend, k, dtype) for _ in range(2))
        values = collect(backend, problem, order, want, 1.0, 1.0, active=active)
        here = backend.here(runs.spread(torch.full((len(runs.at),), 7.0, dtype=dtype), JUNK))
        for _ in range(1 + again):
            here = collect(backend, problem, order, got, 1.0, 1.0, active=runs[:2], values=here, again=again)
        oracle.check_bits(here.cpu()[runs.at], values.cpu()[: len(runs.at)])
        assert here.cpu()[runs.between()].eq(JUNK).all()
        for a, b in zip(got.best(), want.best(), strict=True):
            oracle.check_bits(a, b)

    check()


def adamw(backend, u: Update, compact: bool, values):
    op = backend.table.adamw_compact_ if compact else backend.table.adamw_
    state = u.exp_avg, u.exp_avg_sq, u.master, u.age
    op(u.params, values if compact else u.grads, *u.entries, *state, u.step, *ADAMW, *[None] * 4)


@pytest.mark.parametrize("compact", [False, True])
def test_adamw_updates_the_entries_of_all_runs_alone(backend, compact):
    @backend.examples(80, interpreted=5)
    @given(cases.recipes(backend.has_float64, writable=True), SEEDS, COUNTS, st.booleans(), st.booleans())
    def check(recipe, seed, count, with_master, with_age):
        problem, _, runs = drawn(recipe, seed, count)
        one = Update.of(problem, seed, with_master, with_age)
        n, names = len(runs.at), ("exp_avg", "exp_avg_sq", "master", "age")
        values = torch.from_numpy(np.random.default_rng(seed).standard_normal(n)).to(one.exp_avg.dtype)
        spread = {name: runs.spread(getattr(one, name), JUNK) for name in names}
        many = Update(one.params, one.grads, Entries(*runs[:2]), **spread, step=one.step)
        one, many = one.clone(backend.device), many.clone(backend.device)
        many.entries = Entries(runs.offsets.to(backend.device), many.entries.indices)
        adamw(backend, one, compact, backend.here(torch.cat([values, values.new_zeros(3)])))
        adamw(backend, many, compact, backend.here(runs.spread(values, JUNK)))
        for j, (a, b) in enumerate(zip(many.params, one.params, strict=True)):
            oracle.check_bits(oracle.storage(a), oracle.storage(b), f"params[{j}]")
        for name in names:
            a, b = getattr(many, name), getattr(one, name)
            if a is not None:
                oracle.check_bits(a.cpu()[runs.at], b.cpu()[:n], name)
                assert a.cpu()[runs.between()].eq(JUNK).all(), name

    check()


def test_squared_norm_is_that_of_all_runs(backend):
    @backend.examples(100, interpreted=6)
    @given(cases.recipes(backend.has_float64), SEEDS, COUNTS)
    def check(recipe, seed, count):
        problem, active, runs = drawn(recipe, seed, count)
        grads = backend.here(problem.grads)
        want = backend.table.squared_norm(grads, *backend.here(active))
        oracle.check_bits(backend.table.squared_norm(grads, *backend.here(runs[:2])), want)

    check()


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (2, 4)])
def test_a_part_of_the_tensors_is_a_part_of_every_row(backend, first, last):
    sizes = (30, 700, 4, 300)
    rng = np.random.default_rng(3)
    grads = [torch.from_numpy(rng.standard_normal(n)).float() for n in sizes]
    entries = cases.some_entries(sizes, 0.6, rng)
    runs, part = split(entries, 2, rng), backend.here(grads[first:last])
    some = backend.here((runs.offsets[:, first : last + 1], runs.indices))
    cut = backend.here(Entries.from_lists(entries.lists()[first:last]))
    table, wanted = backend.table, (backend.count(9), 9)
    oracle.check_bits(table.squared_norm(part, *some), table.squared_norm(part, *cut))
    for a, b in zip(
        table.select_topk(part, part, *some, *wanted, 1.0, 1.0),
        table.select_topk(part, part, *cut, *wanted, 1.0, 1.0),
        strict=True,
    ):
        oracle.check_bits(a, b)


def test_no_run_is_no_entry(backend):
    grads = backend.here([torch.tensor([3.0, 1.0])])
    none = backend.here((torch.zeros(0, 2, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)))
    assert float(backend.table.squared_norm(grads, *none)) == 0
    selected = backend.table.select_topk(grads, grads, *none, backend.count(1), 1, 1.0, 1.0)
    assert [x.tolist() for x in selected] == [[0, 1], [0], [0.75]]


def calls(cpu, offsets, indices) -> dict:
    """Per op a call on one tensor of five ones."""
    grad, zeros = torch.ones(5), torch.zeros(3)
    entries = torch.tensor(offsets), torch.tensor(indices, dtype=torch.int32)
    one = torch.tensor([1])
    best = torch.zeros(1), torch.tensor([-1]), torch.zeros(1), torch.zeros(0, dtype=torch.int64), one
    return {
        "select_topk": lambda: cpu.table.select_topk([grad], [grad], *entries, one, 1, 1.0, 1.0),
        "select_topk_by_score": lambda: cpu.table.select_topk_by_score([grad], *entries, one, 1),
        "collect_": lambda: cpu.table.collect_(
            grad, grad, None, *entries, zeros, False, 0, *best, False, 1.0, 1.0
        ),
        "adamw_": lambda: cpu.table.adamw_(
            [grad], [grad], *entries, zeros, zeros.clone(), None, None, one, *ADAMW, *[None] * 4
        ),
        "squared_norm": lambda: cpu.table.squared_norm([grad], *entries),
    }


BAD_ROWS = {
    "falls": [[0, 1], [2, 1]],
    "from below 0": [[0, 1], [-1, 1]],
    "beyond the indices": [[0, 1], [2, 4]],
    "too short": [[0], [2]],
    "too many": [[0, 0]] * 9,
}


@pytest.mark.parametrize("op", calls(None, [0], [0]))
@pytest.mark.parametrize("offsets", BAD_ROWS.values(), ids=BAD_ROWS)
def test_the_cpu_refuses_rows_that_reach_elsewhere(cpu, op, offsets):
    with pytest.raises(ValueError, match=r"offsets|indices"):
        calls(cpu, offsets, [0, 1, 0])[op]()


@pytest.mark.parametrize("op", ["collect_", "adamw_", "squared_norm"])
def test_the_cpu_refuses_an_index_outside_in_any_run(cpu, op):
    with pytest.raises(ValueError, match="indices: expected 0 to 4"):
        calls(cpu, [[0, 1], [2, 3]], [0, 1, 5])[op]()


@pytest.mark.parametrize("op", ["select_topk", "select_topk_by_score"])
def test_an_index_outside_leaves_nothing_out(cpu, op):
    assert calls(cpu, [[0, 1], [2, 3]], [0, 1, 5])[op]()[1].tolist() == [1]


def test_many_runs_of_many_entries_and_threads(cpu, threads):
    """More entries than one thread takes: the parts begin inside of runs and tensors."""
    rng = np.random.default_rng(5)
    sizes = (90_000, 5, 60_000)
    problem = cases.Problem(
        [torch.from_numpy(rng.standard_normal(n)).float() for n in sizes],
        [torch.from_numpy(rng.standard_normal(n)).float() for n in sizes],
        cases.some_entries(sizes, 0.4, rng),
        500,
    )
    runs = split(problem.active, 3, rng)
    want = None
    for count in (1, 2, 3):
        threads(count)
        for offsets, indices in (problem.active, runs[:2]):
            u = Update.of(problem._replace(params=[p.clone() for p in problem.params]), 0, False, True)
            many = offsets.dim() == 2
            columns = u.exp_avg, u.exp_avg_sq, u.age
            m, v, age = (runs.spread(x, JUNK) if many else x for x in columns)
            u = Update(u.params, u.grads, Entries(offsets, indices), m, v, None, age, u.step)
            adamw(cpu, u, False, None)
            at = runs.at if many else torch.arange(len(runs.at))
            chosen = cpu.table.select_topk(
                problem.params, problem.grads, offsets, indices, cpu.count(500), 500, 1.0, 1.0
            )
            norm = cpu.table.squared_norm(problem.grads, offsets, indices)
            got = [*u.params, m[at], v[at], age[at], *chosen, norm]
            want = want or got
            for a, b in zip(got, want, strict=True):
                oracle.check_bits(a, b)
