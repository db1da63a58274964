"""The CUDA kernels on the host with their threads and blocks in both orders, so that a missing barrier shows.

The conformance tests run them too, as the backend `cuda`. What only a GPU can tell (speed, faults of memory
order between blocks) is tested nowhere without one.
"""

import ctypes
import importlib
import shutil
from ctypes import c_int32, c_int64

import emulated
import pytest
import torch

from id3_kernels import Entries, reference
from id3_kernels.entries import TILE
from id3_optim import ID3AdamW

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(params=["forward", "reverse"])
def order(request):
    """The order in which threads and blocks run."""
    emulated.library().set_reverse(request.param == "reverse")
    yield
    emulated.library().set_reverse(False)


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


def assert_selects_as_reference(params, grads, active, k, eps=1.0, exp=1.0, capacity=None):
    """Also gives the form of the selection."""
    wanted = torch.tensor([k]), k if capacity is None else capacity
    got, form = emulated.select(params, grads, *active, *wanted, eps, exp, False)
    assert all(map(torch.equal, got, reference.select_topk(params, grads, *active, *wanted, eps, exp)))
    return form


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exp", [1.0, 2.0, 0.0, 0.5, -0.5, -1.0, -2.0])
def test_selection_by_tile_maxima(order, dtype, exp):
    made = Made(1)
    sizes = [50000, 1, 0, 20007]
    params, grads = ([made.tensor(n, dtype) for n in sizes] for _ in range(2))
    form = assert_selects_as_reference(params, grads, made.entries(sizes, 0.02), 5, exp=exp)
    assert form == "stored"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [100, 3000, 8000])
def test_selection_of_many(order, dtype, k):
    made = Made(2)
    sizes = [5000, 300, 2500]
    params, grads = ([made.tensor(n, dtype) for n in sizes] for _ in range(2))
    assert assert_selects_as_reference(params, grads, made.entries(sizes, 0.1), k) == "all"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [6, 40, 80])
def test_selection_by_listed_tiles_that_are_scored_again(order, dtype, k):
    """Up to a quarter of the tiles: no pass but the first reads all entries."""
    made = Made(2)
    sizes = [50000, 1, 0, 20007]
    params, grads = ([made.tensor(n, dtype) for n in sizes] for _ in range(2))
    active = made.entries(sizes, 0.02)
    assert assert_selects_as_reference(params, grads, active, k) == "listed"
    assert assert_selects_as_reference(params, grads, active, k - 3, exp=0.0, capacity=k) == "listed"
    few = [torch.where(torch.arange(n) % 9000 == 5, g, 0) for n, g in zip(sizes, grads, strict=True)]
    assert assert_selects_as_reference(params, few, active, k) == "listed"


@pytest.mark.parametrize("k", [1, 4, 40, 700])
def test_ties_go_to_the_lowest(order, k):
    made = Made(3)
    sizes = [70000, 40000]
    params = [torch.zeros(n) for n in sizes]
    grads = [made.tensor(n, torch.float32, ties=True).clamp(-1, 1) for n in sizes]
    assert_selects_as_reference(params, grads, made.entries(sizes, 0.01), k)
    assert_selects_as_reference(params, [torch.ones(n) for n in sizes], made.entries(sizes, 0.5), k)


@pytest.mark.parametrize("k", [3, 400])
def test_misaligned_missing_mixed_and_special(order, k):
    made = Made(4)
    sizes, bf16 = [40000, 9000, 17000, 20000], torch.bfloat16
    params = [made.tensor(n, bf16, aligned=j % 2 == 0) for j, n in enumerate(sizes)]
    grads = [made.tensor(40000, torch.float32), None, made.tensor(17000, bf16, False)]
    grads.append(made.tensor(20000, bf16))
    grads[3][:9] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0, -0.0, 1e-40, 3e38, 1, 2])
    assert_selects_as_reference(params, grads, made.entries(sizes, 0.05), k)
    assert_selects_as_reference(params, [None] * 4, made.entries(sizes, 0.05), k)
    assert_selects_as_reference(params, [torch.zeros(n) for n in sizes], made.entries(sizes, 0.05), k)


