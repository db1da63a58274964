"""What each process runs for `test_weather.py`: ranks that differ, and a rank that fails alone."""

import time
from datetime import timedelta

import torch
from split_models import SPLITS, expect, main, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from id3_optim import ID3AdamW, Random
from id3_optim.distributed import agreement
from id3_optim.state.shard import Shard

DIFFERENT = {
    "budget": {"budget": 9},
    r"budget: .* got 100000000": {"budget": 10**8},
    "total_steps": {"total_steps": 7},
    "total_steps: .* null": {"total_steps": None},
    "heuristic": {"heuristic": Random(1)},
    "strategy": {"strategy": "static"},
    "max_grad_norm": {"max_grad_norm": 2.0},
    "param_groups": {"lr": 3.0},
}


def optimizer_of(model, **options):
    named = list(model.named_parameters())
    for _, p in named:
        p.grad = torch.ones_like(p)
    return ID3AdamW(named, **{"budget": 20, "total_steps": 5, "heuristic": Random(0), **options})


def different(split):
    """Every rank gets the error, before anything changes, and goes on where all agree."""
    odd = torch.distributed.get_rank() == 1
    for name, options in DIFFERENT.items():
        optimizer = optimizer_of(SPLITS[split](tiny()), **(options if odd else {}))
        name = name.partition(":")[0] if not odd else name
        expect(ValueError, f"{name}: expected the same on all|{name}", optimizer.step)
        assert optimizer.steps_done == 0 and optimizer.n_active == 0
    optimizer = optimizer_of(SPLITS[split](tiny()))
    optimizer.step()
    assert optimizer.steps_done == 1


def other_model(split):
    """A parameter of another shape, name or dtype; another version of the library."""
    odd = torch.distributed.get_rank() == 1
    models = {"shapes": torch.nn.Linear(8, 6 if odd else 4), "params": torch.nn.Linear(8, 4, bias=not odd)}
    for name, model in models.items():
        optimizer = optimizer_of(SPLITS[split](torch.nn.Sequential(model)))
        expect(ValueError, f"({name}|params): expected the same on all 2 ranks", optimizer.step)
    right = agreement.metadata.version
    agreement.metadata.version = lambda package: "0.0.1" if odd else right(package)
    try:
        optimizer = optimizer_of(SPLITS[split](tiny()))
        expect(ValueError, "id3-optim: expected the same on all 2 ranks", optimizer.step)
    finally:
        agreement.metadata.version = right


def out_of_memory(split):
    """A rank that fails inside `step()` gets its error; the other one gets one soon, which says at what."""
    mesh = init_device_mesh("cpu", (2,))
    group = torch.distributed.new_group(timeout=timedelta(seconds=3))
    mesh = type(mesh).from_group(group, "cpu")
    optimizer = optimizer_of(fully_shard(tiny(), mesh=mesh))
    optimizer.step()
    begun, join = time.monotonic(), Shard.join
    if torch.distributed.get_rank() == 1:
        Shard.join = fail
        expect(MemoryError, "no memory", optimizer.step)
        Shard.join = join
        assert optimizer.steps_done == 1
    else:
        optimizer.step()
        expect(RuntimeError, "the choice of entries: expected an answer of every rank", optimizer.step)
    assert time.monotonic() - begun < 20


def fail(*arguments):
    raise MemoryError("no memory")


if __name__ == "__main__":
    main(globals())
