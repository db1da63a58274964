"""How many kernels a step of the Triton backend launches, torch's own included, on a GPU that is not there.

The launches of the Triton backend are counted where it makes them. Of torch's ops each counts as one, except
those that give a view or memory without content.
"""

import itertools
from collections import Counter

import pytest
import torch
from fake_gpu import fake_gpu
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from id3_kernels import backend
from id3_optim import ID3AdamW
from id3_optim.state import progress

launch = pytest.importorskip("id3_kernels.triton.launch", reason="triton is not installed")
from id3_kernels.triton import score, tables, update  # noqa: E402

CACHES = ((tables, "table"), (tables, "layout"), (score, "exponent"))
CACHES += ((update, "unbiased_table"), (update, "root_table"))


class Launches(TorchDispatchMode):
    """Op of torch, or kernel of the Triton backend -> how often it was launched."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        is_view = any(r.alias_info and not r.alias_info.is_write for r in function._schema.returns)
        on_gpu = any(isinstance(t, torch.Tensor) and t.device.type == "cuda" for t in tree_leaves(out))
        if on_gpu and not is_view and "empty" not in name:
            self.counts[name] += 1
        return out

    def run(self, kernel, programs, *_):
        if programs:
            self.counts[kernel.__name__] += 1


class Report:
    """The number of a step, in which 40 entries join, arrives in the next one."""

    def __init__(self, launches):
        self.sent, self.launches = -40, launches

    def send(self, number):
        self.launches.counts["copy of a number to the host"] += 1
        self.sent += 40

    def newest(self, before, wait):
        return max(before, self.sent)


places = itertools.count(1)


def address(tensor):
    """The same for as long as the tensor lives."""
    if tensor is None:
        return 0
    if not hasattr(tensor, "place"):
        tensor.place = 256 * next(places)
    return tensor.place


@pytest.fixture
def launches(monkeypatch):
    """A GPU on which nothing happens, and the launches on it."""
    launches = Launches()
    monkeypatch.setattr(progress, "Report", lambda: Report(launches))
    monkeypatch.setattr(backend, "require", lambda name: None)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "run", launches.run)
    monkeypatch.setattr(tables, "address", address)
    monkeypatch.setattr(tables, "capturing", lambda device: False)
    monkeypatch.setattr(tables, "made_now", lambda device: None)
    for module, name in CACHES:
        kept = getattr(module, name)
        monkeypatch.setattr(module, name, tables.Kept(kept.make, kept.most))
    with fake_gpu(monkeypatch):
        copy_ = FakeTensor.copy_

        def counted(t, *arguments, **options):
            launches.counts["copy_"] += 1
            return copy_(t, *arguments, **options)

        monkeypatch.setattr(FakeTensor, "copy_", counted)
        yield launches


def parameters(count, *shape):
    return [torch.nn.Parameter(torch.empty(shape, device="cuda:0")) for _ in range(count)]


def test_a_steady_step_launches_few_kernels(launches):
    """291 tensors in two groups, as of the CUDA backend; the gradients of each step in new memory."""
    params = parameters(291, 40, 10)
    groups = [{"params": params[:200]}, {"params": params[200:], "weight_decay": 0.0}]
    optimizer = ID3AdamW(groups, lr=1e-3, budget=2000, total_steps=50, backend="triton")
    for step in range(4):
        for p in params:
            p.grad = torch.empty_like(p)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 / (1 + step)
        launches.counts.clear()
        with launches:
            optimizer.step()
    assert launches.counts["tile_maxima_kernel"] == 1  # a step that selects
    assert launches.counts["adamw_kernel"] == 2
    assert launches.counts.total() <= 60, launches.counts


@pytest.mark.parametrize("shape", [(40, 10), (400, 1000)], ids=["all tiles", "best tiles"])
def test_a_hook_launches_few_kernels(launches, shape):
    """Of released gradients, for each tensor; the step itself is counted among them."""
    params = parameters(40, *shape)
    optimizer = ID3AdamW(params, budget=2000, total_steps=50, backend="triton", release_gradients=True)
    for _ in range(4):
        for p in params:
            p.grad = torch.empty_like(p)
        launches.counts.clear()
        with launches:
            optimizer.step()  # takes what no hook has taken
    assert launches.counts["take_kernel"] == launches.counts["keep_kernel"] == len(params)
    assert launches.counts["tile_maxima_kernel"] == (2 * len(params) if shape[0] == 400 else 0)
    assert launches.counts.total() <= 30 * len(params), launches.counts
