"""The CUDA kernels themselves, compiled by the host compiler and run thread by thread: no GPU is needed.

`emulated_cuda/cuda_runtime.h` stands in for CUDA. Each case runs with the threads and blocks in both orders,
so that a missing barrier shows. What only a GPU can tell (speed, faults of memory order between blocks) is
not tested here.
"""

import ctypes
import shutil
import subprocess
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

from id3_kernels import Entries, reference

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


class Row(ctypes.Structure):
    _fields_ = [("param", c_void_p), ("grad", c_void_p), ("param_dtype", c_int32), ("grad_dtype", c_int32)]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    out = tmp_path_factory.mktemp("emulated") / "emulated.so"
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), HERE / "emulated_cuda/harness.cpp"]
    flags = ["-O1", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"]
    includes = [f"-I{HERE / 'emulated_cuda'}", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, *includes, "-x", "c++", *map(str, sources), "-o", str(out)], check=True)
    loaded = ctypes.CDLL(str(out))
    loaded.cut_into_chunks_emulated.restype = loaded.blocks_for_emulated.restype = c_int64
    loaded.squared_norm_emulated.restype = c_double
    return loaded


@pytest.fixture(params=["forward", "reverse"])
def lib(library, request):
    library.set_reverse(request.param == "reverse")
    return library


def address(tensor):
    return None if tensor is None else c_void_p(tensor.data_ptr())


def rows(params, grads):
    table = (Row * len(params))()
    for j, (p, g) in enumerate(zip(params, grads, strict=True)):
        row = [None if t is None else t.data_ptr() for t in (p, g)]
        table[j] = Row(*row, *(0 if t is None else DTYPES.index(t.dtype) for t in (p, g)))
    return table


