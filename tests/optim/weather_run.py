"""What each process runs for `test_weather.py`: ranks that differ, and a rank that fails alone."""

import resource
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from split_models import SPLITS, expect, main, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from id3_optim import D3, ID3AdamW, Random
from id3_optim.distributed import agreement, checkpoint
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


def no_memory_left(split):
    """The system refuses memory to one rank inside `step()`, at the first large tensor."""
    group = torch.distributed.new_group(timeout=timedelta(seconds=5))
    model = torch.nn.Sequential(torch.nn.Linear(4000, 4000))
    model = fully_shard(model, mesh=init_device_mesh("cpu", (2,)).from_group(group, "cpu"))
    optimizer = optimizer_of(model, heuristic=D3(), budget=10**6)
    before = resource.getrlimit(resource.RLIMIT_AS)
    begun = time.monotonic()
    if torch.distributed.get_rank() == 1:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**20, before[1]))
        expect(RuntimeError, ".*can't allocate memory", optimizer.step)
        resource.setrlimit(resource.RLIMIT_AS, before)
    else:
        expect(RuntimeError, "[a-z ]+: expected an answer of every rank", optimizer.step)
    assert optimizer.steps_done == 0 and time.monotonic() - begun < 30


def folders(split):
    """What a killed run left is removed, nothing is saved over a checkpoint, and a part of one is refused."""
    model = SPLITS[split](tiny())
    optimizer = optimizer_of(model)
    optimizer.step()
    folder = Path(sys.argv[1]) / "runs" / "step-1"
    left = folder.with_name("step-1.unfinished")
    if torch.distributed.get_rank() == 0:
        left.mkdir(parents=True)
        (left / "__9_0.distcp").write_bytes(b"half")
    torch.distributed.barrier()
    expect(ValueError, "folder: expected a whole checkpoint", lambda: checkpoint.load(left, model, optimizer))
    whole = torch.nn.Linear(2, 2)
    alone = torch.optim.AdamW(whole.parameters())
    expect(ValueError, "optimizer: expected split", lambda: checkpoint.save(folder, whole, alone))
    checkpoint.save(folder, model, optimizer)
    assert [path.name for path in folder.parent.iterdir()] == ["step-1"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    expect(FileExistsError, "folder: expected a new one", lambda: checkpoint.save(folder, model, optimizer))
    again = SPLITS[split](tiny())
    other = optimizer_of(again)
    checkpoint.load(folder, again, other)
    assert other.steps_done == 1
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.to_local(), q.to_local())


def fail(*arguments):
    raise MemoryError("no memory")


if __name__ == "__main__":
    main(globals())
