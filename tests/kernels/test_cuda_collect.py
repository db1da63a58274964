"""The fused collect_ of the CUDA kernels, emulated, where its candidates are few, many, and too many."""

import shutil
from types import SimpleNamespace

import cases
import emulated
import numpy as np
import oracle
import pytest
import torch
from candidates import Candidates, collect
from torch.utils._python_dispatch import TorchDispatchMode

from id3_kernels import Entries
from id3_kernels import cuda as module

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(params=["forward", "reverse", "grid", "grid reverse"])
def cuda(request, emulated_cuda, monkeypatch):
    """The backend, its threads and blocks in either order; candidates are cut by one block or by a grid."""
    monkeypatch.setattr(emulated, "cuts_by_grid", "grid" in request.param)
    emulated.library().set_reverse("reverse" in request.param)
    yield SimpleNamespace(table=module, device=torch.device("cpu"), here=lambda value: value)
    emulated.library().set_reverse(False)


def nobody(k, room=None):
    """Room as the backend asks for, or less of it."""
    asked, length = module.candidate_room(k)
    room = room or asked
    score, grad, place = torch.zeros(room), torch.zeros(room), torch.full((room,), -1)
    return Candidates(score, place, grad, torch.zeros(length, dtype=torch.int64), torch.tensor([k]))


def count(held):
    """How many candidates are held, which stand in front as the kernels expect it."""
    n = int((held.place != -1).sum())
    assert held.state[0] == n
    assert (held.place[:n] != -1).all()
    return n


def was_cut(held):
    """Whether candidates had to be cut: the floor then is an entry, with a place."""
    return bool(held.state[2])


def make(kind, sizes, dtype, k, layouts=("plain",), share=0.02):
    rng = np.random.default_rng(len(kind) + k)
    params, grads = [], []
    for j, n in enumerate(sizes):
        layout = layouts[j % len(layouts)]
        params.append(cases.tensor("normal", (n,), dtype, layout, rng))
        grads.append(cases.tensor(kind, (n,), dtype, layout, rng))
    return cases.Problem(params, grads, cases.some_entries(sizes, share, rng), k)


