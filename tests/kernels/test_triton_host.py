"""What the host does around Triton's kernels asks a GPU for nothing: here on tensors that have no values."""

import pytest
import torch
from fake_gpu import fake_gpu, item

pytest.importorskip("triton")

from id3_kernels.triton import delta, launch, selection, tables, update

SIZES = (700, 1, 300, 5000)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch):
    """No kernel runs: which one is launched, over how much, with what, is all that the host decides."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(tables, "capturing", lambda device: False)
    monkeypatch.setattr(launch, "run", lambda kernel, programs, *rest: None)
    monkeypatch.setattr(tables, "address", lambda tensor: 0 if tensor is None else 1 << 20)
    for module, name in ((tables, "table"), (tables, "layout"), (update, "bias_tables")):
        monkeypatch.setattr(module, name, tables.Kept(getattr(module, name).make, 4))
    with fake_gpu(monkeypatch):
        yield


def cuda(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda:0")


def lists(dtype=torch.bfloat16):
    """(params, grads, offsets, indices): 4 tensors, one without gradient, and room for 50 active entries."""
    params, grads = ([cuda(n, dtype=dtype) for n in SIZES] for _ in range(2))
    grads[2] = None
    return params, grads, cuda(len(SIZES) + 1, dtype=torch.int64), cuda(50, dtype=torch.int32)


@pytest.mark.parametrize("capacity", [0, 3, 5000])
@pytest.mark.parametrize("exp", [0.0, 1.0, 0.7])
def test_selection(capacity, exp):
    params, grads, *active = lists()
    k = cuda(1, dtype=torch.int64)
    offsets, indices, scores = selection.select_topk(params, grads, *active, k, capacity, 1.0, exp)
    assert (offsets.shape, indices.shape, scores.shape) == ((5,), (capacity,), (capacity,))
    given = [None if g is None else g.float() for g in grads]
    selection.select_topk_by_score(given, *active, k, capacity)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_collect(given, again):
    params, grads, offsets, indices = lists()
    best = cuda(20), cuda(20, dtype=torch.int64), cuda(20), cuda(0, dtype=torch.int64)
    selection.collect_(
        params[3], grads[3], grads[3].float() if given else None, item(offsets, slice(3, 5)), indices,
        cuda(50), True, 3, *best, cuda(1, dtype=torch.int64), again, 1.0, 1.0,
    )  # fmt: skip


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("beta2", [0.999, 0.9999999])
def test_update(tensor_lr, beta2):
    params, grads, *active = lists()
    state = cuda(50), cuda(50), cuda(50), cuda(50, dtype=torch.int32)
    numbers = cuda(4, dtype=torch.int64), 1e-3, 0.9, beta2, 1e-8, 0.01, False, cuda(1), cuda(1), cuda(1)
    lr = cuda() if tensor_lr else None
    update.adamw_(params, grads, *active, *state, *numbers, lr)
    update.adamw_compact_(params, cuda(50), *active, *state, *numbers, lr)


def test_entries():
    params, grads, offsets, indices = lists()
    assert delta.gather(params, offsets, indices).shape == (50,)
    delta.scatter_(params, offsets, indices, cuda(50, dtype=torch.bfloat16))
    assert delta.squared_norm(grads, offsets, indices).shape == ()
    arrays = [indices, cuda(50), cuda(50, dtype=torch.bfloat16)]
    new = cuda(5, dtype=torch.int64), cuda(7, dtype=torch.int32)
    delta.join_(arrays, offsets, *new, [None, cuda(7, dtype=torch.bfloat16)])


def test_a_read_is_noticed(monkeypatch):
    """So that the tests above can fail."""
    params, grads, *active = lists()
    monkeypatch.setattr(selection, "_best_tiles", lambda maxima, wanted, capacity: maxima[: int(wanted)])
    with pytest.raises(Exception, match=r"_local_scalar_dense|not linked"):
        selection.select_topk(params, grads, *active, cuda(1, dtype=torch.int64), 3, 1.0, 1.0)


def test_addresses_that_change_need_no_copy_from_the_host(monkeypatch):
    """Each table is written by kernels that carry the numbers, also in a capture, where it is not kept."""
    written = []
    monkeypatch.setattr(launch, "run", lambda kernel, programs, *rest: written.append((kernel, rest)))
    device, addresses = torch.device("cuda:0"), tuple(range(1 << 40, (1 << 40) + 70))
    for capturing, launches in ((False, 3), (False, 0), (True, 0)):
        monkeypatch.setattr(tables, "capturing", lambda _, now=capturing: now)
        written.clear()
        assert tables.table(addresses, device).shape == (96,)
        assert len(written) == launches
    numbers = (*addresses[:-1], 7)
    for _ in range(2):
        written.clear()
        tables.table(numbers, device)
        assert [kernel for kernel, _ in written] == [tables.write_table_kernel] * 3
    assert [n for _, (_, _, _, *batch) in written for n in batch][:70] == list(numbers)
