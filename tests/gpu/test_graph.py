"""A captured step, replayed with new gradients, takes the eager run's steps bit for bit."""

import pytest
import torch

SHAPES = [(300, 40), (7,), (64, 64), (513,)]
WARM_UP, STEPS = 3, 14
OPTIONS = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "entry": {"bias_correction": "entry"},
    "warm-up": {"entry_warmup": 10},
    "cap": {"tensor_cap": 0.5},
    "static": {"strategy": "static"},
    "past its end": {"total_steps": 8},
}


class Replayed:
    """A capturable optimizer whose gradients always lie in the same tensors."""

    def __init__(self, place, grads, dtype=torch.float32, **options):
        self.params = place.params(SHAPES, dtype)
        self.optimizer = place.optimizer(self.params, capturable=True, **options)
        self._grads = iter(grads)
        for p in self.params:
            p.grad = torch.zeros_like(p)
        # A capture launches nothing, so the gradients of the warm-up are copied in by the steps themselves.
        self._replay = place.captured(self._warm_up, WARM_UP)

    def _warm_up(self) -> None:
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if not capturing:
            self._next()
        self.optimizer.step()

    def _next(self) -> None:
        grads = next(self._grads, None)
        for p, g in zip(self.params, grads or [], strict=bool(grads)):
            p.grad.copy_(g)

    def step(self, place) -> None:
        if place.on_gpu:
            self._next()
        self._replay()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_replayed_steps_are_the_eager_ones(place, run, same, options, dtype):
    grads = place.gradients(SHAPES, STEPS, dtype)
    eager = place.optimizer(place.params(SHAPES, dtype), **options)
    run(eager, grads)
    replayed = Replayed(place, grads, dtype, **options)
    with place.no_waits():
        for _ in range(WARM_UP, STEPS):
            replayed.step(place)
    same(replayed.optimizer, eager)
    got, expected = replayed.optimizer.state_dict(), eager.state_dict()
    assert got["param_groups"][0]["id3"]["step"] == expected["param_groups"][0]["id3"]["step"] == STEPS
    for j in range(len(SHAPES)):
        for name in ("indices", "exp_avg", "exp_avg_sq", "step", "originals"):
            assert torch.equal(got["state"][j][name], expected["state"][j][name]), name


def test_a_learning_rate_that_changes_between_replays(place, run, same):
    grads, rates = place.gradients(SHAPES, STEPS), [1e-2 * 0.8**step for step in range(STEPS - WARM_UP)]
    lrs = [torch.tensor(1e-2, device=place.device) for _ in range(2)]
    eager = place.optimizer(place.params(SHAPES), lr=lrs[0])
    run(eager, grads[:WARM_UP])
    replayed = Replayed(place, grads, lr=lrs[1])
    for rate, row in zip(rates, grads[WARM_UP:], strict=True):
        for lr in lrs:
            lr.fill_(rate)
        run(eager, [row])
        replayed.step(place)
    same(replayed.optimizer, eager)


def test_an_overflow_changes_nothing_in_a_replay(place):
    """What a GradScaler sets on the optimizer is read on the device."""
    found_inf = torch.zeros((), device=place.device)
    optimizer = place.optimizer(place.params(SHAPES), capturable=True)
    optimizer.found_inf, optimizer.grad_scale = found_inf, torch.ones((), device=place.device)
    params = optimizer.param_groups[0]["params"]
    for p, g in zip(params, place.tensors(SHAPES, 1), strict=True):
        p.grad = g
    replay = place.captured(optimizer.step, WARM_UP)
    before = [p.detach().clone() for p in params], optimizer.n_active, optimizer.steps_done
    found_inf.fill_(1.0)
    replay()
    assert all(map(torch.equal, before[0], params))
    assert before[1:] == (optimizer.n_active, optimizer.steps_done) and before[2] == WARM_UP
    found_inf.fill_(0.0)
    replay()
    assert optimizer.steps_done == WARM_UP + 1
    assert optimizer.n_active > before[1]
