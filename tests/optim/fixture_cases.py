"""The training runs whose states and deltas of version 0.1.0 are kept in `fixtures/0.1.0`.

Public names of id3_optim alone: the script that wrote the fixtures ran this file with 0.1.0 itself.
"""

from typing import NamedTuple

import torch

from id3_optim import D3, ID3AdamW, Magnitude, Random
from id3_optim.schedules import cosine, exponential

SAVED_AT, END = 3, 6  # steps done: when the state was saved, and after the steps that followed
_COMMON = {"lr": 1e-2, "weight_decay": 0.1, "budget": 0.25, "total_steps": 8}


class Case(NamedTuple):
    """A run. options: ID3AdamW's. dense: the head is a dense group. skipped: no gradient in odd steps."""

    options: dict
    dtype: torch.dtype = torch.float32
    named: bool = True
    dense: bool = False
    skipped: tuple[str, ...] = ()


CASES = {
    "increment": Case({"heuristic": D3(eps=1.0, exp=2.0)}, named=False),
    "bfloat16": Case({"heuristic": D3(eps=0.5, exp=1.0), "schedule": cosine}, torch.bfloat16),
    "dense": Case({"heuristic": Magnitude()}, dense=True),
    "repeat": Case({"strategy": "repeat"}),
    "entry": Case({"bias_correction": "entry", "schedule": exponential(2.0)}, skipped=("layer.bias",)),
    "static": Case({"strategy": "static", "heuristic": Random(7), "keep_originals": False}),
    "released": Case({"release_gradients": True}),
}

# Name of the delta file → the run that it was saved from at its end, and options of `save_delta`.
DELTAS = {
    "plain": ("increment", {}),
    "compact": ("increment", {"compact": True}),
    "originals": ("dense", {"originals": True}),
    "originals-compact": ("bfloat16", {"originals": True, "compact": True}),
    "repeat": ("repeat", {"originals": True}),
    "unknown-base": ("static", {}),
}


def make_model(dtype):
    """176 entries of six parameters."""
    layers = {"layer": torch.nn.Linear(11, 9), "norm": torch.nn.LayerNorm(9), "head": torch.nn.Linear(9, 5)}
    return torch.nn.ModuleDict(layers).to(dtype)


def make_optimizer(model, case, **more):
    """The optimizer of the run, at step 0."""
    named = list(model.named_parameters())
    params = named if case.named else [param for _, param in named]
    if case.dense:
        # torch's AdamW fuses multiply and add on some CPUs only. With betas of 0.5 and gradients of 8
        # significant bits the products are exact, so that both ways give the same bits.
        head = {"params": named[4:], "dense": True, "lr": 1e-3, "betas": (0.5, 0.5)}
        params = [{"params": named[:4]}, head]
    return ID3AdamW(params, **_COMMON | case.options | more)


def take_step(model, optimizer, gradients):
    """One step on gradients by name, each made by a backward pass, which gives exactly these."""
    optimizer.zero_grad()
    params = dict(model.named_parameters())
    sum((params[name] * gradient).sum() for name, gradient in gradients.items()).backward()
    optimizer.step()
