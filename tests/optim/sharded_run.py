"""What each of two processes runs for `test_sharded.py`: every way in which a trainer splits parameters.

Writes the error of each case, None where there was none, into rank-<rank>.json.
"""

import functools
import json
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from id3_optim import ID3AdamW, save_delta

OPTIONS = {"budget": 10, "total_steps": 2}


def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def fsdp1(model, use_orig_params):
    device = torch.device("cpu")
    return FullyShardedDataParallel(model, use_orig_params=use_orig_params, device_id=device)


def step(model, optimizer):
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()


def optimizer_last(wrap):
    ID3AdamW(wrap(tiny()).named_parameters(), **OPTIONS)


def optimizer_first(wrap, folder, then):
    model = tiny()
    optimizer = ID3AdamW(model.named_parameters(), **OPTIONS)
    model = wrap(model)
    if then == "step":
        step(model, optimizer)
    elif then == "replace and step":  # as Accelerate does
        optimizer.param_groups[0]["params"][:] = model.parameters()
        step(model, optimizer)
    elif then == "save":
        save_delta(folder / "delta.safetensors", model, optimizer)


def zero(optimizer_class, **options):
    ZeroRedundancyOptimizer(tiny().parameters(), optimizer_class=optimizer_class, **options)


def ddp():
    model = nn.parallel.DistributedDataParallel(tiny())
    step(model, ID3AdamW(model.named_parameters(), **OPTIONS))


def cases(folder):
    """Name → what is tried."""
    found = {"ddp": ddp}
    for use_orig_params in (True, False):
        wrap, name = functools.partial(fsdp1, use_orig_params=use_orig_params), f"fsdp1 {use_orig_params}"
        found[name] = functools.partial(optimizer_last, wrap)
        found[f"{name}, save"] = functools.partial(optimizer_first, wrap, folder, "save")
    wrap = functools.partial(fsdp1, use_orig_params=True)
    found["fsdp1 True, step"] = functools.partial(optimizer_first, wrap, folder, "step")
    found["fsdp2"] = functools.partial(optimizer_last, fully_shard)
    found["fsdp2, save"] = functools.partial(optimizer_first, fully_shard, folder, "save")
    found["fsdp2, step"] = functools.partial(optimizer_first, fully_shard, folder, "replace and step")
    found["zero"] = functools.partial(zero, ID3AdamW, **OPTIONS)
    found["zero, partial"] = functools.partial(zero, functools.partial(ID3AdamW, **OPTIONS), lr=1e-2)
    found["zero, AdamW"] = functools.partial(zero, torch.optim.AdamW)
    return found


def main(folder):
    torch.distributed.init_process_group("gloo")
    errors = {}
    for name, tried in cases(folder).items():
        try:
            errors[name] = tried()
        except ValueError as error:
            errors[name] = str(error)
    rank = torch.distributed.get_rank()
    (folder / f"rank-{rank}.json").write_text(json.dumps(errors))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
