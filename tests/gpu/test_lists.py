"""Lists of tensors as they come: very many, very small, very large, at odd addresses."""

import pytest
import torch

import id3_kernels
from id3_kernels import Entries, use_backend

STEPS = 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_tensors(place, oracle, run, same, dtype):
    shapes = [(1 + j % 7, 5 + j % 11) for j in range(1000)]
    optimizers = []
    for where in (place, oracle):
        optimizers.append(where.optimizer(where.params(shapes, dtype)))
        run(optimizers[-1], where.gradients(shapes, 2, dtype))
    same(*optimizers)
    assert optimizers[0].n_active > 0


def test_tensors_of_one_entry(place, oracle, run, same):
    shapes = [(1,), (), (1, 1), (0,)] * 20
    optimizers = []
    for where in (place, oracle):
        optimizers.append(where.optimizer(where.params(shapes), budget=40, total_steps=STEPS))
        run(optimizers[-1], where.gradients(shapes, STEPS))
    same(*optimizers)
    assert optimizers[0].n_active == 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_misaligned_views(place, oracle, run, same, dtype):
    """Weights and gradients that begin 1 … 9 entries into their memory: no vector load may cross."""
    sizes = [1, 255, 256, 257, 1000, 4096, 8191, 70000, 33]

    def shifted(tensors):
        return [torch.cat([x[:1].expand(j + 1), x])[j + 1 :] for j, x in enumerate(tensors)]

    optimizers = []
    for where in (place, oracle):
        shapes = [(n,) for n in sizes]
        params = [torch.nn.Parameter(x) for x in shifted(where.tensors(shapes, 0, dtype))]
        assert any(p.data_ptr() % 16 for p in params)
        optimizers.append(where.optimizer(params, max_grad_norm=1.0))
        run(optimizers[-1], [shifted(grads) for grads in where.gradients(shapes, STEPS, dtype)])
    same(*optimizers)


def test_gradients_that_stay_and_gradients_that_move(place, run, same):
    """`zero_grad()` makes new gradients at new addresses, `set_to_none=False` keeps them where they are."""
    shapes = [(300, 40), (7,), (64, 64), (513,)]
    moving = place.optimizer(place.params(shapes), max_grad_norm=1.0)
    run(moving, place.gradients(shapes, 6))
    staying = place.optimizer(place.params(shapes), max_grad_norm=1.0)
    static = place.tensors(shapes, 99)
    for grads in place.gradients(shapes, 6):
        for mine, new in zip(static, grads, strict=True):
            mine.copy_(new)
        run(staying, [static])
    same(moving, staying)


# --- more entries than 32 bits count; on the CPU the same with fewer -----------------------------------


def _planted(place, size: int, largest: dict[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor and its gradient, with these gradients at these places."""
    param = torch.full((size,), 0.5, dtype=torch.bfloat16, device=place.device)
    grad = torch.randn(size, dtype=torch.bfloat16, device=place.device).clamp_(-4, 4).mul_(1e-3)
    for index, value in largest.items():
        grad[index] = value
    return param, grad


def _selected(place, *arguments):
    with use_backend(place.name):
        return id3_kernels.select_topk(*arguments, eps=1.0, exp=1.0)


@pytest.mark.parametrize("copies", [129, 257])
def test_more_than_32_bits_of_entries(place, copies):
    """One tensor of 2²⁴ entries many times, 2³¹ and 2³² in all, and a better entry behind them."""
    size = 1 << (24 if place.on_gpu else 9)
    first, second, third = size - 1, 345, 0
    param, grad = _planted(place, size, {first: 64.0, second: 32.0, third: 16.0})
    last, last_grad = _planted(place, 300, {299: 1000.0})
    params, grads = [param] * copies + [last], [grad] * copies + [last_grad]
    entries, scores = _selected(place, params, grads, None, 1 + 2 * copies + 5)
    expected = [[third, second, first]] * 5 + [[second, first]] * (copies - 5) + [[299]]
    assert [rows.tolist() for rows in entries.lists()] == expected
    assert scores[-1] == 1000.0 / 1.5
    more, _ = _selected(place, params, grads, entries, 5)
    assert [rows.tolist() for rows in more.lists()] == [[]] * 5 + [[third]] * 5 + [[]] * (copies - 9)


def test_a_tensor_as_large_as_any_may_be(place):
    """2³¹ − 1 entries of equal score: ties go to the lowest index, and the last entry is reached."""
    size = 2**31 - 1 if place.on_gpu else 2**16 - 1
    if place.on_gpu and torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GB of GPU memory")
    param = torch.full((size,), 0.5, dtype=torch.bfloat16, device=place.device)
    grad = torch.full((size,), 1e-3, dtype=torch.bfloat16, device=place.device)
    grad[-1] = 1.0
    active = Entries.from_lists([torch.tensor([0, 2], dtype=torch.int32, device=place.device)])
    entries, _ = _selected(place, [param], [grad], active, 4)
    assert entries.indices.tolist() == [1, 3, 4, size - 1]
