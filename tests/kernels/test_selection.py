import itertools

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import F32, F64, INF, NAN, OTHER_EXPS, SPECIAL_EXPS
from hypothesis import given
from hypothesis import strategies as st

from id3_kernels import Entries

INTERPRETED_SHAPES = ((), (0,), (1,), (255,), (256,), (257,), (3, 5, 7), (2, 3, 4, 5))


def select(backend, problem, eps, exp):
    here = backend.here
    return backend.select_topk(
        here(problem.params), here(problem.grads), here(problem.active), problem.k, eps=eps, exp=exp
    )


def expected(problem, eps, exp):
    scores = [
        oracle.array(torch.zeros_like(p)) if g is None else oracle.d3_score(p, g, eps, exp)
        for p, g in zip(problem.params, problem.grads, strict=True)
    ]
    return oracle.topk(scores, problem.active, problem.k)


def flat_problem(kinds, sizes, k, seed=0, active_share=None, dtype=F32):
    rng = np.random.default_rng(seed)
    params, grads = ([cases.tensor(kind, (n,), dtype, "plain", rng) for n in sizes] for kind in kinds)
    active = None if active_share is None else cases.some_entries(sizes, active_share, rng)
    return cases.Problem(params, grads, active, k)


def test_d3_against_brute_force(backend):
    shapes = INTERPRETED_SHAPES if backend.is_slow else cases.SHAPES

    @backend.examples(400, interpreted=60)
    @given(
        cases.recipes(backend.has_float64, max_tensors=3 if backend.is_slow else 6, shapes=shapes),
        st.sampled_from(SPECIAL_EXPS),
        st.sampled_from((1.0, 1e-3)),
    )
    def check(recipe, exp, eps):
        problem = cases.build(recipe)
        oracle.check_selection(select(backend, problem, eps, exp), expected(problem, eps, exp))

    check()


def test_given_scores_against_brute_force(backend):
    shapes = INTERPRETED_SHAPES if backend.is_slow else cases.SHAPES

    @backend.examples(250, interpreted=40)
    @given(cases.recipes(False, max_tensors=3, shapes=shapes), st.sampled_from((F32, F64)))
    def check(recipe, dtype):
        dtype = dtype if backend.has_float64 else F32
        problem = cases.build(recipe)
        scores = [None if g is None else g.to(dtype) for g in problem.grads]
        if all(s is None for s in scores):
            return
        result = backend.select_topk_by_score(backend.here(scores), backend.here(problem.active), problem.k)
        arrays = [None if s is None else oracle.array(s) for s in scores]
        oracle.check_selection(result, oracle.topk(arrays, problem.active, problem.k))

    check()


@pytest.mark.parametrize("exp", OTHER_EXPS)
def test_other_exponents_select_what_their_scores_say(backend, exp):
    """pow may differ by an ulp between backends: the oracle sorts the scores of the same backend."""
    problem = flat_problem(("normal", "normal"), (700, 300), 40, active_share=0.2)
    scores = [
        oracle.array(backend.d3_score(backend.here(p), backend.here(g), eps=0.5, exp=exp))
        for p, g in zip(problem.params, problem.grads, strict=True)
    ]
    oracle.check_selection(select(backend, problem, 0.5, exp), oracle.topk(scores, problem.active, problem.k))


@pytest.mark.parametrize("k", [0, 1, 3, 39, 40, 100, 5000, 10**6], ids=lambda k: f"k={k}")
@pytest.mark.parametrize(
    "kinds", [("normal", "normal"), ("equal", "quantised"), ("special", "special")], ids="-".join
)
def test_few_and_many_of_large_tensors(backend, kinds, k):
    """157 tiles of 256 entries: a k beyond a quarter of them is selected in another way."""
    sizes = (900, 2100) if backend.is_slow else (20_000, 257, 1, 19_921)
    problem = flat_problem(kinds, sizes, k, active_share=0.3)
    oracle.check_selection(select(backend, problem, 1.0, 2.0), expected(problem, 1.0, 2.0))


