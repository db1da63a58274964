import math

import cases
import numpy as np
import oracle
import pytest
import torch
from candidates import padded
from cases import F32, F64
from hypothesis import given
from hypothesis import strategies as st

from id3_kernels import Entries, from_sparse_coo, to_sparse_coo

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = st.lists(st.sampled_from((0, 1, 2, 9, 255, 256, 257, 3000)), min_size=1, max_size=6)
SHARES = st.sampled_from((0.0, 0.02, 0.4, 1.0))
SEEDS = st.integers(0, 2**32 - 1)


def pairs(entries: Entries) -> list[tuple[int, int]]:
    """(tensor, flat index) of each entry, in order."""
    return [(j, i) for j, row in enumerate(entries.lists()) for i in row.tolist()]


def two_sets(sizes, shares, seed) -> tuple[Entries, Entries]:
    rng = np.random.default_rng(seed)
    return tuple(cases.some_entries(sizes, share, rng) for share in shares)


def test_union_against_python_sets(backend):
    @backend.examples(150, interpreted=20)
    @given(SIZES, st.tuples(SHARES, SHARES), SEEDS)
    def check(sizes, shares, seed):
        a, b = two_sets(sizes, shares, seed)
        union, pos_a, pos_b = backend.union(backend.here(padded(a)), backend.here(padded(b)))
        want = sorted(set(pairs(a)) | set(pairs(b)))
        assert pairs(union) == want
        assert union.indices.dtype == torch.int32
        place = {entry: i for i, entry in enumerate(want)}
        assert pos_a.tolist() == [place[e] for e in pairs(a)]
        assert pos_b.tolist() == [place[e] for e in pairs(b)]

    check()


def test_join_inserts_in_place_with_the_values_given_or_zeros(backend):
    @backend.examples(150, interpreted=20)
    @given(SIZES, st.tuples(SHARES, SHARES), SEEDS, st.integers(0, 5))
    def check(sizes, shares, seed, spare):
        held, new = two_sets(sizes, shares, seed)
        new = Entries.from_lists([np.setdiff1d(b, a) for a, b in zip(held.lists(), new.lists(), strict=True)])
        n, n_new = len(held.indices), len(new.indices)
        dtypes = (F32, torch.int32, F64, torch.bfloat16, torch.uint8) * 2
        states = [torch.arange(1, n + n_new + spare + 1).to(t) for t in dtypes]
        begins = [torch.arange(3, n_new + spare + 3).to(t) if i % 2 else None for i, t in enumerate(dtypes)]
        index = torch.full((n + n_new + spare,), -5, dtype=torch.int32)
        index[:n] = held.indices
        arrays = [backend.here(t.clone()) for t in (index, *states)]
        offsets, added = backend.here(held.offsets.clone()), backend.here(padded(new, spare))
        assert backend.table.join_(arrays, offsets, *added, backend.here(begins)) is None

        want = sorted(pairs(held) + pairs(new))
        place = {entry: i for i, entry in enumerate(want)}
        assert pairs(Entries(offsets, arrays[0])) == want
        for array, state, begin in zip(arrays[1:], states, begins, strict=True):
            moved = torch.zeros(len(want), dtype=state.dtype)
            moved[[place[e] for e in pairs(held)]] = state[:n]
            if begin is not None:
                moved[[place[e] for e in pairs(new)]] = begin[:n_new]
            oracle.check_bits(array[: len(want)], moved, str(state.dtype))

    check()


def test_union_and_join_of_the_largest_indices(backend):
    a = Entries.from_lists([[0, 2**16, 2**31 - 2], [2**31 - 1]])
    b = Entries.from_lists([[2**16 + 1, 2**31 - 1], [2**30]])
    union, _, pos_b = backend.union(backend.here(a), backend.here(b))
    assert pairs(union) == sorted(pairs(a) + pairs(b))
    index = backend.here(torch.cat([a.indices, b.indices]))
    offsets = backend.here(a.offsets.clone())
    backend.table.join_([index], offsets, *backend.here(b), [])
    assert pairs(Entries(offsets, index)) == pairs(union)
    assert pos_b.tolist() == [2, 4, 5]


def test_join_with_many_entries_and_threads(cpu, threads):
    sizes = (400_000, 5, 300_000)
    held, new = two_sets(sizes, (0.3, 0.01), 0)
    new = Entries.from_lists([np.setdiff1d(b, a) for a, b in zip(held.lists(), new.lists(), strict=True)])
    n, n_new = len(held.indices), len(new.indices)
    for count in (1, 2, 3):
        threads(count)
        index = torch.cat([held.indices, torch.zeros(n_new, dtype=torch.int32)])
        states = [torch.cat([torch.arange(1.0, n + 1), torch.full((n_new,), 7.0)]) for _ in range(2)]
        offsets, begin = held.offsets.clone(), -torch.arange(1.0, n_new + 1)
        cpu.table.join_([index, *states], offsets, *new, [None, begin])
        entries, at_held, at_new = cpu.union(held, new)
        oracle.check_bits(offsets, entries.offsets)
        oracle.check_bits(index, entries.indices)
        for state, joined in zip(states, (torch.zeros(n_new), begin), strict=True):
            oracle.check_bits(state[at_held], torch.arange(1.0, n + 1))
            oracle.check_bits(state[at_new], joined)


