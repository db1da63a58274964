"""A run with all that moves (dropout, scheduler, accumulation, a dense head), stopped anywhere."""

import random

import pytest
import torch
from torch import nn

from id3_optim import ID3AdamW
from id3_optim.schedules import cosine

STEPS = 60


class Run:
    """A small classifier on made data; `save` and `load` hold all that a trainer's checkpoint holds."""

    def __init__(self, dtype):
        torch.manual_seed(0)
        body = nn.Sequential(
            nn.Embedding(50, 24), nn.Flatten(), nn.Linear(96, 32), nn.GELU(), nn.Dropout(0.1)
        )
        self.model = nn.Sequential(body, nn.Linear(32, 4)).to(dtype)
        groups = [
            {"params": list(body.named_parameters("0")), "weight_decay": 0.1},
            {"params": list(self.model[1].named_parameters("1")), "dense": True, "lr": 1e-3},
        ]
        self.optimizer = ID3AdamW(
            groups, lr=5e-3, budget=0.05, total_steps=STEPS - 10, schedule=cosine, max_grad_norm=1.0
        )
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, STEPS)

    def train(self, begin, end):
        for _ in range(begin, end):
            for _ in range(2):  # micro-batches
                tokens = torch.randint(0, 50, (8, 4))
                loss = nn.functional.cross_entropy(self.model(tokens).float(), tokens[:, 0] % 4)
                (loss / 2).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def save(self, path):
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**state, "generator": torch.get_rng_state()}, path)

    def load(self, path):
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["generator"])


def bits(value):
    """Nested states as plain values, tensors as their bytes."""
    if isinstance(value, torch.Tensor):
        return (
            value.dtype,
            tuple(value.shape),
            value.contiguous().view(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_resumed_from_20_random_checkpoints_ends_in_the_same_bits(tmp_path, dtype):
    stops = sorted(random.Random(5).sample(range(1, STEPS), 20))
    straight = Run(dtype)
    begin = 0
    for stop in stops:
        straight.train(begin, stop)
        straight.save(tmp_path / f"{stop}.pt")
        begin = stop
    straight.train(begin, STEPS)
    assert straight.optimizer.n_active == straight.optimizer.budget > 0
    for stop in stops:
        resumed = Run(dtype)
        resumed.load(tmp_path / f"{stop}.pt")
        resumed.train(stop, STEPS)
        assert bits(resumed.model.state_dict()) == bits(straight.model.state_dict()), stop
        assert bits(resumed.optimizer.state_dict()) == bits(straight.optimizer.state_dict()), stop