class Made:
    """Tensors with heavy tails, from a seed; misaligned ones begin in the middle of a 16-byte word."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def tensor(self, numel, dtype, aligned=True, ties=False):
        x = torch.randn(numel + 1, generator=self.generator) ** 3
        x = ((x * 2).round() / 2 if ties else x).to(dtype)
        return x[:numel] if aligned else x[1:]

    def entries(self, sizes, share):
        picked = [torch.randperm(n, generator=self.generator)[: int(n * share)] for n in sizes]
        return Entries.from_lists([p.sort().values.int() for p in picked], torch.device("cpu"))


def select(lib, params, grads, active, k, eps, exp, given=False):
    sizes = torch.tensor([p.numel() for p in params])
    offsets = torch.full((len(params) + 1,), -7)
    indices, scores = torch.full((k,), -7, dtype=torch.int32), torch.full((k,), float("nan"))
    few = lib.select_topk_emulated(
        rows(params, grads), address(sizes), len(params), address(active.offsets), address(active.indices),
        c_int64(k), c_int64(k), c_float(eps), c_double(exp), int(given),
        address(offsets), address(indices), address(scores),
    )  # fmt: skip
    assert few >= 0, "the workspace is not as the next call expects it"
    return few, offsets, indices, scores


def assert_selects_as_reference(lib, params, grads, active, k, eps=1.0, exp=1.0):
    few, offsets, indices, scores = select(lib, params, grads, active, k, eps, exp)
    expected = reference.select_topk(params, grads, *active, k, eps, exp)
    for got, wanted in zip((offsets, indices, scores), expected, strict=True):
        assert torch.equal(got, wanted)
    return few


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exp", [1.0, 2.0, 0.0, 0.5, -0.5, -1.0, -2.0])
def test_selection_by_tile_maxima(lib, dtype, exp):
    made = Made(1)
    sizes = [50000, 1, 0, 20007]
    params, grads = ([made.tensor(n, dtype) for n in sizes] for _ in range(2))
    assert assert_selects_as_reference(lib, params, grads, made.entries(sizes, 0.02), 5, exp=exp) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [100, 3000, 8000])
def test_selection_of_many(lib, dtype, k):
    made = Made(2)
    sizes = [5000, 300, 2500]
    params, grads = ([made.tensor(n, dtype) for n in sizes] for _ in range(2))
    assert assert_selects_as_reference(lib, params, grads, made.entries(sizes, 0.1), k) == 0


@pytest.mark.parametrize("k", [1, 4, 700])
def test_ties_go_to_the_lowest(lib, k):
    made = Made(3)
    sizes = [70000, 40000]
    params = [torch.zeros(n) for n in sizes]
    grads = [made.tensor(n, torch.float32, ties=True).clamp(-1, 1) for n in sizes]
    assert_selects_as_reference(lib, params, grads, made.entries(sizes, 0.01), k)
    assert_selects_as_reference(lib, params, [torch.ones(n) for n in sizes], made.entries(sizes, 0.5), k)


@pytest.mark.parametrize("k", [3, 400])
def test_misaligned_missing_mixed_and_special(lib, k):
    made = Made(4)
    sizes = [40000, 9000, 17000, 20000]
    bf16 = torch.bfloat16
    params = [
        made.tensor(n, d, aligned=j % 2 == 0) for j, (n, d) in enumerate(zip(sizes, [bf16] * 4, strict=True))
    ]
    grads = [
        made.tensor(40000, torch.float32),
        None,
        made.tensor(17000, bf16, False),
        made.tensor(20000, bf16),
    ]
    grads[3][:9] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0, -0.0, 1e-40, 3e38, 1, 2])
    assert_selects_as_reference(lib, params, grads, made.entries(sizes, 0.05), k)
    assert_selects_as_reference(lib, params, [None] * 4, made.entries(sizes, 0.05), k)
    assert_selects_as_reference(lib, params, [torch.zeros(n) for n in sizes], made.entries(sizes, 0.05), k)


def test_fewer_than_k_qualify(lib):
    params, grads = [torch.ones(40000)], [torch.zeros(40000)]
    grads[0][[5, 17, 39999]] = torch.tensor([1.0, -3.0, 2.0])
    active = Entries(torch.tensor([0, 1]), torch.tensor([17], dtype=torch.int32))
    assert_selects_as_reference(lib, params, grads, active, 2)
    assert_selects_as_reference(lib, params, grads, active, 300)


def test_given_scores(lib):
    made = Made(5)
    scores = [made.tensor(n, torch.float32) for n in (30000, 800)]
    active = made.entries([30000, 800], 0.02)
    for k in (2, 500):
        _, *got = select(lib, scores, scores, active, k, 0, 0, given=True)
        for mine, wanted in zip(got, reference.select_topk_by_score(scores, *active, k), strict=True):
            assert torch.equal(mine, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores(lib, dtype):
    made = Made(6)
    for exp in (0.0, 1.0, 2.0, 0.7, -0.5):
        param, grad = made.tensor(3000, dtype), made.tensor(3000, dtype)
        out = torch.full((3000,), float("nan"))
        lib.d3_score_emulated(rows([param], [grad]), c_int64(3000), c_float(0.5), c_double(exp), address(out))
        wanted = reference.d3_score(param, grad, 0.5, exp)
        assert torch.equal(out, wanted) if exp != 0.7 else torch.allclose(out, wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_gather_and_scatter(lib, dtype):
    made = Made(7)
    sizes = [300, 1, 0, 5000]
    tensors, entries = [made.tensor(n, dtype) for n in sizes], made.entries(sizes, 0.3)
    n = entries.indices.numel()
    table = (Row * 4)(*(Row(t.data_ptr(), None, 0, 0) for t in tensors))
    values = torch.zeros(n, dtype=dtype)
    shared = [table, 4, address(entries.offsets), address(entries.indices), c_int64(n), dtype.itemsize]
    lib.gather_emulated(*shared, address(values))
    assert torch.equal(values, reference.gather(tensors, *entries))
    expected = [t.clone() for t in tensors]
    values *= 2
    lib.scatter_emulated(*shared, address(values))
    reference.scatter_(expected, *entries, values)
    assert all(map(torch.equal, tensors, expected))


def test_squared_norm(lib):
    made = Made(8)
    sizes = [9000, 70, 5000]
    grads = [made.tensor(9000, torch.bfloat16), None, made.tensor(5000, torch.float32)]
    entries = made.entries(sizes, 0.9)
    got = lib.squared_norm_emulated(
        rows([None] * 3, grads), 3, address(entries.offsets), address(entries.indices),
        c_int64(entries.indices.numel()),
    )  # fmt: skip
    assert got == pytest.approx(reference.squared_norm(grads, *entries).item(), rel=1e-12)


def test_join(lib):
    made = Made(9)
    sizes = [400, 0, 3000, 50]
    both = made.entries(sizes, 0.4).lists()
    first = [row[torch.rand(row.numel(), generator=made.generator) < 0.6] for row in both]
    new = [row[~torch.isin(row, held)] for row, held in zip(both, first, strict=True)]
    held, new = (Entries.from_lists(part, torch.device("cpu")) for part in (first, new))
    n, n_new = held.indices.numel(), new.indices.numel()

    def arrays():
        made.generator.manual_seed(0)
        made_arrays = [held.indices, made.tensor(n, torch.float32), made.tensor(n, torch.bfloat16)]
        made_arrays.append(made.tensor(n, torch.float64))
        return [torch.cat([a, a.new_full((n_new + 5,), 77)]) for a in made_arrays]

    mine, wanted = arrays(), arrays()
    my_offsets, wanted_offsets = held.offsets.clone(), held.offsets.clone()
    expected = reference.join_(wanted, wanted_offsets, *new)
    positions = torch.full((n_new,), -7)
    pointers = (c_void_p * 4)(*(a.data_ptr() for a in mine))
    widths = (c_int32 * 4)(*(a.element_size() for a in mine))
    lib.join_emulated(
        pointers, widths, 4, c_int64(mine[0].numel()), address(my_offsets), 4, address(new.offsets),
        address(new.indices), c_int64(n_new), address(positions),
    )  # fmt: skip
    assert torch.equal(positions, expected) and torch.equal(my_offsets, wanted_offsets)
    assert all(map(torch.equal, mine, wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["plain", "age", "compact", "scaled", "overflow"])
def test_adamw(lib, dtype, case):
    made = Made(10)
    sizes = [900, 5, 4000]
    params, grads = ([made.tensor(n, dtype) for n in sizes] for _ in range(2))
    grads[1] = None if case != "compact" else grads[1]
    entries = made.entries(sizes, 0.3)
    n = entries.indices.numel()
    state = [made.tensor(n, torch.float32) * 0.1, made.tensor(n, torch.float32).square()]
    master = None
    if dtype != torch.float32:
        master = reference.gather(params, *entries).float() * (1 + 1e-4)
        master[::7] = 3.0  # no longer what the parameter is the rounding of
    age = torch.randint(0, 50, (n,), generator=made.generator, dtype=torch.int32) if case == "age" else None
    values = made.tensor(n, torch.float32) if case == "compact" else None
    step = torch.tensor([3, 1, 400])
    scaled = case in ("scaled", "overflow")
    scalars = [torch.tensor(1024.0), torch.tensor(float(case == "overflow")), torch.tensor(0.3)]
    scalars = scalars if scaled else [None] * 3
    numbers = (1e-2, 0.9, 0.99, 1e-8, 0.1)

    def copies():
        return [
            [t.clone() for t in params],
            *(None if t is None else t.clone() for t in (*state, master, age)),
        ]

    mine, wanted = copies(), copies()
    lib.adamw_emulated(
        rows(mine[0], grads), 3, address(entries.offsets), address(entries.indices), c_int64(n),
        address(values), 0, *map(address, mine[1:]), address(step), *map(c_double, numbers), int(scaled),
        *map(address, scalars),
    )  # fmt: skip
    run, source = (reference.adamw_, grads) if values is None else (reference.adamw_compact_, values)
    run(wanted[0], source, *entries, *wanted[1:], step, *numbers, scaled, *scalars)
    assert all(map(torch.equal, mine[0], wanted[0]))
    for a, b in zip(mine[1:], wanted[1:], strict=True):
        assert a is None or torch.equal(a, b)
    changed = any(not torch.equal(a, b) for a, b in zip(mine[0], params, strict=True))
    assert changed == (case != "overflow")


# --- index arithmetic of the host ---------------------------------------------------------------------


def chunks_of(lib, numels):
    sizes, length = torch.tensor(numels), c_int32()
    count = lib.cut_into_chunks_emulated(address(sizes), len(numels), None, ctypes.byref(length))
    table = torch.zeros(count, 3, dtype=torch.int64)
    lib.cut_into_chunks_emulated(address(sizes), len(numels), address(table), ctypes.byref(length))
    return table, length.value


def test_chunks_cover_every_entry_once(library):
    numels = [1, 0, 8192, 8193, 100000]
    table, length = chunks_of(library, numels)
    assert length == 8192
    for tensor, numel in enumerate(numels):
        mine = table[table[:, 1] == tensor]
        assert mine[:, 2].sum() == numel
        assert torch.equal(mine[:, 0], torch.arange(0, numel, length))
        assert (mine[:-1, 2] == length).all()


def test_chunks_of_more_than_2_to_the_33_entries(library):
    numels = [2**31 - 1] * 5
    table, length = chunks_of(library, numels)
    assert length == 16384
    assert table[:, 2].sum() == sum(numels) > 2**33
    assert len(table) * length < 2**63 and len(table) * length // 256 < 2**31  # slots, and tiles as int32
    assert (table[:, 0] + table[:, 2]).max() == 2**31 - 1


def test_blocks_never_overflow_a_grid(library):
    for items, blocks in ((0, 1), (1, 1), (256, 1), (257, 2), (2**40, 132 * 8)):
        assert library.blocks_for_emulated(c_int64(items), 256) == blocks
