import math

import cases
import numpy as np
import oracle
import pytest
import torch
from candidates import padded
from cases import F64, INF, NAN
from hypothesis import given
from hypothesis import strategies as st

from id3_kernels import Entries, reference

SEEDS = st.integers(0, 2**32 - 1)


def norm_of(backend, *tensors: torch.Tensor) -> torch.Tensor:
    """The squared norm of whole tensors."""
    entries = Entries.from_lists([range(t.numel()) for t in tensors])
    return backend.table.squared_norm(backend.here(tensors), *backend.here(padded(entries))).cpu()


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 4097, 20_000])
def test_squared_norm_against_an_exact_sum(backend, n):
    n = min(n, 4500) if backend.is_slow else n
    rng = np.random.default_rng(n)
    tensors = [torch.from_numpy(rng.standard_normal(m)).float() for m in (n, 300)] + [None]
    entries = Entries.from_lists([range(n), range(0, 300, 7), [0, 5]])
    norm = backend.table.squared_norm(backend.here(tensors), *backend.here(padded(entries)))
    assert norm.shape == ()
    assert norm.dtype == F64
    held = [*tensors[0].tolist(), *tensors[1][::7].tolist()]
    # the bound of csrc/formulas/norm.h
    assert float(norm) == pytest.approx(math.fsum(x * x for x in held), rel=len(held) * 2.0**-60 + 2.0**-51)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
def test_same_bits_as_the_reference_in_any_order_and_close_to_an_exact_sum(backend, dtype):
    if dtype == F64 and not backend.has_float64:
        pytest.skip("float64")

    @backend.examples(80, interpreted=8)
    @given(st.sampled_from(cases.VALUES), st.sampled_from((-140, -20, 0, 30, 100)), SEEDS)
    def check(kind, power, seed):
        rng = np.random.default_rng(seed)
        with np.errstate(over="ignore"):
            values = torch.from_numpy(cases.numbers(kind, 300, rng) * 2.0**power).to(dtype)
        got = norm_of(backend, values)
        order = torch.from_numpy(rng.permutation(300))
        oracle.check_bits(norm_of(backend, values[order]), got, "another order")
        oracle.check_bits(norm_of(backend, *values[order].split([7, 0, 200, 93])), got, "other groups")
        entries = Entries.from_lists([range(300)])
        oracle.check_bits(reference.squared_norm([values], *entries), got, "the reference")
        if values.isfinite().all():
            exact = math.fsum(x * x for x in values.tolist())
            assert float(got) == pytest.approx(exact, rel=2.0**-51, abs=2.0**-1073)

    check()


def test_squared_norm_of_mixed_dtypes(backend):
    tensors = [torch.tensor([3.0, 7.0], dtype=torch.bfloat16), torch.tensor([2.0, 0.5]), torch.tensor([NAN])]
    entries = Entries.from_lists([[0], [0, 1], []])
    assert float(backend.table.squared_norm(backend.here(tensors), *backend.here(entries))) == 13.25


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
@pytest.mark.parametrize(
    ("special", "result"),
    [([0.0, -0.0], 0.0), ([INF], INF), ([-INF, INF], INF), ([NAN], NAN), ([-NAN, INF], NAN), ([], 0.0)],
)
def test_special_values_show_as_in_a_sum_of_floats(backend, special, result, kind):
    if kind == F64 and not backend.has_float64:
        pytest.skip("float64")
    ones = torch.ones(5 if special and special[0] != 0 else 0, dtype=kind)
    values = torch.cat([ones, torch.tensor(special, dtype=kind), ones])
    oracle.check_bits(norm_of(backend, values), torch.tensor(result, dtype=F64))


@pytest.mark.parametrize(
    ("values", "result"),
    [
        ([1.7e308, 1.0], INF),
        ([1e200], INF),
        ([2.0**511, 2.0**511], 2.0**1023),
        ([2.0**-537], 2.0**-1074),
        ([2.0**-538], 0.0),
        ([3 * 2.0**-530, 2.0**-535], 9 * 2.0**-1060 + 2.0**-1070),
        ([5e-324], 0.0),
        ([2.0**-1022], 0.0),
    ],
)
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_squares_that_float64_cannot_hold(cpu, name, values, result):
    tensor, entries = torch.tensor(values, dtype=F64), Entries.from_lists([range(len(values))])
    table = reference if name == "reference" else cpu.table
    assert float(table.squared_norm([tensor], *entries)) == result


def test_float64_among_other_dtypes(cpu):
    tensors = [torch.tensor([3.0], dtype=torch.bfloat16), torch.tensor([1e-9, 4.0], dtype=F64)]
    entries = Entries.from_lists([[0], [0, 1]])
    norm = cpu.table.squared_norm(tensors, *entries)
    oracle.check_bits(norm, reference.squared_norm(tensors, *entries))
    assert float(norm) == 25 + 1e-9**2


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (2, 4)])
def test_squared_norm_of_a_part_of_the_tensors(backend, first, last):
    sizes = (30, 100, 4, 99) if backend.is_slow else (3000, 10_000, 4, 9000)
    rng = np.random.default_rng(1)
    tensors = [torch.from_numpy(rng.standard_normal(n)).float() for n in sizes]
    entries = cases.some_entries(sizes, 0.8, rng)
    offsets, indices = backend.here(padded(entries))
    part = backend.here(tensors[first:last])
    got = backend.table.squared_norm(part, offsets[first : last + 1], indices)
    cut = backend.here(Entries.from_lists(entries.lists()[first:last]))
    oracle.check_bits(got, backend.table.squared_norm(part, *cut))


def test_squared_norm_has_the_same_bits_for_every_thread_count_and_instruction_set(cpu, threads, simd_levels):
    rng = np.random.default_rng(0)
    tensors = [torch.from_numpy(rng.standard_normal(n) * 1e3).float() for n in (300_000, 5, 200_000)]
    entries = cases.some_entries([t.numel() for t in tensors], 0.7, rng)
    norms = {float(reference.squared_norm(tensors, *entries))}
    for _ in simd_levels():
        for run in range(7):
            threads(1 + run % 3)
            norms.add(float(cpu.table.squared_norm(tensors, *entries)))
    assert len(norms) == 1
