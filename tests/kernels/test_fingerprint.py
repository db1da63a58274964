"""The op `fingerprint` against the written formula, in Python's integers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from id3_kernels import Entries, table

MASK, INCREMENT = 2**64 - 1, 0x9E3779B97F4A7C15


def mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def written(patterns, keys, entries: Entries) -> int:
    """The formula of docs/delta-format.md."""
    owners = [key for key, row in zip(keys, entries.lists(), strict=True) for _ in row]
    triples = zip(owners, entries.indices.tolist(), patterns.tolist(), strict=True)
    return sum(mix(mix(key + i * INCREMENT & MASK) ^ (bits & MASK)) for key, i, bits in triples) & MASK


def unsigned(totals: torch.Tensor) -> list[int]:
    return [total & MASK for total in totals.tolist()]


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
def test_every_backend_has_the_written_hash(backend, dtype):
    as_float = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[dtype.itemsize]

    @backend.examples(40, interpreted=10)
    @given(st.lists(st.integers(0, 700), max_size=4), st.integers(0, 2**32 - 1))
    def check(counts, seed):
        rng = np.random.default_rng(seed)
        rows = [np.sort(rng.choice(2**31 - 1, count, replace=False)) for count in counts]
        entries = Entries.from_lists([torch.from_numpy(row) for row in rows])
        info, n = np.iinfo(str(dtype).removeprefix("torch.")), sum(counts)
        values = [torch.from_numpy(rng.integers(info.min, info.max, n, info.dtype, True)) for _ in range(2)]
        keys = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, len(counts)))
        floats = backend.here([v.view(as_float) for v in values])
        got = backend.table.fingerprint(floats, backend.here(keys), *backend.here(entries))
        assert unsigned(got) == [written(v, keys.tolist(), entries) for v in values]

    check()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_sum_depends_on_no_number_of_threads(cpu, threads):
    n = 100_000  # several grains, several slices of the reference
    entries = Entries.from_lists([range(7), range(0, 3 * n, 3), []])
    values, keys = torch.arange(n + 7.0), torch.tensor([5, -6, 7])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = table.kernels_for(values.device, "cpu").fingerprint([values], keys, *entries)
    finally:
        torch.set_num_threads(before)
    reference = table.kernels_for(values.device, "reference").fingerprint([values], keys, *entries)
    assert got.tolist() == reference.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.tensor([1])}, "keys: expected a contiguous vector of 2 Long"),
        ({"keys": torch.ones(2)}, "keys: expected a contiguous vector of 2 Long"),
        ({"values": [torch.ones(5), torch.ones(4)]}, r"values\[1\]: expected a contiguous vector of 5 Float"),
        ({"values": [torch.ones(5).byte()]}, r"values\[0\]: expected 2, 4 or 8 bytes, got Byte"),
        ({"indices": torch.arange(4, dtype=torch.int32)}, "indices: expected a contiguous vector of 5 Int"),
        ({"offsets": torch.tensor([0, 6, 5])}, "offsets: expected at least 0 and no decrease"),
    ],
)
def test_what_would_be_read_outside_memory_is_refused(cpu, change, message):
    whole = Entries.from_lists([range(2), range(3)])
    arguments = {"values": [torch.ones(5)], "keys": torch.tensor([1, 2]), **whole._asdict()} | change
    with pytest.raises(ValueError, match=message):
        torch.ops.id3.fingerprint(*arguments.values())
