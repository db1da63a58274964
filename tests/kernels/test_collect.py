"""collect_, tensor by tensor in any order, against the selection over all tensors at once."""

import cases
import numpy as np
import oracle
import pytest
import torch
from candidates import Candidates, collect
from cases import SPECIAL_EXPS
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from id3_kernels import Entries
from id3_kernels.reference import wide_dtype
from id3_kernels.table import candidate_room


@pytest.mark.parametrize("exp", SPECIAL_EXPS)
def test_same_entries_as_the_selection_over_all_tensors(backend, exp):
    @backend.examples(25, interpreted=4)
    @given(cases.recipes(backend.has_float64), st.booleans(), st.randoms(use_true_random=False))
    def check(recipe, more_room, random):
        problem = cases.build(recipe)
        dtype = wide_dtype(problem.params[0].dtype)
        k = min(problem.k, sum(problem.sizes()))
        order = random.sample(range(len(problem.params)), len(problem.params))
        held = Candidates.none(backend, k, dtype, room=3 * k + 5 if more_room else k)
        values = collect(backend, problem, order, held, 1.0, exp)
        scores = [
            None if g is None else oracle.d3_score(p, g, 1.0, exp)
            for p, g in zip(problem.params, problem.grads, strict=True)
        ]
        held.check(problem, oracle.topk(scores, problem.active, k))
        want = torch.full(values.shape, 7.0, dtype=dtype)
        for j, g in enumerate(problem.grads if problem.active else []):
            if g is not None:
                begin, end = problem.active.offsets[j : j + 2].tolist()
                want[begin:end] = torch.from_numpy(oracle.array(g))[problem.active.of(j).long()]
        oracle.check_bits(values, want)

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
        held = Candidates.none(cpu, k, torch.float32)
        collect(cpu, problem, order, held, 1.0, 1.0)
        held.check(problem, oracle.topk(scores, active, k))


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
        held = Candidates.none(cpu, 300, wide_dtype(dtype))
        collect(cpu, problem, order, held, eps, exp)
        held.check(problem, oracle.topk(scores, active, 300))


def test_scores_of_others_and_growing_values(backend):
    grads = [torch.tensor([1.0, -2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0])]
    scores = [torch.tensor([0.5, 9.0, 9.0, float("nan")]), torch.tensor([0.25, 9.0])]
    active = Entries.from_lists([[0, 2], [0]])
    problem = cases.Problem([torch.ones(4), torch.ones(2)], grads, active, 3)
    held = Candidates.none(backend, 3, torch.float32)
    values = collect(backend, problem, (1, 0), held, 1.0, 1.0, scores=scores)
    collect(backend, problem, (0, 1), held, 1.0, 1.0, scores=scores, again=True, values=values, add=True)
    assert values[:3].tolist() == [2.0, 6.0, 10.0]
    assert [x.tolist() for x in held.best()] == [[9.0, 9.0], [1, (1 << 32) + 1], [-2.0, 6.0]]


def in_parts(backend, problem, j, length, held, again):
    """collect_ on pieces of one tensor, the last first, as a backward pass in blocks of rows makes them."""
    param, grad = problem.params[j].flatten(), problem.grads[j].flatten()
    active = problem.active.of(j)
    for first in reversed(range(0, grad.numel(), length)):
        inside = active[(active >= first) & (active < first + length)] - first
        offsets = torch.tensor([0, inside.numel()], device=backend.device)
        piece = [backend.here(x[first : first + length]) for x in (param, grad)]
        values = torch.zeros(inside.numel(), device=backend.device)
        entries = offsets, backend.here(inside), values, False
        backend.table.collect_(*piece, None, *entries, (j << 32) + first, *held.arguments(), again, 1.0, 1.0)
        oracle.check_bits(values, grad[active[(active >= first) & (active < first + length)].long()])


@pytest.mark.parametrize("again", [False, True], ids=["", "again"])
@pytest.mark.parametrize("kind", ["quantised", "equal", "normal"])
def test_parts_of_a_tensor_give_the_candidates_of_the_whole(backend, kind, again):
    """Ties between parts, and between tensors before and behind, go to the lowest place."""
    rng = np.random.default_rng(5)
    sizes, k = (900, 2100, 700), 150
    grads = [cases.tensor(kind, (n,), cases.F32, "plain", rng) for n in sizes]
    active = cases.some_entries(list(sizes), 0.05, rng)
    problem = cases.Problem([torch.ones(n) for n in sizes], grads, active, k)
    scores = [oracle.d3_score(p, g, 1.0, 1.0) for p, g in zip(problem.params, grads, strict=True)]
    held = Candidates.none(backend, k, torch.float32)
    collect(backend, problem, (2,), held, 1.0, 1.0)
    in_parts(backend, problem, 1, 512, held, False)
    if again:
        in_parts(backend, problem, 1, 512, held, True)
    collect(backend, problem, (0,), held, 1.0, 1.0)
    held.check(problem, oracle.topk(scores, active, k))


