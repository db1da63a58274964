"""Scores with a general exponent, which the CPU's selection estimates before it computes them."""

import cases
import numpy as np
import oracle
import pytest
import torch
from candidates import Candidates, collect
from cases import BF16, F16, F32, F64

EXPS = (0.7, 0.1, 3.0, -0.3, 1.5, 10.0, -7.3, 100.0, 1e-3, 1e6)
TINY, HUGE = 2.0**-126, np.finfo(np.float32).max


def bases(rng) -> np.ndarray:
    """float32 > 0: mantissas of every binade, the seams of the logarithm, neighbours of 1, subnormals."""
    around = np.array([1.0, np.sqrt(0.5), np.sqrt(2.0), 1.5, 2.0], np.float32)
    seams = (around.view(np.int32)[:, None] + np.arange(-40, 41, dtype=np.int32)).view(np.float32)
    binades = np.ldexp(1 + rng.random((12, 254)), np.arange(-126, 128))
    narrow = 1 + rng.standard_normal(2000) * 1e-3
    subnormal = np.ldexp(rng.integers(1, 2**23, 200), -149)
    return np.concatenate([seams.ravel(), binades.ravel(), narrow, subnormal]).astype(np.float32)


def ulps(score: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The distance in units of float32's last place at `exact`."""
    place = np.ldexp(np.longdouble(1), np.frexp(exact)[1] - 24)
    return np.abs(score.astype(np.longdouble) - exact) / place


def check_bound(score: torch.Tensor, grad: np.ndarray, d: np.ndarray, exp: float, bound: float) -> None:
    with np.errstate(over="ignore", divide="ignore"):
        exact = grad.astype(np.longdouble) / np.power(d.astype(np.longdouble), np.longdouble(exp))
        score = score.cpu().numpy()
        largest = np.longdouble(HUGE) + np.ldexp(np.longdouble(1), 103)  # from here on a float32 is infinite
        normal = (exact >= TINY) & (exact < largest * (1 - 2.0**-24))
        assert normal.sum() > 100
        assert ulps(score[normal], exact[normal]).max() <= bound
        assert np.isinf(score[exact > largest * (1 + 2.0**-24)]).all()
        assert not score[exact < TINY * (1 - 2.0**-23)].any()


@pytest.mark.parametrize("exp", EXPS)
def test_error_bound(backend, exp):
    """Half an ulp is the rounding to float32; a library's pow gives 1 ulp here, whatever the exponent."""
    rng = np.random.default_rng(0)
    theta = bases(rng)
    eps = TINY if exp > 0 else 0.0
    d = theta + np.float32(eps)
    magnitude = np.clip(np.power(d.astype(np.longdouble), np.longdouble(exp)), 1e-36, 1e36)
    for grad in (
        np.exp(rng.standard_normal(d.size)),
        (magnitude * np.exp(rng.standard_normal(d.size))).astype(np.float64),
        np.full(d.size, TINY),
        np.full(d.size, HUGE),
    ):
        g = grad.astype(np.float32)
        arguments = (backend.here(torch.from_numpy(x)) for x in (theta, g))
        score = backend.d3_score(*arguments, eps=eps, exp=exp)
        check_bound(score, g, d, exp, 0.52 if backend.name in ("cpu", "cuda") else 1.0)


@pytest.mark.parametrize("exp", [0.7, 3.0, -0.3, -7.3])
def test_zero_infinity_and_nan_as_of_pow(backend, exp):
    values = torch.tensor(cases.SPECIALS, dtype=F32)
    param, grad = (v.reshape(-1) for v in torch.meshgrid(values, values, indexing="ij"))
    eps = 1e-3 if exp > 0 else 0.0
    score = backend.d3_score(backend.here(param), backend.here(grad), eps=eps, exp=exp)
    expected = torch.from_numpy(oracle.d3_score(param, grad, eps, exp))
    distance = (oracle.bits(score).long() - oracle.bits(expected).long()).abs()
    assert distance.max() <= 1, (param[distance > 1], grad[distance > 1])


def test_at_a_base_of_one_the_score_is_the_gradient(cpu):
    grad = torch.randn(1000)
    assert torch.equal(cpu.d3_score(torch.zeros(1000), grad, eps=1.0, exp=0.7), grad.abs())


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("exp", EXPS)
def test_same_bits_for_every_instruction_set_thread_count_and_layout(cpu, simd_levels, threads, exp, dtype):
    rng = np.random.default_rng(1)
    theta = torch.from_numpy(bases(rng)).to(dtype)
    grad = torch.from_numpy(np.exp(5 * rng.standard_normal(theta.numel()))).to(dtype)
    theta[:100] = torch.from_numpy(rng.choice(cases.SPECIALS, 100)).to(dtype)
    want = None
    for _ in simd_levels():
        for count, layout in ((1, "plain"), (2, "every_other"), (3, "misaligned")):
            threads(count)
            pair = (cases.laid_out(x, layout) for x in (theta, grad))
            score = cpu.d3_score(*pair, eps=1e-38, exp=exp)
            want = score if want is None else want
            oracle.check_bits(score, want)


@pytest.mark.parametrize("exp", EXPS)
def test_cuda_gives_the_bits_of_the_cpu(cpu, emulated_cuda, exp):
    rng = np.random.default_rng(2)
    theta = torch.from_numpy(bases(rng))
    grad = torch.from_numpy(np.exp(rng.standard_normal(theta.numel()))).float()
    score = type(cpu)("cuda").d3_score(theta, grad, eps=1e-3, exp=exp)
    oracle.check_bits(score, cpu.d3_score(theta, grad, eps=1e-3, exp=exp))


# --- selection ---------------------------------------------------------------------------------------------


def near_ties(n: int, exp: float, eps: float, spread: float, rng) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of one size per tile, and gradients for which all scores lie within `spread` of each other.

    The estimates of such tiles differ by their errors alone.
    """
    theta = np.repeat(np.exp(rng.uniform(-3, 3, n // 256 + 1)), 256)[:n].astype(np.float32)
    grad = (theta.astype(np.float64) + eps) ** exp * (1 + spread * rng.random(n)) * 1e-3
    return torch.from_numpy(theta), torch.from_numpy(grad).float()


def scores_of(cpu, params, grads, eps, exp):
    scores = (cpu.d3_score(p, g, eps=eps, exp=exp) for p, g in zip(params, grads, strict=True))
    return [oracle.array(s) for s in scores]


def check_selections(cpu, problem, eps, exp, counts):
    scores = scores_of(cpu, problem.params, problem.grads, eps, exp)
    for k in counts:
        result = cpu.select_topk(problem.params, problem.grads, problem.active, k, eps=eps, exp=exp)
        oracle.check_selection(result, oracle.topk(scores, problem.active, k))


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-2, 0.1])
@pytest.mark.parametrize("exp", [0.7, 0.1, -0.3, 3.0, -7.3, 31.0, 33.0])
def test_scores_that_estimates_cannot_tell_apart(cpu, exp, spread):
    rng = np.random.default_rng(3)
    sizes = (40_000, 7, 23_001)
    params, grads = zip(*(near_ties(n, exp, 1e-3, spread, rng) for n in sizes), strict=True)
    active = cases.some_entries(sizes, 0.01, rng)
    check_selections(cpu, cases.Problem(params, grads, active, 0), 1e-3, exp, (1, 17, 60, 123, 200))


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64], ids=str)
@pytest.mark.parametrize("eps", [1.0, 1e-3, 1e-8])
@pytest.mark.parametrize("exp", [0.7, 1.5, 10.0, 100.0])
def test_selection_of_every_size_of_score(cpu, exp, eps, dtype):
    """Tiles of scores that overflow, are subnormal, NaN or zero stand beside ordinary ones."""
    rng = np.random.default_rng(4)
    kinds = ("normal", "special", "quantised", "subnormal", "close", "zeros", "one_mass", "equal", "normal")
    sizes = [9000] * len(kinds)
    grads = [cases.tensor(kind, (9000,), dtype, "plain", rng) for kind in kinds]
    params = [cases.tensor("normal", (9000,), dtype, "every_other", rng) * 0.04 for _ in kinds]
    params[-1][::700] = float("nan")
    params[0][::900] = 0.0
    active = cases.some_entries(sizes, 0.02, rng)
    check_selections(cpu, cases.Problem(params, grads, active, 0), eps, exp, (1, 20, 100, 158))


@pytest.mark.parametrize("scale", [2.0**-126, 2.0**-120, 2.0**120, 2.0**126])
@pytest.mark.parametrize("exp", [0.7, -0.3, 10.0])
def test_scores_around_the_smallest_and_the_largest_float32(cpu, exp, scale):
    rng = np.random.default_rng(5)
    params = [torch.from_numpy(np.exp(rng.uniform(-2, 2, 30_000))).float() for _ in range(2)]
    grads = [torch.from_numpy(scale * np.exp(rng.standard_normal(30_000))).float() for _ in range(2)]
    check_selections(cpu, cases.Problem(params, grads, None, 0), 0.5, exp, (1, 30, 110))


@pytest.mark.parametrize("kind", ["zeros", "one_mass"])
def test_fewer_selectable_entries_than_k(cpu, kind):
    rng = np.random.default_rng(6)
    grads = [cases.tensor(kind, (30_000,), F32, "plain", rng) for _ in range(2)]
    params = [cases.tensor("normal", (30_000,), F32, "plain", rng) for _ in range(2)]
    check_selections(cpu, cases.Problem(params, grads, None, 0), 1.0, 0.7, (1, 2, 50))


def test_same_selection_for_every_instruction_set_and_thread_count(cpu, simd_levels, threads):
    rng = np.random.default_rng(7)
    sizes = (200_000, 33, 150_001)
    params, grads = zip(*(near_ties(n, 0.7, 1.0, 1e-2, rng) for n in sizes), strict=True)
    problem = cases.Problem(params, grads, cases.some_entries(sizes, 0.01, rng), 0)
    for _ in simd_levels():
        for count in (1, 2, 3):
            threads(count)
            check_selections(cpu, problem, 1.0, 0.7, (40, 400))


def check_collected(cpu, threads, problem, eps, exp):
    scores = scores_of(cpu, problem.params, problem.grads, eps, exp)
    dtype = torch.float64 if problem.params[0].dtype == F64 else torch.float32
    order = range(len(problem.params))
    for count, visited in ((1, order), (2, reversed(order))):
        threads(count)
        held = Candidates.none(cpu, problem.k, dtype)
        collect(cpu, problem, visited, held, eps, exp)
        held.check(problem, oracle.topk(scores, problem.active, problem.k))


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("exp", [0.7, -0.3, 10.0, 100.0])
@pytest.mark.parametrize("k", [1, 50, 3000])
def test_near_ties_collected_tensor_by_tensor(cpu, threads, exp, k, dtype):
    rng = np.random.default_rng(8)
    sizes = (60_000, 33, 70_001, 9000)
    pairs = [near_ties(n, exp, 1e-3, 0.05, rng) for n in sizes]
    params, grads = ([t.to(dtype) for t in tensors] for tensors in zip(*pairs, strict=True))
    grads[3] = cases.tensor("special", (9000,), dtype, "plain", rng)
    check_collected(
        cpu, threads, cases.Problem(params, grads, cases.some_entries(sizes, 0.01, rng), k), 1e-3, exp
    )


@pytest.mark.parametrize("dtype", [F32, F16, F64], ids=str)
@pytest.mark.parametrize("eps", [1.0, 1e-3, 1e-8])
@pytest.mark.parametrize("exp", [0.7, 3.0, 40.0, -0.3])
def test_gradients_that_settle_tiles_collected_tensor_by_tensor(cpu, threads, exp, eps, dtype):
    """Zero weights reach the bound that the gradient sets; equal gradients reach it to the bit."""
    rng = np.random.default_rng(9)
    sizes = [60_000] * 4
    kinds = ("normal", "quantised", "equal", "normal")
    params = [cases.tensor("normal", (n,), dtype, "plain", rng) * 0.01 for n in sizes]
    params[2].zero_()
    params[3][::2] = 0
    grads = [cases.tensor(kind, (n,), dtype, "plain", rng) for kind, n in zip(kinds, sizes, strict=True)]
    problem = cases.Problem(params, grads, cases.some_entries(sizes, 0.02, rng), 300)
    check_collected(cpu, threads, problem, eps, exp)
