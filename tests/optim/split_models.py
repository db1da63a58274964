"""Ways to split a small model over ranks, its twin in one process, and a program that runs named checks."""

import functools
import json
import logging
import os
import re
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from id3_optim import ID3AdamW
from id3_optim.state.flat import opened


def tiny(dtype=torch.float32):
    """Sizes that 2 and 4 divide, sizes that they do not, and tensors of fewer rows than ranks."""
    torch.manual_seed(0)
    layers = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 9), nn.Linear(9, 3)
    return nn.Sequential(*layers).to(dtype)


# --- ways to split ---------------------------------------------------------------------------------------


def fsdp(model):
    for layer in model:
        fully_shard(layer, mesh=mesh_of("dp"))
    return fully_shard(model, mesh=mesh_of("dp"))


def hsdp(model):
    mesh = mesh_of("replicate", "shard")
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def tensor_parallel(model):
    return parallelize_module(model, mesh_of("tp"), PLAN)


def both(model):
    mesh = mesh_of("dp", "tp")
    parallelize_module(model, mesh["tp"], PLAN)
    for layer in model:
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


@functools.cache
def mesh_of(*names):
    """A mesh of all ranks, 2 by 2 for two names."""
    world = torch.distributed.get_world_size()
    shape = (world,) if len(names) == 1 else (world // 2, 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


SPLITS = {"fsdp": fsdp, "hsdp": hsdp, "tp": tensor_parallel, "both": both}


# --- one process beside many -----------------------------------------------------------------------------


class Twins:
    """A model in one process and its twin over ranks, which are fed the same gradients."""

    def __init__(self, split, dtype=torch.float32, groups=None, **options):
        self.split, self.groups = split, groups
        self.options = {"lr": 1e-2, "budget": 120, "total_steps": 12} | options
        self.one, self.many = tiny(dtype), SPLITS[split](tiny(dtype))
        self.alone, self.ranks = self.optimizer(self.one), self.optimizer(self.many)
        self.done = 0

    def optimizer(self, model):
        named = list(model.named_parameters())
        groups = named if self.groups is None else self.groups(named)
        return ID3AdamW(groups, **self.options)

    def give(self, scale=1.0):
        for (name, p), q in zip(self.one.named_parameters(), self.many.parameters(), strict=True):
            g = gradient(name, p, self.done) * scale
            p.grad, q.grad = g, placed(g, q)

    def spoil(self, value):
        """One gradient on one rank alone is no number."""
        g = gradient("0.weight", self.one[0].weight, self.done)
        g[0, 0] = value
        for model in (self.one, self.many):
            model[0].weight.grad = placed(g, model[0].weight)

    def step(self):
        self.alone.step()
        self.ranks.step()
        self.done += 1

    def steps(self, n):
        for _ in range(n):
            self.give()
            self.step()

    def check(self):
        assert self.ranks.n_active == self.alone.n_active
        dense = {p for group in self.alone.param_groups if group["dense"] for p in group["params"]}
        for (name, p), q in zip(self.one.named_parameters(), self.many.parameters(), strict=True):
            assert equal(p, whole(q), p in dense), f"{name} differs after {self.done} steps"
        same_state(self.alone.state_dict(), self.ranks.state_dict())


def gradient(name, p, step):
    """Heavy-tailed, with ties: many entries have one of four values."""
    generator = torch.Generator().manual_seed(1000 * step + sum(name.encode()))
    g = torch.randn(p.shape, generator=generator) ** 3
    return torch.where(torch.rand(p.shape, generator=generator) < 0.5, g.sign() * 0.5, g).to(p.dtype)


def with_head(named):
    return [{"params": named[:-2]}, {"params": named[-2:], "dense": True, "lr": 1e-3}]


def placed(g, like):
    """g, which every rank has whole, split as a parameter is."""
    if not isinstance(like, DTensor):
        return g.clone()
    return distribute_tensor(g, like.device_mesh, like.placements, src_data_rank=None)


def whole(p):
    return p.full_tensor() if isinstance(p, DTensor) else p


def same_state(one, many):
    many = opened(many)
    for i, state in one["state"].items():
        for name, value in state.items():
            other = many["state"][i][name]
            if not isinstance(value, torch.Tensor):
                assert value == other, (i, name)
            else:
                assert equal(value, whole(other), dense="indices" not in state), (i, name)
    assert one["param_groups"] == many["param_groups"]


def equal(one, many, dense):
    """The same bits. In dense groups torch's AdamW rounds the last bit by an element's place in memory."""
    return torch.allclose(one, many, rtol=1e-6, atol=1e-9) if dense else torch.equal(one, many)


# --- the program of each process -------------------------------------------------------------------------


def expect(kind, pattern, call):
    try:
        call()
    except kind as error:
        assert re.match(pattern, str(error)) and "\n" not in str(error), error
    else:
        raise AssertionError(f"{pattern}: not refused")


def main(checks):
    """Runs the checks "name split" of argument 2, by name in `checks`; writes errors into folder 1."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # torch's advice on how to redistribute
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    found = {}
    for name in sys.argv[2].split(","):
        check, _, split = name.partition(" ")
        try:
            found[name] = checks[check](split)
        except BaseException:  # CheckpointException is no Exception
            found[name] = traceback.format_exc()
    rank = torch.distributed.get_rank()
    (Path(sys.argv[1]) / f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # DTensor's caches keep gloo's threads, which can abort a later end: pytorch#190489