@pytest.mark.parametrize("k", [1, 20, 256, 300, 2000], ids=lambda k: f"k={k}")
def test_one_tensor_and_one_tile_hold_all_the_mass(backend, k):
    sizes = (600, 600) if backend.is_slow else (30_000, 10_000)
    problem = flat_problem(("zeros", "close"), sizes, k)
    problem.grads[0].mul_(1e-6)
    problem.grads[1][300:556] = 1e3 + torch.arange(256) % 5
    oracle.check_selection(select(backend, problem, 1.0, 2.0), expected(problem, 1.0, 2.0))


@pytest.mark.parametrize("k", [1, 5, 64, 299, 300, 601], ids=lambda k: f"k={k}")
def test_ties_go_to_the_lowest_position_across_tensors(backend, k):
    ones = [backend.here(torch.ones(n)) for n in (5, 295, 300)]
    entries, scores = backend.select_topk(ones, ones, None, k, eps=1.0, exp=1.0)
    counts = [min(k, 5), min(max(k - 5, 0), 295), min(max(k - 300, 0), 300)]
    assert [row.tolist() for row in entries.lists()] == [list(range(n)) for n in counts]
    assert scores.tolist() == [0.5] * min(k, 600)


def test_nan_and_infinite_scores_are_never_selected(backend):
    grad = backend.here(torch.tensor([NAN, INF, 2.0, -INF, -3.0, 0.0, 1e-40, 1.0]))
    param = backend.here(torch.tensor([0.0, 0.0, NAN, 0.0, 0.0, 0.0, 0.0, INF]))
    entries, scores = backend.select_topk([param], [grad], None, 8, eps=1.0, exp=2.0)
    assert entries.indices.tolist() == [4]
    assert scores.tolist() == [3.0]
    entries, scores = backend.select_topk([param], [grad], None, 8, eps=1.0, exp=0.0)
    assert entries.indices.tolist() == [2, 4, 7]
    entries, _ = backend.select_topk_by_score([grad], None, 8)
    assert entries.indices.tolist() == [2, 7]


def test_less_than_k_is_left(backend):
    param, grad = backend.here(torch.zeros(300)), backend.here(torch.arange(300.0))
    active = backend.here(Entries.from_lists([[*range(3, 299)]]))
    entries, scores = backend.select_topk([param], [grad], active, 10, eps=1.0, exp=1.0)
    assert entries.indices.tolist() == [1, 2, 299]
    assert scores.tolist() == [1.0, 2.0, 299.0]


def test_active_entries_may_lie_in_tensors_without_gradient(backend):
    grads = backend.here([None, torch.tensor([1.0, 2.0, 3.0])])
    active = backend.here(Entries.from_lists([[0, 255, 299], [2]]))
    entries, _ = backend.select_topk(
        backend.here([torch.ones(300), torch.ones(3)]), grads, active, 2, eps=1.0, exp=2.0
    )
    assert [row.tolist() for row in entries.lists()] == [[], [0, 1]]
    entries, _ = backend.select_topk_by_score(grads, active, 2)
    assert [row.tolist() for row in entries.lists()] == [[], [0, 1]]


@pytest.mark.parametrize("capacity", [0, 7, 40])
@pytest.mark.parametrize("k", [-3, 0, 5, 30, 1000], ids=lambda k: f"k={k}")
def test_k_is_a_tensor_and_capacity_its_bound(backend, k, capacity):
    """Nothing for less than 1, no more than the capacity, and zeros behind the last."""
    problem = flat_problem(
        ("normal", "quantised"), (300, 20, 257), min(max(k, 0), capacity), active_share=0.1
    )
    arguments = (backend.here(problem.grads), *backend.here(problem.active), backend.count(k), capacity)
    by_score = backend.table.select_topk_by_score(*arguments)
    by_d3 = backend.table.select_topk(backend.here(problem.params), *arguments, 1.0, 2.0)
    arrays = [oracle.array(g) for g in problem.grads]
    wanted = oracle.topk(arrays, problem.active, problem.k)
    for got, want in ((by_score, wanted), (by_d3, expected(problem, 1.0, 2.0))):
        offsets, indices, scores = got
        n = int(offsets[-1])
        assert indices.shape == scores.shape == (capacity,)
        assert not indices[n:].any()
        assert not scores[n:].any()
        oracle.check_selection((Entries(offsets, indices[:n]), scores[:n]), want)


