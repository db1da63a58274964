"""The gate before every timing: a method that selects or updates wrongly is not timed."""

import torch

from benchmarks.ours import EPS, LEARNING_RATE
from benchmarks.shapes import Inputs

# Up to this many entries all scores are sorted; beyond, a count proves the same without a sort of minutes.
_SORT_LIMIT = 32_000_000


def d3_scores(weight: torch.Tensor, grad: torch.Tensor, exp: float) -> torch.Tensor:
    """float32 |g| / (|θ| + ε)^exp by the paper's equation 1, subnormals flushed; any shape, widened first."""
    size, base = grad.float().abs(), weight.float().abs() + EPS
    match exp:
        case 0.0:
            score = size
        case 1.0:
            score = size / base
        case 2.0:
            score = size / (base * base)
        case _:
            score = (size.double() / base.double().pow(exp)).float()
    smallest = torch.finfo(torch.float32).tiny
    return score.masked_fill_((size < smallest) | (score < smallest), 0.0)


def check_selection(inputs: Inputs, active: torch.Tensor, winners: torch.Tensor, exp: float) -> None:
    """`winners` have the top scores outside `active`, ties to the lowest position.

    Both are int64 and ascending: positions when all tensors are laid end to end.
    """
    if len(winners) == 0:
        return
    parts = [d3_scores(w, g, exp).flatten() for w, g in zip(inputs.weights, inputs.grads, strict=True)]
    scores = torch.cat(parts).index_fill_(0, active, 0.0)
    if len(scores) <= _SORT_LIMIT:
        expected = scores.sort(descending=True, stable=True).indices[: len(winners)].sort().values
        assert torch.equal(winners, expected), "selection differs from a stable sort"
    else:
        _check_by_counting(scores, winners)


def _check_by_counting(scores: torch.Tensor, winners: torch.Tensor) -> None:
    """Nothing that is not a winner beats the worst winner, and no tie with it stands at a lower position."""
    won = scores[winners]
    worst = won.min()
    tied = winners[won == worst]
    assert worst > 0 and len(winners.unique()) == len(winners), "a winner has no score, or is listed twice"
    assert (scores > worst).sum() == (won > worst).sum(), "a better entry was left out"
    assert (scores[: tied.max() + 1] == worst).sum() == len(tied), "a tie went to a later entry"


def expected_values(inputs: Inputs, first: torch.Tensor, joined: torch.Tensor) -> torch.Tensor:
    """float32 weights at `joined` after two steps of dense AdamW, the first one masked by `first`."""
    weights = torch.cat([weight.flatten() for weight in inputs.weights])[joined].float()
    grads = torch.cat([grad.flatten() for grad in inputs.grads])[joined].float()
    param = torch.nn.Parameter(weights)
    optimizer = torch.optim.AdamW([param], lr=LEARNING_RATE, weight_decay=0.0, foreach=False)
    for gradient in (grads * torch.isin(joined, first), grads):
        param.grad = gradient
        optimizer.step()
    return param.detach()


def check_update(inputs: Inputs, first: torch.Tensor, method) -> None:
    """After two steps: active entries as dense-masked AdamW has them, every other entry bit-identical."""
    joined, values = method.active(), method.values()
    expected = expected_values(inputs, first, joined)
    error = (values[joined].float() - expected).abs()
    if inputs.dtype == torch.float32:
        tolerance = 1e-6 * expected.abs() + 2e-5 * LEARNING_RATE
        assert (error <= tolerance).all(), "update: beyond the parity tolerance"
    else:
        one_ulp = 2.0**-7 * expected.abs()
        rounded = expected.to(inputs.dtype).float()
        assert (error <= one_ulp).all(), "update: beyond one unit in the last place"
        assert (values[joined].float() == rounded).float().mean() > 0.999, "update: rounded differently"
    original = torch.cat([weight.flatten() for weight in inputs.weights])
    values[joined] = original[joined]
    assert torch.equal(values, original), "an entry outside the active set changed"