@pytest.mark.parametrize("k", [-3, 0])
def test_nobody_is_wanted(backend, k):
    """The values at active entries are kept all the same."""
    active = Entries.from_lists([[0], [1, 2]])
    problem = cases.Problem([torch.ones(3)] * 2, [torch.tensor([1.0, 2.0, 3.0])] * 2, active, k)
    held = Candidates.none(backend, 4, torch.float32)
    held.k.fill_(k)
    values = collect(backend, problem, (1, 0), held, 1.0, 1.0)
    assert values.tolist() == [1.0, 2.0, 3.0, 7.0, 7.0, 7.0]
    assert held.place.eq(-1).all()
    assert not held.score.any()


def test_fewer_are_wanted_than_before(cpu):
    """An entry that is no longer among the best comes back with a larger score."""
    first, later = torch.arange(1.0, 10.0), torch.zeros(9)
    later[3] = 20.0
    held = Candidates.none(cpu, 8, torch.float32)
    collect(cpu, cases.Problem([torch.ones(9)], [first], None, 8), (0,), held, 1.0, 0.0)
    held.k.fill_(3)
    collect(cpu, cases.Problem([torch.ones(9)], [later], None, 3), (0,), held, 1.0, 0.0, again=True)
    assert [x.tolist() for x in held.best()] == [[20.0, 9.0, 8.0], [3, 8, 7], [20.0, 9.0, 8.0]]


@pytest.mark.parametrize("more_room", [False, True])
@pytest.mark.parametrize("k", [1, 10, 100], ids=lambda k: f"k={k}")
def test_again_keeps_the_best_score_of_each_entry_and_its_gradient(backend, k, more_room):
    rng = np.random.default_rng(k)
    rounds = [[cases.tensor("quantised", (n,), cases.F32, "plain", rng) for n in (60, 300)] for _ in range(4)]
    active = cases.some_entries([60, 300], 0.1, rng)
    params = [torch.ones(60), torch.ones(300)]
    held = Candidates.none(backend, k, torch.float32, room=3 * k + 5 if more_room else k)
    for r, grads in enumerate(rounds):
        problem = cases.Problem(params, grads, active, k)
        collect(backend, problem, (1, 0) if r % 2 else (0, 1), held, 1.0, 0.0, again=r > 0)
    stacked = [torch.stack(rows) for rows in zip(*rounds, strict=True)]
    first_best = [s.abs().argmax(0, keepdim=True) for s in stacked]  # the first of equal ones
    chosen = [s.gather(0, at)[0] for s, at in zip(stacked, first_best, strict=True)]
    expected = oracle.topk([g.abs().numpy() for g in chosen], active, k)
    held.check(cases.Problem(params, chosen, active, k), expected)


@pytest.mark.parametrize("k", [0, 2])
def test_an_index_outside_the_tensor_is_refused(cpu, k):
    outside = cases.Problem([torch.ones(4)], [torch.ones(4)], Entries.from_lists([[4]]), k)
    with pytest.raises(ValueError, match="indices"):
        collect(cpu, outside, (0,), Candidates.none(cpu, k, torch.float32), 1.0, 2.0)


@pytest.mark.parametrize("k", [0, 2])
@pytest.mark.parametrize("offsets", [[-1, 1], [1, 0], [0, 3], [0], [0, 1, 2]], ids=str)
def test_offsets_outside_the_entries_are_refused(cpu, offsets, k):
    arrays = (torch.zeros(2, dtype=torch.int32), torch.full((2,), 5.0))
    held = Candidates.none(cpu, k, torch.float32)
    with pytest.raises(ValueError, match=r"offsets|indices"):
        cpu.table.collect_(
            torch.ones(4), torch.ones(4), None, torch.tensor(offsets), *arrays, False, 0,
            *held.arguments(), False, 1.0, 2.0,
        )  # fmt: skip
    assert arrays[1].tolist() == [5.0, 5.0]
    assert not held.score.any()


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
    room, length = candidate_room(torch.device("cpu"), "triton", 4)
    best = torch.zeros(room), torch.full((room,), -1), torch.zeros(room)
    state, k = torch.zeros(length, dtype=torch.int64), torch.tensor([4])
    entries = torch.tensor([0, 3]), indices, torch.zeros(3)
    arguments = (param, grad, score, *entries, again, 0, *best, state, k, again, 1.0, 2.0)
    collect_(*arguments)  # fills the tables of this shape, once
    with NoQuestions():
        collect_(*arguments)
        if not again:
            with pytest.raises(AssertionError, match="waits"):
                grad.nonzero()
