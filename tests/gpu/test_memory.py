"""A running optimizer takes no more memory, and a step for which there is none changes nothing."""

from types import SimpleNamespace

import pytest
import torch

SHAPES = [(300, 400), (7,), (640, 64), (513,)]


@pytest.mark.parametrize("released", [False, True])
def test_nothing_is_allocated_after_the_first_steps(gpu, released):
    params = gpu.params(SHAPES)
    optimizer = gpu.optimizer(params, total_steps=40, max_grad_norm=1.0, release_gradients=released)
    grads = gpu.tensors(SHAPES, 1)

    def step() -> None:
        torch.autograd.backward([(p * g).sum() for p, g in zip(params, grads, strict=True)])
        optimizer.step()
        optimizer.zero_grad()

    names = ("allocated_bytes.all.current", "reserved_bytes.all.current", "num_device_alloc")
    held = []
    for number in range(30):
        step()
        if number >= 5:
            torch.cuda.synchronize()
            stats = torch.cuda.memory_stats()
            held.append(tuple(stats.get(name) for name in names))
    assert set(held) == {held[0]}


def test_a_step_takes_little_beyond_its_state(gpu):
    """No tensor of N entries but the tile maxima (N/64 bytes) and, where a backend keeps it, N bits."""
    shapes = [(4096, 4096)] * 4
    n = 4 * 4096 * 4096
    params = [torch.nn.Parameter(torch.randn(shape, device=gpu.device)) for shape in shapes]
    optimizer = gpu.optimizer(params, budget=1000, total_steps=100)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < n // 64 + n // 8 + (4 << 20)


def _kept(optimizer) -> tuple:
    """Copies of everything that a step may change."""
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    state = optimizer.state_dict()
    tensors = [
        x.clone() for row in state["state"].values() for x in row.values() if isinstance(x, torch.Tensor)
    ]
    return [*params, *tensors], state["param_groups"][0]["id3"]


def _unchanged(optimizer, kept: tuple) -> bool:
    tensors, settings = _kept(optimizer)
    return len(tensors) == len(kept[0]) and all(map(torch.equal, tensors, kept[0])) and settings == kept[1]


@pytest.mark.parametrize("op", ["select_topk", "gather", "join_", "adamw_"])
def test_a_step_without_memory_changes_nothing(place, run, same, op):
    """Wherever the step runs out of memory, the next one goes on as if nothing had been."""
    grads = place.gradients(SHAPES, 6)
    untouched = place.optimizer(place.params(SHAPES))
    run(untouched, grads)
    optimizer = place.optimizer(place.params(SHAPES))
    run(optimizer, grads[:3])
    kept, shard = _kept(optimizer), optimizer._unmasking.active.shards[0]
    whole = shard.kernels

    def short_of_memory(*_):
        raise torch.OutOfMemoryError("out of memory")

    table = {name: getattr(whole, name) for name in dir(whole) if not name.startswith("__")}
    shard.kernels = SimpleNamespace(**table | {op: short_of_memory})
    with pytest.raises(torch.OutOfMemoryError):
        run(optimizer, grads[3:4])
    assert _unchanged(optimizer, kept)
    shard.kernels = whole
    run(optimizer, grads[3:])
    same(optimizer, untouched)


def test_a_full_gpu(gpu, run, same):
    """The device itself refuses: no block is free, then a few of them are."""
    shapes = [(4096, 4096)] * 8

    def inputs():
        params = [torch.nn.Parameter(x) for x in _drawn(shapes, 0, gpu.device)]
        return params, [_drawn(shapes, step, gpu.device) for step in (1, 2, 3)]

    optimizers, grads = [], None
    for full in (False, True):
        params, grads = inputs()
        optimizer = gpu.optimizer(params, budget=100_000, total_steps=3)
        run(optimizer, grads[:1])
        kept = _kept(optimizer)
        failures = 0
        for spare in (0, 1 << 20, 4 << 20) if full else ():
            failures += _fails_with(spare, lambda o=optimizer, g=grads: run(o, g[1:2]))
            if optimizer.steps_done > 1:
                break
            assert _unchanged(optimizer, kept)
        assert failures > 0 or not full
        run(optimizer, grads[optimizer.steps_done :])
        optimizers.append(optimizer)
    same(*optimizers)


def _drawn(shapes, seed: int, device) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=generator, device=device) for shape in shapes]


def _fails_with(spare: int, step) -> bool:
    """Whether `step` runs out of memory with so many bytes beyond what is reserved."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)
    try:
        step()
    except torch.OutOfMemoryError:
        return True
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return False