@pytest.mark.parametrize(
    "values",
    [[], [torch.ones(2), None], [torch.ones(1)], [torch.ones(2, dtype=F64)], [torch.ones(4)[::2]]],
    ids=("missing", "too many", "short", "other dtype", "strided"),
)
def test_join_refuses_values_that_do_not_fit(cpu, values):
    arrays = [torch.tensor([5, 9, 9], dtype=torch.int32), torch.tensor([1.0, 8.0, 8.0])]
    before, offsets = [a.clone() for a in arrays], torch.tensor([0, 1])
    with pytest.raises(ValueError, match="b_values"):
        cpu.table.join_(arrays, offsets, *Entries.from_lists([[2, 7]]), values)
    for array, same in zip((*arrays, offsets), (*before, torch.tensor([0, 1])), strict=True):
        oracle.check_bits(array, same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_and_scatter_move_bits(backend, dtype):
    @backend.examples(60, interpreted=4)
    @given(cases.recipes(False, writable=True, max_tensors=4), SHARES, SEEDS)
    def check(recipe, share, seed):
        rng = np.random.default_rng(seed)
        tensors = [
            cases.tensor(
                t.values[0], t.shape, dtype, "plain" if t.layouts[0] == "expanded" else t.layouts[0], rng
            )
            for t in recipe.tensors
        ]
        entries = cases.some_entries([t.numel() for t in tensors], share, rng)
        rows = [i.long() for i in entries.lists()]
        there = [backend.here(t) for t in tensors]
        values = backend.gather(there, backend.here(padded(entries)))
        oracle.check_bits(values, torch.cat([t.reshape(-1)[i] for t, i in zip(tensors, rows, strict=True)]))
        roomy = backend.table.gather(there, *backend.here(padded(entries)))
        assert roomy.shape == (len(values) + 3,)
        oracle.check_bits(roomy[: len(values)], values)

        written = torch.from_numpy(rng.standard_normal(len(entries.indices))).to(dtype)
        memory = [oracle.storage(t).clone() for t in there]
        logical = [t.clone().reshape(-1) for t in there]
        backend.scatter_(there, backend.here(padded(entries)), backend.here(written))
        for j, (t, part) in enumerate(zip(there, written.split([len(i) for i in rows]), strict=True)):
            logical[j][rows[j]] = backend.here(part)
            oracle.check_bits(t.reshape(-1), logical[j], f"tensors[{j}]")
            changed = int((oracle.bits(oracle.storage(t)) != oracle.bits(memory[j])).sum())
            assert changed <= len(rows[j]), f"tensors[{j}]: wrote beside the view"

    check()


def test_scatter_is_seen_by_autograd(backend):
    tensor = torch.nn.Parameter(backend.here(torch.zeros(3)))
    before = tensor._version
    backend.scatter_([tensor], backend.here(Entries.from_lists([[1]])), backend.here(torch.tensor([5.0])))
    assert tensor.tolist() == [0.0, 5.0, 0.0]
    assert tensor._version > before


@given(st.lists(st.sampled_from(cases.SHAPES), min_size=1, max_size=5), SHARES, SEEDS)
def test_sparse_coo_there_and_back(shapes, share, seed):
    rng = np.random.default_rng(seed)
    entries = cases.some_entries([math.prod(s) for s in shapes], share, rng)
    values = torch.from_numpy(rng.standard_normal(len(entries.indices))).float()
    sparse = to_sparse_coo(padded(entries), values, shapes)
    bounds = entries.offsets.tolist()
    for j, (t, shape) in enumerate(zip(sparse, shapes, strict=True)):
        dense = torch.zeros(math.prod(shape))
        dense[entries.of(j).long()] = values[bounds[j] : bounds[j + 1]]
        assert t.is_coalesced()
        assert torch.equal(t.to_dense(), dense.reshape(shape))
    back, same = from_sparse_coo(sparse)
    assert pairs(back) == pairs(entries)
    assert back.indices.dtype == torch.int32
    oracle.check_bits(same, values)


def test_sparse_gradient_with_repeated_indices_is_summed():
    """As torch.nn.Embedding(sparse=True) gives them."""
    repeated = torch.sparse_coo_tensor([[2, 0, 2], [1, 1, 1]], [1.0, 2.0, 4.0], (3, 2), check_invariants=True)
    entries, values = from_sparse_coo([repeated])
    assert entries.indices.tolist() == [1, 5]
    assert values.tolist() == [2.0, 5.0]


def test_entries_views():
    entries = padded(Entries.from_lists([[1, 4], [], torch.tensor([0], dtype=torch.int64)]))
    assert entries.offsets.tolist() == [0, 2, 2, 3]
    assert entries.of(0).tolist() == [1, 4]
    assert [row.tolist() for row in entries.lists()] == [[1, 4], [], [0]]
    assert entries.trimmed().indices.tolist() == [1, 4, 0]
    assert pairs(Entries.empty(2)) == []