def test_fewer_than_k_qualify(order):
    params, grads = [torch.ones(40000)], [torch.zeros(40000)]
    grads[0][[5, 17, 39999]] = torch.tensor([1.0, -3.0, 2.0])
    active = Entries(torch.tensor([0, 1]), torch.tensor([17], dtype=torch.int32))
    assert_selects_as_reference(params, grads, active, 2)
    assert_selects_as_reference(params, grads, active, 300)


@pytest.mark.parametrize("k", [-3, 0, 2, 9, 1000])
@pytest.mark.parametrize("capacity", [4, 300])
def test_k_lies_on_the_device_and_active_entries_anywhere(order, k, capacity):
    made = Made(5)
    sizes = [300, 40000, 0, 20007, 60000]
    params, grads = ([made.tensor(n, torch.bfloat16) for n in sizes] for _ in range(2))
    offsets, indices = made.entries(sizes, 0.02)
    for part in (slice(0, 5), slice(1, 5), slice(3, 5)):
        active = offsets[part.start : part.stop + 1], indices
        form = assert_selects_as_reference(params[part], grads[part], active, k, capacity=capacity)
        assert form == ("stored" if capacity == 4 else "all")


def test_nothing_of_the_tensors_is_read_where_nobody_is_wanted(order):
    active = Entries(torch.tensor([0, 0]), torch.empty(0, dtype=torch.int32))
    unread = emulated.unreadable(40000)
    for k in (0, -1):
        for capacity in (2, 300):
            wanted = torch.tensor([k]), capacity
            (offsets, _, scores), _ = emulated.select([unread], [unread], *active, *wanted, 1.0, 1.0, False)
            assert offsets.tolist() == [0, 0]
            assert not scores.any()


@pytest.mark.parametrize("k", [2, 300])
def test_active_entries_of_a_tensor_without_scores_hide_nothing_of_others(order, k):
    made = Made(6)
    scores = [made.tensor(20000, torch.float32).abs(), None, made.tensor(9000, torch.float32).abs()]
    active = made.entries([20000, 50000, 9000], 0.3)
    got, _ = emulated.select([], scores, *active, torch.tensor([k]), k, 0, 0, True)
    assert all(map(torch.equal, got, reference.select_topk_by_score(scores, *active, torch.tensor([k]), k)))


# --- join ---------------------------------------------------------------------------------------------


def a_join(spare):
    """Arrays with room for `spare` more than all entries, offsets, new entries and what they begin with."""
    made = Made(9)
    sizes = [400, 0, 3000, 50]
    both = made.entries(sizes, 0.4).lists()
    first = [row[torch.rand(row.numel(), generator=made.generator) < 0.6] for row in both]
    new = [row[~torch.isin(row, held)] for row, held in zip(both, first, strict=True)]
    held, new = (Entries.from_lists(part, torch.device("cpu")) for part in (first, new))
    n, n_new = held.indices.numel(), new.indices.numel()
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float32)
    arrays = [held.indices, *(made.tensor(n, d) for d in dtypes)]
    arrays = [torch.cat([a, a.new_full((n_new + spare,), 77)]) for a in arrays]
    return arrays, held.offsets, new, [made.tensor(n_new, d) for d in dtypes[:3]] + [None]


def test_join(order):
    arrays, offsets, new, values = a_join(5)
    wanted, wanted_offsets = [a.clone() for a in arrays], offsets.clone()
    emulated.join_(arrays, offsets, *new, values)
    reference.join_(wanted, wanted_offsets, *new, values)
    assert torch.equal(offsets, wanted_offsets)
    assert all(map(torch.equal, arrays, wanted))


def test_join_without_room_or_without_entries_changes_nothing(order):
    arrays, offsets, new, values = a_join(-1)
    before, before_offsets = [a.clone() for a in arrays], offsets.clone()
    emulated.join_(arrays, offsets, *new, values)
    arrays[2] = arrays[2][:-3]  # one array is shorter than the others
    emulated.join_(arrays, offsets, *new, values)
    emulated.join_(arrays, offsets, torch.zeros_like(offsets), new.indices, values)
    assert torch.equal(offsets, before_offsets)
    assert all(torch.equal(a, b[: a.numel()]) for a, b in zip(arrays, before, strict=True))


