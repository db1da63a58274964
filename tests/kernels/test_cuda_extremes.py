"""The CUDA kernels on the host, of numbers at the ends of their range and of the largest tensors."""

import shutil
from ctypes import c_double, c_float, c_int64

import emulated
import pytest
import torch
from test_cuda_emulated import Made, assert_selects_as_reference

from id3_kernels import Entries, reference

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
EXTREMES = {
    "small": (lambda x: x * 2.0**-115, lambda x: x, 1.0),
    "subnormal": (lambda x: x * 2.0**-126, lambda x: x, 0.5),
    "mostly small": (lambda x: torch.where(x > 1, x, x * 2.0**-120), lambda x: x, 1.0),
    "large over a small eps": (lambda x: x * 2.0**122, lambda x: x * 2.0**-20, 2.0**-8),
    "large": (lambda x: x * 2.0**124, lambda x: x, 1.0),
    "wide params": (lambda x: x * 2.0**100, lambda x: x * 2.0**61, 1.0),
    "widest params": (lambda x: x * 2.0**100, lambda x: x * 2.0**123, 1.0),
    "squares overflow": (lambda x: x * 2.0**100, lambda x: 2.0**64 * (1 + x / 4), 1.0),
    "a few wide params": (lambda x: x, lambda x: torch.where(x > 2, x * 2.0**70, x), 1.0),
    "not finite": (
        lambda x: torch.where(x < -3, float("nan"), torch.where(x > 3, float("inf"), x)),
        lambda x: torch.where(x < -3, float("nan"), torch.where(x > 3, float("inf"), x)),
        1.0,
    ),
    "eps of 1e-20": (lambda x: x, lambda x: x.round(), 1e-20),
    "eps of 2^70": (lambda x: x, lambda x: x, 2.0**70),
    "zeros": (lambda x: x * 0, lambda x: x, 1.0),
    "a few": (lambda x: torch.where(x > 3, x * 2.0**-100, 0), lambda x: x, 1.0),
}


@pytest.fixture(params=[-1, 0, 1])
def reciprocal_ulps(request):
    """How far the approximate reciprocals are off."""
    emulated.library().set_reciprocal_ulps(request.param)
    yield
    emulated.library().set_reciprocal_ulps(0)


@pytest.mark.parametrize("exp", [0.0, 0.5, 1.0, 2.0, -0.5, -1.0, -2.0])
@pytest.mark.parametrize("name", EXTREMES)
def test_quick_scores_are_exact_or_made_again(reciprocal_ulps, name, exp):
    of_grads, of_params, eps = EXTREMES[name]
    made = Made(8)
    params = [of_params(made.tensor(33000, torch.float32))]
    grads = [of_grads(made.tensor(33000, torch.float32))]
    active = made.entries([33000], 0.01)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [[t.to(dtype) for t in column] for column in (params, grads)]
        assert assert_selects_as_reference(*tensors, active, 2, eps=eps, exp=exp) == "stored"


@pytest.mark.parametrize(
    ("exp", "wide", "grad", "small"),
    [(2.0, 2.0**63.2, 2.0**127, 0.25), (-1.0, 2.0**40, 2.0**-140, 2.0**-106)],
    ids=["two", "minus one"],
)
def test_an_active_weight_that_is_not_a_number_hides_no_wide_one(exp, wide, grad, small):
    """One lane sees both; beside a wide weight its quick scores do not hold, that of the wide one is 0."""
    params, grads = torch.ones(20_000), torch.full((20_000,), small)
    params[0], params[1], grads[1] = float("nan"), wide, grad
    best = reference.d3_score(params[1:2], grads[1:2], 1.0, exp).item()
    grads[10_242] = 0.8 * best * 2.0**exp  # of another tile, the second best
    active = Entries.from_lists([torch.tensor([0], dtype=torch.int32)], torch.device("cpu"))
    for k in (1, 2):
        assert_selects_as_reference([params], [grads], active, k, exp=exp)


def test_roots_of_tiny_weights_without_an_eps(reciprocal_ulps):
    for seed in range(25):
        made = Made(seed)
        params, grads = made.tensor(33_000, torch.float32) * 2.0**-122, made.tensor(33_000, torch.float32)
        active = made.entries([33_000], 0.01)
        assert_selects_as_reference([params], [grads], active, 2, eps=0.0, exp=-0.5)


@pytest.fixture
def dry():
    """Launches are counted and not run, so that no memory of the tensors' size is needed."""
    emulated.library().set_dry(True)
    yield
    emulated.library().set_dry(False)


@pytest.mark.parametrize("numel", [2**31 - 1, 2_147_475_457, 2_147_475_456])
def test_the_largest_tensors_have_chunks(dry, numel):
    """The emulation ends the process where a 32-bit product or sum of sizes overflows."""
    library = emulated.library()
    assert library.chunks_of_emulated(c_int64(numel)) == -(-numel // 8192)
    row, numbers = (emulated.Row * 1)(emulated.Row(numel=numel)), (torch.zeros(2, dtype=torch.int64),) * 9
    nothing = Entries.empty(1)  # named: the addresses below do not keep it
    active, state = emulated.runs(*nothing), torch.zeros(2100, dtype=torch.int64)
    for by_grid, launches in ((0, 3), (1, 14)):
        before = library.launches_emulated()
        library.collect_emulated(
            row, None, *active[1:], None, 0, c_int64(0), *map(emulated.address, numbers[:3]), c_int64(2),
            emulated.address(state), emulated.address(numbers[3]), c_float(1), c_double(1), by_grid,
        )  # fmt: skip
        assert library.launches_emulated() - before == launches
    for capacity in (1, 2**20):
        library.select_topk_emulated(
            row, *active[:5], emulated.address(numbers[3]), c_int64(capacity), c_float(1), c_double(1), 0,
            *map(emulated.address, numbers[4:7]),
        )  # fmt: skip


@pytest.mark.parametrize("exp", [0.0, 1.0, 2.0, -1.0])
def test_float32_gradients_of_bfloat16_params(exp):
    made = Made(11)
    params, grads = [made.tensor(33000, torch.bfloat16)], [made.tensor(33000, torch.float32)]
    for column in (params, grads):
        assert column[0].data_ptr() % 16 == 0
    assert assert_selects_as_reference(params, grads, made.entries([33000], 0.02), 2, exp=exp) == "stored"


def test_few_launches_select_of_many_tensors():
    """One stores the rows of up to a thousand tensors."""
    library, counted = emulated.library(), []
    for n in (291, 1000, 1001):
        tensors = [torch.ones(300)] * n
        before = library.launches_emulated()
        emulated.select(tensors, tensors, *Entries.empty(n), torch.tensor([1]), 1, 1.0, 1.0, False)
        counted.append(library.launches_emulated() - before)
    assert counted == [15, 15, 16]
