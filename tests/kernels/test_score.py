import cases
import numpy as np
import oracle
import pytest
import torch
from cases import F32, F64, PAIRS, SPECIAL_EXPS
from hypothesis import given
from hypothesis import strategies as st

EPSILONS = (1.0, 1e-3, 1e-8)


def check_against_oracle(backend, param, grad, eps, exp):
    score = backend.d3_score(backend.here(param), backend.here(grad), eps=eps, exp=exp)
    assert score.is_contiguous()
    expected = torch.from_numpy(oracle.d3_score(param, grad, eps, exp)).reshape(param.shape)
    oracle.check_bits(score, expected, f"exp={exp} eps={eps}")


def test_special_exponents_bit_for_bit(backend):
    @backend.examples(250, interpreted=60)
    @given(
        cases.recipes(backend.has_float64, max_tensors=1),
        st.sampled_from(SPECIAL_EXPS),
        st.sampled_from(EPSILONS),
    )
    def check(recipe, exp, eps):
        problem = cases.build(recipe._replace(tensors=(recipe.tensors[0]._replace(has_grad=True),)))
        check_against_oracle(backend, problem.params[0], problem.grads[0], eps, exp)

    check()


@pytest.mark.parametrize("exp", SPECIAL_EXPS)
@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_every_pair_of_special_values(backend, dtypes, exp):
    values = torch.tensor(cases.SPECIALS, dtype=torch.float64)
    param, grad = (
        v.reshape(-1).to(t)
        for v, t in zip(torch.meshgrid(values, values, indexing="ij"), dtypes, strict=True)
    )
    check_against_oracle(backend, param, grad, 1e-3, exp)


@pytest.mark.parametrize("exp", [0.0, -1.0, -0.5])
def test_eps_zero_where_the_exponent_allows_it(backend, exp):
    rng = np.random.default_rng(1)
    param, grad = (cases.tensor(kind, (300,), F32, "plain", rng) for kind in ("quantised", "normal"))
    check_against_oracle(backend, param, grad, 0.0, exp)


@pytest.mark.parametrize("exp", [*SPECIAL_EXPS, *cases.OTHER_EXPS])
def test_formula_within_its_rounding_error(backend, exp):
    """d carries two roundings (eps and the sum) to the power exp; d*d or √d and the division add their own.

    So the relative error is at most (2·|exp| + 3)·2⁻²⁴.
    """
    rng = np.random.default_rng(2)
    param, grad = (torch.from_numpy(rng.standard_normal(997)).float() for _ in range(2))
    score = backend.d3_score(backend.here(param), backend.here(grad), eps=1e-3, exp=exp)
    exact = grad.double().abs() / (param.double().abs() + 1e-3) ** exp
    error = (score.cpu().double() - exact).abs() / exact
    assert error.max() <= (2 * abs(exp) + 3) * 2.0**-24


@pytest.mark.parametrize("exp", cases.OTHER_EXPS)
def test_other_exponents_round_a_float64_result_once(backend, exp):
    """Libraries differ in the last bits of a float64 pow, which moves a float32 by one ulp at most."""
    rng = np.random.default_rng(3)
    param, grad = (torch.from_numpy(rng.standard_normal(2000)).float() for _ in range(2))
    score = backend.d3_score(backend.here(param), backend.here(grad), eps=0.5, exp=exp)
    expected = torch.from_numpy(oracle.d3_score(param, grad, 0.5, exp))
    ulps = (oracle.bits(score).long() - oracle.bits(expected).long()).abs()
    assert ulps.max() <= 1
    assert (ulps == 0).float().mean() > 0.99


def test_float64_in_float64(backend):
    if not backend.has_float64:
        with pytest.raises(ValueError, match="float64"):
            backend.d3_score(*(backend.here(torch.ones(4, dtype=F64)) for _ in range(2)), eps=1.0, exp=2.0)
        return
    rng = np.random.default_rng(4)
    param, grad = (torch.from_numpy(rng.standard_normal(999)) for _ in range(2))
    score = backend.d3_score(param, grad, eps=0.1, exp=1.5)
    exact = grad.abs() / (param.abs() + 0.1) ** 1.5
    torch.testing.assert_close(score, exact, rtol=2e-15, atol=0)


def test_exponent_zero_does_not_read_the_param(backend):
    grad = backend.here(torch.tensor([1.0, -2.0, 3.0]))
    score = backend.d3_score(torch.full_like(grad, float("nan")), grad, eps=1.0, exp=0.0)
    assert score.tolist() == [1.0, 2.0, 3.0]


def test_nothing_is_mutated(backend):
    param, grad = (backend.here(torch.linspace(-1, 1, 77)) for _ in range(2))
    before = param.clone()
    backend.d3_score(param, grad, eps=1.0, exp=2.0)
    oracle.check_bits(param, before)
    oracle.check_bits(grad, before)
