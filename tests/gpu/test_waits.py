"""`step()` never waits for the GPU."""

import pytest
import torch

SHAPES = [(300, 40), (7,), (64, 64), (513,)]
ONE_GROUP = {
    "plain": {},
    "clipped": {"max_grad_norm": 0.5},
    "entry": {"bias_correction": "entry", "max_grad_norm": 0.5},
    "warm-up": {"entry_warmup": 10},
    "cap": {"tensor_cap": 0.5},
    "without originals": {"keep_originals": False},
    "static": {"strategy": "static"},
    "capturable": {"capturable": True, "max_grad_norm": 0.5},
}


def test_a_wait_is_seen(gpu):
    """These tests can fail."""
    with pytest.raises(RuntimeError, match="synchroniz"), gpu.no_waits():
        torch.ones(1, device=gpu.device).item()


@pytest.mark.parametrize("released", [False, True])
def test_the_host_runs_ahead_of_a_busy_gpu(gpu, run, released):
    """Sees what the sync debug mode does not: a wait inside a kernel's launcher, a copy from the host."""
    params = gpu.params(SHAPES)
    optimizer = gpu.optimizer(params, release_gradients=released, max_grad_norm=1.0)
    grads = gpu.gradients(SHAPES, 6)
    run(optimizer, grads[:3])
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # two seconds or so
    run(optimizer, grads[3:])
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ONE_GROUP.values(), ids=ONE_GROUP)
def test_one_group(place, oracle, run, same, options, dtype):
    optimizers = []
    for where in (place, oracle):
        optimizer = where.optimizer(where.params(SHAPES, dtype), **options)
        grads = where.gradients(SHAPES, 6, dtype)
        run(optimizer, grads[:2])
        with where.no_waits():
            run(optimizer, grads[2:])
        optimizers.append(optimizer)
    same(*optimizers)


def _groups(where, dtypes):
    """A group for each dtype, with its own numbers, and a dense one."""
    groups = [
        {"params": where.params(SHAPES, dtype), "lr": 10.0**-i, "weight_decay": 0.1 * i}
        for i, dtype in enumerate(dtypes)
    ]
    return [*groups, {"params": where.params([(5, 3)]), "dense": True}]


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)], ids=["one dtype", "mixed"]
)
def test_several_groups(place, oracle, run, dtypes):
    """Dense groups are torch's own on either side, so the sparse ones alone must have the same bits."""
    kept = []
    for where in (place, oracle):
        groups = _groups(where, dtypes)
        optimizer = where.optimizer(groups)
        parts = [where.gradients(SHAPES, 5, dtype) for dtype in dtypes] + [where.gradients([(5, 3)], 5)]
        grads = [[g for part in parts for g in part[step]] for step in range(5)]
        run(optimizer, grads[:2])
        with where.no_waits():
            run(optimizer, grads[2:])
        kept.append([p.detach().cpu() for group in groups[:-1] for p in group["params"]])
        assert optimizer.n_active > 0
    assert all(map(torch.equal, *kept))


def test_a_learning_rate_on_the_device(place, oracle, run, same):
    optimizers = []
    for where in (place, oracle):
        lr = torch.tensor(1e-2, device=where.device)
        optimizer = where.optimizer(where.params(SHAPES), lr=lr)
        grads = where.gradients(SHAPES, 6)
        run(optimizer, grads[:2])
        with where.no_waits():
            for one in grads[2:]:
                lr.mul_(0.5)
                run(optimizer, [one])
        optimizers.append(optimizer)
    same(*optimizers)


def test_a_gradient_that_is_missing(place, oracle, run, same):
    optimizers = []
    for where in (place, oracle):
        optimizer = where.optimizer(where.params(SHAPES))
        grads = [[None if j == step % 3 else g for j, g in enumerate(row)]
                 for step, row in enumerate(where.gradients(SHAPES, 9))]  # fmt: skip
        run(optimizer, grads[:3])  # every pattern once: its first time copies a mask
        with where.no_waits():
            run(optimizer, grads[3:])
        optimizers.append(optimizer)
    same(*optimizers)


@pytest.mark.parametrize("select_from", ["last", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_gradients(place, oracle, same, dtype, select_from):
    """The hooks in the backward pass, two micro-batches to a step, and the step."""
    optimizers = []
    for where in (place, oracle):
        params = where.params(SHAPES, dtype)
        optimizer = where.optimizer(
            params, release_gradients=True, select_from=select_from, max_grad_norm=1.0
        )
        grads = where.gradients(SHAPES, 10, dtype)

        def step(first, params=params, optimizer=optimizer, grads=grads):
            for row in grads[first : first + 2]:
                torch.autograd.backward([(p * g).sum() for p, g in zip(params, row, strict=True)])
            assert all(p.grad is None for p in params)
            optimizer.step()

        step(0)
        step(2)
        with where.no_waits():
            step(4)
            step(6)
            step(8)
        optimizers.append(optimizer)
    same(*optimizers)