def best_of(problem, exp=1.0):
    scores = [oracle.d3_score(p, g, 1.0, exp) for p, g in zip(problem.params, problem.grads, strict=True)]
    return oracle.topk(scores, problem.active, problem.k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exp", [0.0, 0.5, 1.0, 2.0, -0.5, -1.0, -2.0, 0.7])
def test_few_candidates_in_any_order_of_tensors(cuda, dtype, exp):
    problem = make(
        "normal", (50_000, 1, 0, 20_007, 8192), dtype, 30, ("plain", "plain", "plain", "misaligned")
    )
    expected = best_of(problem, exp)
    for order in ((0, 1, 2, 3, 4), (4, 2, 3, 1, 0)):
        held = nobody(30)
        values = collect(cuda, problem, order, held, 1.0, exp)
        assert not was_cut(held)
        if exp != 0.7:
            held.check(problem, expected)
        assert 30 <= count(held) < 30 * 20
        offsets, indices = problem.active
        for j, g in enumerate(problem.grads):
            here = slice(*offsets[j : j + 2].tolist())
            assert torch.equal(values[here], g.reshape(-1)[indices[here].long()].float())


@pytest.mark.parametrize("kind", ["normal", "special", "subnormal"])
def test_one_large_tensor_leaves_little_more_than_k(cuda, kind):
    """The histogram's edge lies just below the k-th score, also of the first tensor of a pass."""
    problem = make("normal", (300_000,), torch.float32, 1000)
    problem.grads[0][:100] = cases.tensor(kind, (100,), torch.float32, "plain", np.random.default_rng(3))
    held = nobody(1000)
    collect(cuda, problem, (0,), held, 1.0, 1.0)
    held.check(problem, best_of(problem))
    assert 1000 <= count(held) < 1500


def test_active_entries_do_not_count_however_large(cuda):
    problem = make("normal", (60_000, 300), torch.bfloat16, 30, share=0.05)
    for g, active in zip(problem.grads, problem.active.lists(), strict=True):
        g[active.long()] *= 1000
    held = nobody(30)
    collect(cuda, problem, (0, 1), held, 1.0, 0.0)
    held.check(problem, best_of(problem, 0.0))


@pytest.mark.parametrize("kind", ["normal", "equal", "quantised", "special", "one_mass", "close"])
@pytest.mark.parametrize(("k", "room"), [(1, 64), (7, 20), (40, 80), (300, 1000), (900, 30_000)])
def test_too_many_candidates_are_cut_to_the_best(cuda, kind, k, room):
    problem = make(kind, (9000, 33, 20_001, 300, 0, 8200), torch.float32, k)
    problem.params[:] = [torch.ones_like(p) for p in problem.params]
    expected = best_of(problem)
    for order in ((0, 1, 2, 3, 4, 5), (5, 4, 3, 2, 1, 0), (3, 1, 5, 0, 2, 4)):
        held = nobody(k, room)
        collect(cuda, problem, order, held, 1.0, 1.0)
        held.check(problem, expected)
        assert count(held) <= room // 2


def test_each_way_out_of_too_many_is_taken(cuda):
    """A tidy, where the room is half full; an overflow, where the append itself found no room."""
    for sizes, overflows in (((200, 200, 200), False), ((200, 2000), True)):
        problem = cases.Problem(
            [torch.ones(n) for n in sizes], [torch.ones(n) for n in sizes], Entries.empty(len(sizes)), 10
        )
        held = nobody(10, 1000)
        for j in range(len(sizes)):
            before = count(held)
            collect(cuda, problem, (j,), held, 1.0, 1.0)
            assert was_cut(held) == (j == len(sizes) - 1)
            assert (before + sizes[j] > 1000) == (overflows and was_cut(held))
        held.check(problem, best_of(problem, 1.0))
        assert count(held) == 10


def test_an_overflow_leaves_nothing_behind_the_candidates(cuda):
    grad = torch.arange(800.0)
    grad[::3] = 0
    problem = cases.Problem([torch.ones(800)], [grad.clamp(max=1)], Entries.empty(1), 10)
    held = nobody(10, 100)
    collect(cuda, problem, (0,), held, 1.0, 0.0)
    held.check(problem, best_of(problem, 0.0))
    assert was_cut(held)
    count(held)


def test_a_large_tensor_of_ties(cuda):
    """Of which one block takes the candidates in more than one stretch."""
    grad = torch.ones(1_200_000)
    grad[[5, 1_100_000, 1_199_999]] = 2.0
    problem = cases.Problem([torch.ones(300), torch.ones_like(grad)], [torch.ones(300), grad], None, 12)
    held = nobody(12, 40)
    collect(cuda, problem, (1, 0), held, 1.0, 0.0)
    expected = oracle.topk([oracle.array(g) for g in problem.grads], Entries.empty(2), 12)
    held.check(problem, expected)
    assert was_cut(held)
    count(held)


def test_a_grid_leaves_its_state_as_it_was(cuda):
    """Zeros but for what the last cut has found, since the next cut relies on it."""
    problem = make("quantised", (3000, 9000), torch.float32, 7)
    held = nobody(7, 20)
    collect(cuda, problem, (0, 1), held, 1.0, 1.0)
    n_words = module.candidate_room(7)[1]
    cut = held.state[n_words - emulated.library().cut_state_length() :]
    found = cut.view(torch.int32)[4:7].clone()
    cut.view(torch.int32)[4:7] = 0
    assert not cut.any()
    assert found.any() == emulated.cuts_by_grid


@pytest.mark.parametrize("room", [None, 30])
def test_scores_of_others(cuda, room):
    problem = make("quantised", (9000, 300, 8200), torch.bfloat16, 12)
    rng = np.random.default_rng(5)
    scores = [cases.tensor("special", g.shape, torch.float32, "plain", rng) for g in problem.grads]
    scores[0][::3] = 0.5
    held = nobody(12, room)
    collect(cuda, problem, (2, 0, 1), held, 0.0, 0.0, scores=scores)
    held.check(problem, oracle.topk([oracle.array(s) for s in scores], problem.active, 12))
    count(held)


def test_mixed_dtypes_and_parts_of_the_offsets(cuda):
    problem = make("normal", (9000, 20_000), torch.bfloat16, 9)
    problem.grads[:] = [g.float() for g in problem.grads]
    held = nobody(9)
    values = collect(cuda, problem, (1, 0), held, 1.0, 2.0)
    held.check(problem, best_of(problem, 2.0))
    collect(cuda, problem, (0,), nobody(9), 1.0, 2.0, values=values, add=True)
    (_, first, end), indices = problem.active.offsets.tolist(), problem.active.indices.long()
    assert torch.equal(values[:first], 2 * problem.grads[0].reshape(-1)[indices[:first]])
    assert torch.equal(values[first:end], problem.grads[1].reshape(-1)[indices[first:end]])
    assert values[end:].eq(7.0).all()


@pytest.mark.parametrize("k", [0, -3])
def test_where_nobody_is_wanted_the_values_alone_are_taken(cuda, k):
    problem = make("normal", (9000,), torch.float32, 0, share=0.1)
    held = nobody(5)
    held.k.fill_(k)
    values = collect(cuda, problem, (0,), held, 1.0, 1.0)
    n = problem.active.indices.numel()
    assert torch.equal(values[:n], problem.grads[0][problem.active.indices.long()])
    assert count(held) == 0
    assert not held.state.any()
    unread = cases.Problem([emulated.unreadable(9000)], [emulated.unreadable(9000)], None, 0)
    collect(cuda, unread, (0,), held, 1.0, 1.0)


def test_again_and_the_first_time_go_together(cuda):
    """Of the larger scores of two passes, and of a tensor that only the second pass has."""
    first = make("normal", (9000, 300), torch.float32, 40)
    second = make("close", (9000, 300, 8200), torch.float32, 40)
    first = cases.Problem(second.params[:2], first.grads, second.active, 40)
    largest = [
        torch.where(a.abs() >= b.abs(), a, b) for a, b in zip(first.grads, second.grads[:2], strict=True)
    ]
    both = cases.Problem(second.params, [*largest, second.grads[2]], second.active, 40)
    for room in (None, 90):
        held = nobody(40, room)
        collect(cuda, first, (1, 0), held, 1.0, 0.0)
        collect(cuda, second, (0, 1), held, 1.0, 0.0, again=True)
        assert count(held) == 40
        collect(cuda, second, (2,), held, 1.0, 0.0)
        held.check(both, best_of(both, 0.0))
        count(held)


class Recorded(TorchDispatchMode):
    """The names of torch's own ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("room", [None, 30])
@pytest.mark.parametrize("score", [None, torch.ones(20_000)])
def test_a_hook_is_few_launches_and_nothing_of_torch(cuda, score, room):
    held, entries = nobody(10, room), Entries.from_lists([[3, 19_000]])
    param, grad, values = torch.ones(20_000), torch.ones(20_000), torch.zeros(2)
    before = emulated.library().launches_emulated()
    with Recorded() as torchs_own:
        module.collect_(param, grad, score, *entries, values, False, 0, *held.arguments(), False, 1.0, 2.0)
    assert emulated.library().launches_emulated() - before == (14 if emulated.cuts_by_grid else 3)
    assert torchs_own.names == []
    assert values.eq(1).all()


def test_room_for_candidates(emulated_cuda):
    assert module.candidate_room(0) == (0, 0)
    room, length = module.candidate_room(1000)
    assert room >= 16 * 1000
    assert length == emulated.library().collect_state_length()
    assert module.candidate_room(1 << 21) == (1 << 21, 0)  # no more than the best themselves
    for k in (1, 7, 1000, 1 << 20):
        assert emulated.most_wanted(module.candidate_room(k)[0]) == k
