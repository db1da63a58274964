"""FSDP2 in a plain loop: `torchrun --nproc-per-node 2 examples/fsdp2.py --output runs/fsdp2`."""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from id3_optim import ID3AdamW, save_delta
from id3_optim.distributed.checkpoint import load, save


def build(steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)  # before the optimizer, which takes the parameters as they are now
    options = {"lr": 1e-2, "budget": 0.05, "total_steps": steps, "max_grad_norm": 1.0}
    return model, ID3AdamW(model.named_parameters(), **options)


def train(model, optimizer, first, last):
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        x = torch.randn(16, 32, generator=generator)
        nn.functional.cross_entropy(model(x), x[:, :8].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    half = arguments.output / f"step-{arguments.steps // 2}"
    model, optimizer = build(arguments.steps)
    train(model, optimizer, 0, arguments.steps // 2)
    save(half, model, optimizer)

    model, optimizer = build(arguments.steps)  # as a new run would, with any number of ranks
    load(half, model, optimizer)
    train(model, optimizer, arguments.steps // 2, arguments.steps)
    save_delta(arguments.output / "delta.safetensors", model, optimizer)
    if dist.get_rank() == 0:
        print(f"{optimizer.n_active} of {optimizer.n_entries} entries trained, {optimizer.steps_done} steps")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
