"""The gradient of an embedding at active entries alone: that of the reference, and of torch, to the bit."""

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import BF16, F16, F32, F64, NAN
from hypothesis import given
from hypothesis import strategies as st
from split_runs import JUNK, split

from id3_kernels import Entries, reference
from id3_kernels.reference import wide_dtype

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = [F32, BF16, F16, F64]


def embedding_of(backend, grad, ids, entries, values, add) -> torch.Tensor:
    grad, ids, values = backend.here([grad, ids, values])
    backend.table.sampled_embedding_grad_(grad, ids, *map(backend.here, entries), values, add)
    return values.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_embedding_has_the_same_bits_as_the_reference(backend, dtype):
    if dtype == F64 and not backend.has_float64:
        pytest.skip("float64")
    kinds, layouts = st.sampled_from(cases.VALUES), st.sampled_from(cases.LAYOUTS)

    @backend.examples(80, interpreted=5)
    @given(
        st.sampled_from([0, 1, 40, 300]), st.sampled_from([1, 5, 60]), kinds, layouts, st.booleans(), SEEDS
    )
    def check(tokens, rows, kind, layout, add, seed):
        rng = np.random.default_rng(seed)
        grad = cases.tensor(kind, (tokens, 6), dtype, layout, rng)
        ids = torch.from_numpy(np.minimum(rng.geometric(0.1, tokens) - 2, rows + 1))
        entries = cases.some_entries([rows * 6], 0.4, rng)
        values = torch.from_numpy(rng.standard_normal(entries.indices.numel())).to(wide_dtype(dtype))
        runs = split(entries, int(rng.integers(1, 4)), rng)
        got = embedding_of(backend, grad, ids, runs[:2], runs.spread(values, JUNK), add)
        reference.sampled_embedding_grad_(grad, ids, *entries, values, add)
        oracle.check_bits(got[runs.at], values)
        assert got[runs.between()].eq(JUNK).all()

    check()


def test_an_embedding_has_the_bits_of_the_dense_gradient(backend):
    """Of torch on the CPU in float32, with a padding token left out by an id of -1."""
    torch.manual_seed(1)
    embedding, ids = torch.nn.Embedding(30, 6, padding_idx=4), torch.randint(0, 30, (500,))
    grad = torch.randn(500, 6)
    embedding(ids).backward(grad)
    entries = cases.some_entries([180], 0.5, np.random.default_rng(11))
    values = torch.full(entries.indices.shape, NAN)
    got = embedding_of(backend, grad, ids.masked_fill(ids == 4, -1), entries, values, False)
    oracle.check_bits(got, embedding.weight.grad.reshape(-1)[entries.indices.long()])


def test_ids_of_any_number_leave_their_tokens_out(backend):
    ids = torch.tensor([-(2**62), 2**62, 2**31, 3, -1, 2**32 + 1, 1])
    entries, values = Entries.from_lists([[0, 1, 2, 3]]), torch.zeros(4)
    got = embedding_of(backend, torch.arange(1.0, 8).reshape(7, 1), ids, entries, values, False)
    assert got.tolist() == [0, 7, 0, 4]


@pytest.mark.parametrize("count", [1, 3])
def test_an_embedding_has_the_same_bits_for_every_thread_count(cpu, threads, count):
    rng = np.random.default_rng(12)
    grad, ids = torch.randn(400, 64), torch.from_numpy(rng.integers(0, 200, 400))
    entries = cases.some_entries([200 * 64], 0.6, rng)
    want, values = (torch.zeros(entries.indices.numel()) for _ in range(2))
    reference.sampled_embedding_grad_(grad, ids, *entries, want, False)
    threads(count)
    oracle.check_bits(embedding_of(cpu, grad, ids, entries, values, False), want)
