"""collect_, tensor by tensor in any order, against the selection over all tensors at once."""

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import SPECIAL_EXPS
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from id3_kernels import Entries
from id3_kernels.reference import wide_dtype


def nobody(k, dtype, device="cpu"):
    """Room for the k best: score, place, gradient."""
    place = torch.full((k,), -1, device=device)
    return torch.zeros(k, dtype=dtype, device=device), place, torch.zeros(k, dtype=dtype, device=device)


def collect(backend, problem, order, best, eps, exp, scores=None, again=False, values=None, add=False):
    """Hands the problem's tensors to collect_ in `order`; returns the values at the active entries."""
    rows = problem.active.lists() if problem.active else [torch.empty(0, dtype=torch.int32)] * len(order)
    values = values or [
        torch.full((len(row),), 7.0, dtype=best[0].dtype, device=best[0].device) for row in rows
    ]
    for j in order:
        if problem.grads[j] is not None:
            given_score = None if scores is None else backend.here(scores[j])
            backend.table.collect_(
                backend.here(problem.params[j]), backend.here(problem.grads[j]), given_score,
                backend.here(rows[j]), values[j], add, j, *best, again, eps, exp,
            )  # fmt: skip
    return values


def check_best(problem, best, expected, dtype):
    """Best first, ties to the lowest place, and each with its gradient; behind them nobody."""
    offsets, indices, scores = expected
    owner = np.repeat(np.arange(len(problem.params)), np.diff(offsets))
    order = np.argsort(-scores, kind="stable")
    n = len(order)
    want = (owner.astype(np.int64) << 32 | indices)[order]
    score, place, grad = (x.cpu() for x in best)
    np.testing.assert_array_equal(place.numpy(), np.concatenate([want, np.full(len(place) - n, -1)]))
    oracle.check_bits(score[:n], torch.from_numpy(scores[order].copy()))
    rows = [None if g is None else torch.from_numpy(oracle.array(g)) for g in problem.grads]
    for i in range(n):
        oracle.check_bits(grad[i], rows[want[i] >> 32][want[i] & 0xFFFFFFFF])
    assert not score[n:].any() and not grad[n:].any()


@pytest.mark.parametrize("exp", SPECIAL_EXPS)
def test_same_entries_as_the_selection_over_all_tensors(backend, exp):
    @backend.examples(25, interpreted=4)
    @given(cases.recipes(backend.has_float64), st.randoms(use_true_random=False))
    def check(recipe, random):
        problem = cases.build(recipe)
        dtype = wide_dtype(problem.params[0].dtype)
        k = min(problem.k, sum(problem.sizes()))
        order = random.sample(range(len(problem.params)), len(problem.params))
        best = nobody(k, dtype, backend.device)
        values = collect(backend, problem, order, best, 1.0, exp)
        scores = [
            None if g is None else oracle.d3_score(p, g, 1.0, exp)
            for p, g in zip(problem.params, problem.grads, strict=True)
        ]
        check_best(problem, best, oracle.topk(scores, problem.active, k), dtype)
        if problem.active:
            for row, g, got in zip(problem.active.lists(), problem.grads, values, strict=True):
                want = 7.0 * torch.ones(len(row)) if g is None else oracle.array(g)[row.numpy()]
                oracle.check_bits(got.cpu(), torch.as_tensor(want, dtype=dtype))

    check()


@pytest.mark.parametrize("k", [1, 40, 700, 5000], ids=lambda k: f"k={k}")
@pytest.mark.parametrize("kind", ["quantised", "equal", "normal"])
def test_many_ties_many_tiles_and_any_thread_count(cpu, threads, kind, k):
    rng = np.random.default_rng(0)
    sizes = (300_000, 33, 70_001)
    grads = [cases.tensor(kind, (n,), cases.F32, "plain", rng) for n in sizes]
    active = cases.some_entries(list(sizes), 0.01, rng)
    problem = cases.Problem([torch.ones(n) for n in sizes], grads, active, k)
    scores = [oracle.d3_score(p, g, 1.0, 1.0) for p, g in zip(problem.params, grads, strict=True)]
    for count, order in ((1, (0, 1, 2)), (2, (2, 1, 0)), (3, (1, 2, 0))):
        threads(count)
        best = nobody(k, torch.float32)
        collect(cpu, problem, order, best, 1.0, 1.0)
        check_best(problem, best, oracle.topk(scores, active, k), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [1e-30, 1e-3, 1.0])
