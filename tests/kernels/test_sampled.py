"""Weight gradients at active entries alone: the order of their sums, and that nothing else counts."""

from typing import NamedTuple

import cases
import numpy as np
import oracle
import pytest
import torch
from cases import BF16, F16, F32, F64, INF, NAN
from hypothesis import given
from hypothesis import strategies as st
from split_runs import JUNK, split

from id3_kernels import Entries, reference
from id3_kernels.reference import wide_dtype

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = [F32, BF16, F16, F64]
TOKENS = [0, 1, 7, 32, 33, 127, 128, 129, 300]


class Layer(NamedTuple):
    """Two factors, and some entries of the weight."""

    left: torch.Tensor
    right: torch.Tensor
    entries: Entries

    @property
    def shape(self):
        return self.left.shape[1], self.right.shape[1]

    def values(self, rng) -> torch.Tensor:
        old = rng.standard_normal(self.entries.indices.numel())
        return torch.from_numpy(old).to(wide_dtype(self.left.dtype))


def layer(rng, tokens=40, rows=9, columns=14, dtype=F32, share=0.3, kind="normal", layout="plain") -> Layer:
    left, right = (cases.tensor(kind, (tokens, n), dtype, layout, rng) for n in (rows, columns))
    return Layer(left, right, cases.some_entries([rows * columns], share, rng))