@pytest.mark.parametrize("k", [1, 20, 500], ids=lambda k: f"k={k}")
@pytest.mark.parametrize(("first", "last"), [(0, 2), (1, 3), (2, 5), (4, 5)])
def test_a_part_of_the_tensors_by_a_part_of_the_offsets(backend, first, last, k):
    sizes = (300, 20, 257, 0, 700)
    problem = flat_problem(("normal", "quantised"), sizes, k, active_share=0.2)
    params, grads = (backend.here(t[first:last]) for t in (problem.params, problem.grads))
    offsets, indices = backend.here(problem.active)
    cut = backend.here(Entries.from_lists(problem.active.lists()[first:last]))
    wanted = (backend.count(k), min(k, sum(sizes[first:last])))
    part = offsets[first : last + 1], indices
    for got, want in (
        (backend.table.select_topk_by_score(grads, *entries, *wanted) for entries in (part, cut)),
        (backend.table.select_topk(params, grads, *entries, *wanted, 1.0, 0.5) for entries in (part, cut)),
    ):
        assert int(got[0][0]) == 0
        for a, b in zip(got, want, strict=True):
            oracle.check_bits(a, b)


def test_capacity_behind_the_active_entries_is_ignored(backend):
    grad = backend.here(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    exact = Entries.from_lists([[0]])
    padded = backend.here(Entries(exact.offsets, torch.tensor([0, 1, -5, 99], dtype=torch.int32)))
    entries, _ = backend.select_topk([grad], [grad], padded, 2, eps=1.0, exp=0.0)
    assert entries.indices.tolist() == [1, 2]


def test_selecting_again_and_again_takes_each_entry_once(backend):
    """As an optimizer does: the active set grows by the selection until nothing is left."""
    rng = np.random.default_rng(5)
    sizes = (130, 1, 270)
    grads = backend.here([cases.tensor("quantised", (n,), F32, "plain", rng) for n in sizes])
    active, rounds = backend.here(Entries.empty(3)), []
    while True:
        entries, scores = backend.select_topk(grads, grads, active, 60, eps=1.0, exp=0.5)
        if not len(scores):
            break
        rounds.append(scores)
        active = backend.union(active, entries)[0]
    assert [r.numel() for r in rounds[:-1]] == [60] * (len(rounds) - 1)
    assert all(a.min() >= b.max() for a, b in itertools.pairwise(rounds))
    assert int(active.offsets[-1]) == sum(int((g != 0).sum()) for g in grads)


@pytest.mark.parametrize("k", [30, 4000], ids=lambda k: f"k={k}")
@pytest.mark.parametrize("kind", ["quantised", "normal"])
def test_same_bits_for_every_thread_count_and_run(cpu, threads, kind, k):
    problem = flat_problem(("normal", kind), (150_000, 33, 70_001, 90_000), k, active_share=0.01)
    want = expected(problem, 1.0, 2.0)
    for run in range(20):
        threads(1 + run % 3)
        oracle.check_selection(select(cpu, problem, 1.0, 2.0), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("exp", [*SPECIAL_EXPS, 0.7])
def test_same_bits_for_every_instruction_set(cpu, simd_levels, exp, dtype):
    problem = flat_problem(("special", "normal"), (30_000, 10_003), 30, active_share=0.01, dtype=dtype)
    runs = []
    for _ in simd_levels():
        (offsets, indices), scores = select(cpu, problem, 1e-3, exp)
        everything = cpu.d3_score(problem.params[1], problem.grads[1], eps=1e-3, exp=exp)
        runs.append((offsets, indices, scores, everything))
    for run in runs[1:]:
        for got, want in zip(run, runs[0], strict=True):
            oracle.check_bits(got, want)
