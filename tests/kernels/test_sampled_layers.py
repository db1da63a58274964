"""Layers with a sparse backward pass on every backend: gradcheck, and the gradients of plain layers.

Float64 where the backend takes it, else float32.
"""

import copy

import numpy as np
import pytest
import torch
from cases import BF16, F16, F32, F64
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck

from id3_optim import D3, ID3AdamW, sparse_backward
from id3_optim.schedules import one_shot

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = [F32, BF16, F16, F64]
KINDS = ["linear", "linear without bias", "conv1d", "embedding", "embedding with padding_idx"]
DENSITIES = ["none", "one", "a row", "a column", "some", "all"]
SHAPES = [(), (0,), (1,), (5,), (2, 70), (3, 0), (2, 3, 4)]  # of the tokens
STEPS = pytest.mark.parametrize("selects", [False, True], ids=["between selections", "selects"])


def layer_of(kind, rows, columns, dtype, rng):
    """A layer whose weight is [rows, columns]."""
    if kind == "conv1d":
        layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(columns, rows)
    elif kind.startswith("linear"):
        layer = nn.Linear(columns, rows, bias=kind == "linear")
    else:
        layer = nn.Embedding(rows, columns, padding_idx=rows // 2 if "padding" in kind else None)
    for param in layer.parameters():
        param.data = normal(param.shape, dtype, rng)
    return layer


def normal(shape, dtype, rng):
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def input_of(kind, layer, shape, rng):
    """What the layer reads for tokens of this shape."""
    rows, columns = layer.weight.shape
    if kind.startswith("embedding"):
        return torch.from_numpy(rng.integers(0, rows, shape))
    x = normal((*shape, rows if kind == "conv1d" else columns), layer.weight.dtype, rng)
    return x.requires_grad_()


def held_of(density, rows, columns, rng):
    """Flat indices of active entries, ascending."""
    held = np.zeros((rows, columns), bool)
    if density == "one":
        held[rng.integers(rows), rng.integers(columns)] = True
    elif density == "a row":
        held[rng.integers(rows)] = True
    elif density == "a column":
        held[:, rng.integers(columns)] = True
    elif density == "some":
        held = rng.random((rows, columns)) < 0.2
    elif density == "all":
        held[:] = True
    return torch.from_numpy(np.flatnonzero(held))


@pytest.fixture
def backend(backend):
    """Each of them, interpreted or emulated too; GPUs have products of their own."""
    if backend.device.type != "cpu":
        pytest.skip("compares bits with the products of the CPU")
    return backend


class Trained:
    """A layer with a sparse backward pass; `held` (flat indices, ascending) are its active entries.

    selects: whether entries may join in the step whose gradients are taken.
    """

    def __init__(self, backend, layer, held, selects):
        self.layer, self.held = layer, held
        spare = nn.Linear(3, 1, bias=False, dtype=layer.weight.dtype)  # may join where all of the weight has
        self.optimizer = ID3AdamW(
            [layer.weight, spare.weight], lr=0.0, weight_decay=0.0, budget=len(held) + 3, total_steps=4,
            heuristic=D3(1.0, 0.0), schedule=one_shot, select_every=1 if selects else 9, backend=backend.name,
        )  # fmt: skip
        sparse_backward(nn.ModuleList([layer, spare]), self.optimizer)
        layer.weight.grad = torch.zeros_like(layer.weight)
        layer.weight.grad.view(-1)[held] = 1
        self.optimizer.step()
        assert torch.equal(next(self.optimizer.touched()).indices.long(), held)

    def values(self):
        """The gradients at the active entries that the last backward pass has taken."""
        (shard,) = self.optimizer.active_set.shards
        ((begin, end),) = (run[:2] for run in shard.bounds)
        return shard.arrays["gradient"][begin:end].clone()

    def jacobian(self, x):
        """[elements of the output, active entries]: a backward pass for each element."""
        output, rows = self.layer(x), []
        for one in torch.eye(output.numel(), dtype=output.dtype):
            self.optimizer.zero_grad()
            output.backward(one.view(output.shape), retain_graph=True)
            rows.append(self.values())
        return torch.stack(rows)


# --- gradcheck ------------------------------------------------------------------------------------------


class OfActiveEntries(torch.autograd.Function):
    """A layer's output as a function of its weight's active entries."""

    @staticmethod
    def forward(ctx, values, trained, x, jacobian):
        ctx.jacobian = jacobian
        with torch.no_grad():
            trained.layer.weight.view(-1)[trained.held] = values
            return trained.layer(x)

    @staticmethod
    def backward(ctx, grad):
        return grad.reshape(-1) @ ctx.jacobian, None, None, None


def checked(backend):
    """(dtype, options of gradcheck). A layer is linear in each input, so that in float32 a large eps leaves
    the rounding of outputs alone: some 1e-7 · |output| / eps."""
    options = {} if backend.has_float64 else {"eps": 0.25, "atol": 2e-5, "rtol": 2e-5}
    return (F64 if backend.has_float64 else F32), options


@STEPS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Input #.*not a double precision:UserWarning")
def test_gradcheck_of_the_active_entries(backend, kind, selects):
    dtype, options = checked(backend)
    rng = np.random.default_rng(1)
    layer = layer_of(kind, 4, 5, dtype, rng)
    trained = Trained(backend, layer, torch.tensor([1, 3, 8, 9, 11, 12, 19]), selects)
    x = input_of(kind, layer, (2, 3), rng).detach()
    if kind.startswith("embedding"):
        x[0, 0] = 2
    values = layer.weight.detach().view(-1)[trained.held].requires_grad_()
    jacobian = trained.jacobian(x)
    if "padding" in kind:  # its forward pass reads the row, its backward pass leaves the row out
        assert not jacobian[:, trained.held // 5 == 2].any()
        x = x.masked_fill(x == 2, 3)
        jacobian = trained.jacobian(x)
    assert jacobian.any()
    assert gradcheck(lambda v: OfActiveEntries.apply(v, trained, x, jacobian), values, **options)


@STEPS
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv1d"])
@pytest.mark.filterwarnings("ignore:Input #.*not a double precision:UserWarning")
def test_gradcheck_of_input_and_bias(backend, kind, selects):
    dtype, options = checked(backend)
    rng = np.random.default_rng(2)
    layer = layer_of(kind, 4, 5, dtype, rng)
    Trained(backend, layer, torch.tensor([1, 3, 8, 19]), selects)
    inputs = [input_of(kind, layer, (2, 3), rng), *([layer.bias] if layer.bias is not None else [])]
    assert gradcheck(lambda x, *_: layer(x), inputs, **options)


def test_gradcheck_would_find_a_wrong_value(cpu):
    rng = np.random.default_rng(3)
    layer = layer_of("linear", 4, 5, F64, rng)
    trained, x = (
        Trained(cpu, layer, torch.tensor([1, 3]), False),
        input_of("linear", layer, (6,), rng).detach(),
    )
    values = layer.weight.detach().view(-1)[trained.held].requires_grad_()
    jacobian = trained.jacobian(x) * 1.01
    assert not gradcheck(
        lambda v: OfActiveEntries.apply(v, trained, x, jacobian), values, raise_exception=False
    )


# --- beside plain layers ----------------------------------------------------------------------------------


def gradients_of(layer, x, dy):
    """Of the input and of the bias."""
    x = x.detach().requires_grad_(x.is_floating_point())
    layer(x).backward(dy)
    return [t.grad for t in (x, getattr(layer, "bias", None)) if t is not None and t.requires_grad]


def factors_of(kind, layer, x, dy):
    """L [tokens, rows] and R [tokens, columns] of dW = LᵀR, in more than float64."""
    dy = wide(dy).reshape(-1, dy.shape[-1])
    if not kind.startswith("embedding"):
        x = wide(x).reshape(-1, x.shape[-1])
        return (x, dy) if kind == "conv1d" else (dy, x)
    one_hot = np.eye(layer.num_embeddings, dtype=np.longdouble)[x.numpy().reshape(-1)]
    if layer.padding_idx is not None:
        one_hot[:, layer.padding_idx] = 0
    return one_hot, dy


def wide(x):
    return x.detach().double().numpy().astype(np.longdouble)


@STEPS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_a_plain_layer(backend, dtype, selects):
    """Those of input and bias to the bit, and in a step that selects those at active entries too. Between
    selections these are within the bound of csrc/formulas/sampled.h of the exact ones; a sum of an embedding
    has one rounding per token."""
    if dtype == F64 and not backend.has_float64:
        pytest.skip("float64")
    sizes = st.sampled_from([1, 2, 7, 16, 33])

    @backend.examples(100, interpreted=5)
    @given(st.sampled_from(KINDS), sizes, sizes, st.sampled_from(SHAPES), st.sampled_from(DENSITIES), SEEDS)
    def check(kind, rows, columns, shape, density, seed):
        rng = np.random.default_rng(seed)
        layer = layer_of(kind, rows, columns, dtype, rng)
        plain, x = copy.deepcopy(layer), input_of(kind, layer, shape, rng)
        dy = normal(plain(x).shape, dtype, rng)
        dy *= torch.from_numpy(rng.random((*shape, 1)) < 0.8)  # tokens of padding have no gradient
        trained = Trained(backend, layer, held_of(density, rows, columns, rng), selects)
        got, want = (gradients_of(one, x, dy) for one in (layer, plain))
        assert len(got) == len(want) and all(map(torch.equal, got, want))
        assert layer.weight.grad is None
        values = trained.values()
        if selects:
            assert torch.equal(values, plain.weight.grad.view(-1)[trained.held].to(values.dtype))
            return
        left, right = factors_of(kind, layer, x, dy)
        exact, size = ((f(left).T @ f(right)).reshape(-1)[trained.held] for f in (np.asarray, np.abs))
        roundings = len(left) if kind.startswith("embedding") else 8 + len(left) / 128
        unit = torch.finfo(values.dtype).eps / 2
        assert (np.abs(values.numpy() - exact) <= roundings * unit * size).all()

    check()