@pytest.mark.parametrize("exp", [0.5, 1.0, 2.0, -1.0])
def test_weights_that_hide_and_weights_that_do_not(cpu, exp, eps, dtype):
    """Where |g| alone settles most tiles, and where scores hang on small weights."""
    rng = np.random.default_rng(1)
    params, grads = ([], [])
    for scale, kind in ((1e-2, "normal"), (1.0, "normal"), (1e-2, "normal"), (0.0, "close")):
        params.append(cases.tensor("normal", (60_000,), dtype, "plain", rng) * scale)
        grads.append(cases.tensor(kind, (60_000,), dtype, "plain", rng))
    active = cases.some_entries([60_000] * 4, 0.02, rng)
    problem = cases.Problem(params, grads, active, 300)
    scores = [oracle.d3_score(p, g, eps, exp) for p, g in zip(params, grads, strict=True)]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0)):
        best = nobody(300, wide_dtype(dtype))
        collect(cpu, problem, order, best, eps, exp)
        check_best(problem, best, oracle.topk(scores, active, 300), wide_dtype(dtype))


def test_scores_of_others_and_growing_values(backend):
    grads = [torch.tensor([1.0, -2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0])]
    scores = [torch.tensor([0.5, 9.0, 9.0, float("nan")]), torch.tensor([0.25, 9.0])]
    active = Entries.from_lists([[0, 2], [0]])
    problem = cases.Problem([torch.ones(4), torch.ones(2)], grads, active, 3)
    best = nobody(3, torch.float32, backend.device)
    values = collect(backend, problem, (1, 0), best, 1.0, 1.0, scores)
    collect(backend, problem, (0, 1), best, 1.0, 1.0, scores, again=True, values=values, add=True)
    assert [v.tolist() for v in values] == [[2.0, 6.0], [10.0]]
    assert best[0].tolist() == [9.0, 9.0, 0.0]
    assert best[1].tolist() == [1, (1 << 32) + 1, -1]
    assert best[2].tolist() == [-2.0, 6.0, 0.0]


@pytest.mark.parametrize("k", [1, 10, 100], ids=lambda k: f"k={k}")
def test_again_keeps_the_best_score_of_each_entry_and_its_gradient(backend, k):
    rng = np.random.default_rng(k)
    rounds = [[cases.tensor("quantised", (n,), cases.F32, "plain", rng) for n in (60, 300)] for _ in range(4)]
    active = cases.some_entries([60, 300], 0.1, rng)
    params = [torch.ones(60), torch.ones(300)]
    best = nobody(k, torch.float32, backend.device)
    for r, grads in enumerate(rounds):
        problem = cases.Problem(params, grads, active, k)
        collect(backend, problem, (1, 0) if r % 2 else (0, 1), best, 1.0, 0.0, again=r > 0)
    stacked = [torch.stack(rows) for rows in zip(*rounds, strict=True)]
    first_best = [s.abs().argmax(0, keepdim=True) for s in stacked]  # the first of equal ones
    chosen = [s.gather(0, at)[0] for s, at in zip(stacked, first_best, strict=True)]
    expected = oracle.topk([g.abs().numpy() for g in chosen], active, k)
    check_best(cases.Problem(params, chosen, active, k), best, expected, torch.float32)


def test_an_index_outside_the_tensor_is_refused(cpu):
    outside = torch.tensor([4], dtype=torch.int32)
    for k in (0, 2):
        with pytest.raises(ValueError, match="indices"):
            cpu.table.collect_(
                torch.ones(4), torch.ones(4), None, outside, torch.ones(1), False, 0,
                *nobody(k, torch.float32), False, 1.0, 2.0,
            )  # fmt: skip


class NoQuestions(TorchDispatchMode):
    """Fails at what makes the host wait for a GPU: a number read back, a result whose size is data."""

    ASKING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name.strip("_") not in [asking.strip("_") for asking in self.ASKING], f"{name} waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("given_score", [False, True])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("numel", [100, 5000])
def test_a_gpu_hook_never_waits(monkeypatch, given_score, again, numel):
    """What Triton's collect_ does between its kernels, which the interpreter is not asked to run here."""
    launch = pytest.importorskip("id3_kernels.triton.launch", reason="triton is not installed")
    from id3_kernels.triton import collect_

    monkeypatch.setattr(launch, "run", lambda *_: None)
    monkeypatch.setattr(launch, "check", lambda *_: None)
    param, grad, indices = torch.ones(numel), torch.ones(numel), torch.tensor([1, 5, 7], dtype=torch.int32)
    score = grad.clone() if given_score else None
    best, values = nobody(4, torch.float32), torch.zeros(3)
    arguments = (param, grad, score, indices, values, again, 0, *best, again, 1.0, 2.0)
    collect_(*arguments)  # fills the tables of this shape, once
    with NoQuestions():
        collect_(*arguments)
        if not again:
            with pytest.raises(AssertionError, match="waits"):
                grad.nonzero()
