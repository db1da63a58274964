"""O(B) data parallelism: `torchrun --nproc-per-node 2 examples/data_parallel.py --output runs/replicas`."""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from id3_optim import ID3AdamW, save_delta, sparse_backward

MICRO_BATCHES = 2


def build(steps, device):
    torch.manual_seed(0)  # replicas have to begin alike: the first step checks that
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)).to(device)
    options = {"lr": 1e-2, "budget": 0.05, "total_steps": steps, "max_grad_norm": 1.0, "select_every": 4}
    optimizer = ID3AdamW(model.named_parameters(), **options, process_group=dist.group.WORLD)
    sparse_backward(model, optimizer)  # no DistributedDataParallel around the model
    return model, optimizer


def backward(model, seed, device):
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(seed)).to(device)
    (nn.functional.cross_entropy(model(x), x[:, :8].argmax(1)) / MICRO_BATCHES).backward()


def train(model, optimizer, steps, device):
    for step in range(steps):
        first = MICRO_BATCHES * (step * dist.get_world_size() + dist.get_rank())
        with optimizer.no_sync():  # in a step that selects, the last micro-batch chooses
            for i in range(MICRO_BATCHES - 1):
                backward(model, first + i, device)
        backward(model, first + MICRO_BATCHES - 1, device)
        optimizer.step()
        optimizer.zero_grad()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if on_gpu else torch.device("cpu")
    model, optimizer = build(arguments.steps, device)
    train(model, optimizer, arguments.steps, device)
    save_delta(arguments.output / "delta.safetensors", model, optimizer)
    if dist.get_rank() == 0:
        print(f"{optimizer.n_active} of {optimizer.n_entries} entries trained, {optimizer.steps_done} steps")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