def spelled_out(one: Layer) -> torch.Tensor:
    """The five steps of csrc/formulas/sampled.h, one token after the other."""
    rows, columns = one.shape
    index = one.entries.indices.numpy().astype(np.int64)
    left = oracle.array(one.left).reshape(-1, rows)[:, index // columns]
    right = oracle.array(one.right).reshape(-1, columns)[:, index % columns]
    blocks = []
    for begin in range(0, max(len(left), 1), 128):
        lanes = [None] * 32
        for t in range(begin, begin + 128):
            none = np.zeros(len(index), left.dtype)
            product = left[t] * right[t] if t < len(left) else none
            lanes[t % 32] = product if lanes[t % 32] is None else lanes[t % 32] + product
        sums = [lanes[2 * j] + lanes[2 * j + 1] for j in range(16)]
        for apart in (8, 4, 2, 1):
            sums = [sums[j] + sums[j + apart] for j in range(apart)]
        blocks.append(sums[0])
    total = blocks[0]
    for block in blocks[1:]:
        total = total + block
    return torch.from_numpy(total)


def grad_of(backend, one: Layer, entries=None, values=None, add=False) -> torch.Tensor:
    """The op on `entries`, by default those of the layer, in new values unless some are given."""
    entries = one.entries if entries is None else entries
    if values is None:
        values = torch.full(entries[1].shape, NAN, dtype=wide_dtype(one.left.dtype))
    left, right, values = backend.here([one.left, one.right, values])
    backend.table.sampled_weight_grad_(left, right, *map(backend.here, entries), values, add)
    return values.cpu()


def usable(backend, dtype) -> None:
    if dtype == F64 and not backend.has_float64:
        pytest.skip("float64")


# --- the order of the sums ------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_summed_in_the_order_that_is_spelled_out(backend, dtype, tokens):
    usable(backend, dtype)
    one = layer(np.random.default_rng(tokens), tokens, dtype=dtype)
    oracle.check_bits(grad_of(backend, one), spelled_out(one))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_as_the_reference_in_any_layout_and_runs(backend, dtype):
    usable(backend, dtype)
    sizes, kinds = st.sampled_from([1, 2, 7, 8, 9, 17, 70]), st.sampled_from(cases.VALUES)

    @backend.examples(80, interpreted=5)
    @given(st.sampled_from(TOKENS), sizes, sizes, kinds, st.sampled_from(cases.LAYOUTS), st.booleans(), SEEDS)
    def check(tokens, rows, columns, kind, layout, add, seed):
        rng = np.random.default_rng(seed)
        one = layer(rng, tokens, rows, columns, dtype, rng.choice([0, 0.02, 0.3, 1]), kind, layout)
        values, runs = one.values(rng), split(one.entries, int(rng.integers(1, 4)), rng)
        got = grad_of(backend, one, runs[:2], runs.spread(values, JUNK), add)
        reference.sampled_weight_grad_(one.left, one.right, *one.entries, values, add)
        oracle.check_bits(got[runs.at], values)
        assert got[runs.between()].eq(JUNK).all()

    check()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_entry_does_not_depend_on_the_others_nor_on_copied_columns(backend, dtype):
    rng = np.random.default_rng(3)
    one = layer(rng, 200, 40, 50, dtype)
    want, index = grad_of(backend, one), one.entries.indices.long()
    few = torch.arange(0, len(index), 7)
    oracle.check_bits(grad_of(backend, one, Entries.from_lists([index[few]])), want[few], "fewer entries")
    needed, place = (index[few] % 50).unique(return_inverse=True)
    copied = Layer(one.left, one.right[:, needed], one.entries)
    renumbered = Entries.from_lists([index[few] // 50 * len(needed) + place])
    oracle.check_bits(grad_of(backend, copied, renumbered), want[few], "copied columns")


def test_a_transposed_weight_has_the_same_bits_with_the_factors_exchanged(backend):
    one = layer(np.random.default_rng(4), 150, 12, 30)
    row, column = one.entries.indices.long() // 30, one.entries.indices.long() % 30
    transposed, order = (column * 12 + row).sort()
    exchanged = Layer(one.right, one.left, Entries.from_lists([transposed]))
    oracle.check_bits(grad_of(backend, exchanged), grad_of(backend, one)[order])


def test_batches_add_up_one_after_the_other(backend):
    rng = np.random.default_rng(5)
    batches = [layer(rng, tokens) for tokens in (20, 170, 0)]
    batches = [b._replace(entries=batches[0].entries) for b in batches]
    total = batches[0].values(rng)
    want = total.clone()
    for batch in batches:
        total = grad_of(backend, batch, values=total, add=True)
        want = want + grad_of(backend, batch)
    oracle.check_bits(total, want)


@pytest.mark.parametrize("tokens", [60, 128, 130, 2000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_every_thread_count_and_instruction_set(cpu, threads, simd_levels, dtype, tokens):
    rng = np.random.default_rng(6)
    one = layer(rng, tokens, 300, 290, dtype, 0.05)
    runs, values = split(one.entries, 2, rng), one.values(rng)
    want = values.clone()
    reference.sampled_weight_grad_(one.left, one.right, *one.entries, want, True)
    for level in simd_levels():
        for count in (1, 2, 3, 5):
            threads(count)
            got = grad_of(cpu, one, runs[:2], runs.spread(values, JUNK), True)
            oracle.check_bits(got[runs.at], want, f"{level}, {count} threads")


def test_large_weights_with_few_hot_rows_and_columns(cpu):
    rng = np.random.default_rng(7)
    one = layer(rng, 140, 1030, 1500, BF16, 0)
    hot = np.concatenate([np.arange(1500) + 700 * 1500, np.arange(1030) * 1500 + 1499])
    one = one._replace(entries=Entries.from_lists([np.unique(hot)]))
    want = torch.empty(one.entries.indices.numel())
    reference.sampled_weight_grad_(one.left, one.right, *one.entries, want, False)
    oracle.check_bits(grad_of(cpu, one), want)


# --- accuracy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [128, 2048])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_error_is_within_the_bound_and_that_of_the_dense_product(cpu, dtype, tokens):
    rng = np.random.default_rng(8)
    one = layer(rng, tokens, 64, 64, dtype, 1.0)
    exact = one.left.double().t() @ one.right.double()
    size = one.left.double().abs().t() @ one.right.double().abs()
    error = (grad_of(cpu, one).double() - exact.reshape(-1)).abs()
    # the bound of csrc/formulas/sampled.h
    assert (error <= (8 + tokens / 128) * 2.0**-24 * size.reshape(-1)).all()
    dense = (one.left.t() @ one.right).double() - exact
    assert error.square().mean().sqrt() <= 1.5 * dense.square().mean().sqrt()


def test_a_linear_layer_has_the_gradient_of_autograd(backend):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(14, 9), torch.randn(3, 20, 14)
    linear(x).sin().sum().backward()
    grad = linear(x).detach().cos()
    one = layer(np.random.default_rng(9))._replace(left=grad.reshape(-1, 9), right=x.reshape(-1, 14))
    want = linear.weight.grad.reshape(-1)[one.entries.indices.long()]
    # both are sums of 60 products in float32, in different orders
    torch.testing.assert_close(grad_of(backend, one), want, rtol=1e-5, atol=1e-5)


def test_infinities_and_nan_stay_in_their_rows_and_columns(backend):
    one = layer(np.random.default_rng(10), 5, 8, 8, share=1.0)
    one.left[2, 3], one.right[4, 6], one.right[4, 7] = NAN, INF, 0.0
    grad = grad_of(backend, one).view(8, 8)
    assert grad[3].isnan().all()
    finite = grad.isfinite()
    assert not finite[:, 6].any()
    assert finite[[0, 1, 2, 4, 5, 6, 7]][:, [0, 1, 2, 3, 4, 5, 7]].all()


def test_programs_beyond_the_last_entry_of_a_run_look_at_no_token(monkeypatch):
    """A launch has programs for every index that the arrays hold; a run may hold few of them."""
    sampled = pytest.importorskip("id3_kernels.triton.sampled", reason="triton is not installed")
    if not sampled.launch.INTERPRETED:
        pytest.skip("counts in Triton's interpreter")
    blocks, fold_lanes = [], sampled.summed_lanes
    rng = np.random.default_rng(0)

    def counted(lanes, BLOCK):
        blocks.append(1)
        return fold_lanes(lanes, BLOCK)

    monkeypatch.setattr(sampled, "summed_lanes", counted)
    left, right = (torch.from_numpy(rng.standard_normal((300, 16)).astype(np.float32)) for _ in range(2))
    indices, values = torch.arange(256, dtype=torch.int32), torch.full((256,), NAN)
    sampled.sampled_weight_grad_(left, right, torch.tensor([0, 33]), indices, values, False)
    assert len(blocks) == 2 * 3  # two programs of 32 entries, three blocks of 128 tokens
    assert values.isfinite().tolist() == [True] * 33 + [False] * 223
