"""Streams, a device that is not the current one, and a model over two devices."""

import pytest
import torch

SHAPES = [(300, 40), (7,), (64, 64), (513,)]
STEPS = 6


def _needs_two() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")


def test_two_streams_at_once(gpu, oracle, run, same):
    """Two optimizers on two streams, and a stream that is busy when its step is asked for."""
    expected = oracle.optimizer(oracle.params(SHAPES))
    run(expected, oracle.gradients(SHAPES, STEPS))
    grads = gpu.gradients(SHAPES, STEPS)
    optimizers = [gpu.optimizer(gpu.params(SHAPES)) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in optimizers]
    torch.cuda.synchronize()
    for step in range(STEPS):
        for optimizer, stream in zip(optimizers, streams, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(2_000_000)
                run(optimizer, [[g.clone() for g in grads[step]]])
    torch.cuda.synchronize()
    for optimizer in optimizers:
        same(optimizer, expected)


def test_gradients_of_another_stream(gpu, oracle, run, same):
    """A step on the stream that waited for the gradients reads them, not what was there before."""
    expected = oracle.optimizer(oracle.params(SHAPES))
    run(expected, oracle.gradients(SHAPES, STEPS))
    grads, static = gpu.gradients(SHAPES, STEPS), [torch.zeros(shape, device=gpu.device) for shape in SHAPES]
    optimizer, producer = gpu.optimizer(gpu.params(SHAPES)), torch.cuda.Stream()
    torch.cuda.synchronize()
    for row in grads:
        producer.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(producer):
            torch.cuda._sleep(2_000_000)
            for mine, new in zip(static, row, strict=True):
                mine.copy_(new)
        torch.cuda.current_stream().wait_stream(producer)
        run(optimizer, [static])
    same(optimizer, expected)


def test_a_device_that_is_not_the_current_one(gpu, oracle, run, same):
    _needs_two()
    expected = oracle.optimizer(oracle.params(SHAPES), max_grad_norm=1.0)
    run(expected, oracle.gradients(SHAPES, STEPS))
    params = [torch.nn.Parameter(p.detach().to("cuda:1")) for p in gpu.params(SHAPES)]
    optimizer = gpu.optimizer(params, max_grad_norm=1.0)
    grads = [[g.to("cuda:1") for g in row] for row in gpu.gradients(SHAPES, STEPS)]
    with torch.cuda.device(0):
        run(optimizer, grads)
    same(optimizer, expected)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"release_gradients": True}])
def test_a_model_over_two_devices(gpu, oracle, same, options):
    """The best entries of both devices together, as if the model lay on one."""
    _needs_two()
    optimizers = []
    for where, devices in ((gpu, ["cuda:0", "cuda:1"]), (oracle, ["cpu", "cpu"])):
        params = [torch.nn.Parameter(x.to(devices[j // 2])) for j, x in enumerate(where.tensors(SHAPES, 0))]
        optimizer = where.optimizer(params, **options)
        for row in where.gradients(SHAPES, STEPS):
            for p, g in zip(params, row, strict=True):
                (p * g.to(p.device)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizers.append(optimizer)
    same(*optimizers)