# --- sampled gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 5, 128, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sampled_gradients(order, dtype, tokens):
    made = Made(10)
    left, right = (made.tensor(tokens * n, dtype).view(tokens, n) for n in (70, 33))
    ids, active = torch.arange(tokens) % 9 * 8, made.entries([70 * 33], 0.1)
    for op, factors in (("sampled_weight_grad_", (left, right)), ("sampled_embedding_grad_", (right, ids))):
        got, wanted = (torch.ones(active.indices.shape) for _ in range(2))
        getattr(emulated, op)(*factors, *active, got, True)
        getattr(reference, op)(*factors, *active, wanted, True)
        assert torch.equal(got, wanted), op


# --- index arithmetic of the host ---------------------------------------------------------------------


def chunks_of(numels, active=None):
    library, length = emulated.library(), c_int32()
    rows = (emulated.Row * len(numels))(*(emulated.Row(numel=n) for n in numels))
    active = active or Entries.empty(len(numels))  # named: the addresses below do not keep it
    addresses = emulated.entries(*active)[:3]
    count = library.chunks_emulated(rows, *addresses, None, ctypes.byref(length))
    table = torch.zeros(count, 5, dtype=torch.int64)
    library.chunks_emulated(rows, *addresses, emulated.address(table), ctypes.byref(length))
    return table, length.value


def test_chunks_cover_every_entry_once():
    numels = [1, 0, 8192, 8193, 100000]
    table, length = chunks_of(numels)
    assert length == 8192
    for tensor, numel in enumerate(numels):
        mine = table[table[:, 1] == tensor]
        assert mine[:, 2].sum() == numel
        assert torch.equal(mine[:, 0], torch.arange(0, numel, length))
        assert (mine[:-1, 2] == length).all()
    assert torch.equal(table[:, 1], table[:, 1].sort().values)


def test_chunks_know_their_active_entries():
    numels = [1, 0, 8192, 8193, 100000, 0]
    offsets, indices = Made(7).entries([1, 500, 8192, 8193, 100000, 70], 0.1)
    table, _ = chunks_of(numels, (offsets, indices))
    for offset, tensor, length, begin, end in table.tolist():
        first, last = offsets[tensor : tensor + 2].tolist()
        inside = [i for i in range(first, last) if offset <= indices[i] < offset + length]
        assert inside == list(range(begin, end))


def test_chunks_of_more_than_2_to_the_33_entries():
    numels = [2**31 - 1] * 5
    table, length = chunks_of(numels)
    assert length == 16384
    assert table[:, 2].sum() == sum(numels) > 2**33
    assert len(table) * length < 2**63 and len(table) * length // 256 < 2**31  # slots, and tiles as int32
    assert (table[:, 0] + table[:, 2]).max() == 2**31 - 1


def test_tiles_are_those_of_the_other_backends(cpu):
    native = importlib.import_module("id3_kernels._C")
    assert emulated.library().tile_emulated() == native.build_info()["tile"] == TILE


def test_blocks_never_overflow_a_grid():
    for items, blocks in ((0, 1), (1, 1), (256, 1), (257, 2), (2**40, 3)):  # as few as the emulation allows
        assert emulated.library().blocks_for_emulated(c_int64(items), 256) == blocks


def test_a_grid_has_as_many_blocks_as_its_gpu_holds():
    """Of the kernel at hand; two GPUs may differ."""
    try:
        for device, multiprocessors in ((1, 5), (0, 1), (1, 5)):
            emulated.library().set_device(device, multiprocessors)
            assert emulated.library().blocks_for_emulated(c_int64(2**40), 256) == 3 * multiprocessors
    finally:
        emulated.library().set_device(0, 1)


# --- an optimizer on these kernels --------------------------------------------------------------------


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_takes_the_same_steps_as_by_the_reference(emulated_cuda, dtype, release):
    def train(backend):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Tanh(), torch.nn.Linear(40, 7)).to(
            dtype
        )
        optimizer = ID3AdamW(
            model.named_parameters(), lr=1e-2, budget=60, total_steps=5, max_grad_norm=1.0, backend=backend,
            release_gradients=release,
        )  # fmt: skip
        for _ in range(6):
            model(torch.randn(8, 30).to(dtype)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    (model, optimizer), (other, reference_run) = train("cuda"), train("reference")
    assert optimizer.n_active == reference_run.n_active == 60
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    for mine, theirs in zip(optimizer.touched(), reference_run.touched(), strict=True):
        assert torch.equal(mine.indices, theirs.indices)
