"""The paper's methods and their rivals by name: each is a pool, a heuristic and a strategy of one ID3AdamW.

`prepare` puts the pool into a model and returns the optimizer; the training loop is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import pools, schedules
from .fisher import fisher_scores
from .heuristics import Fisher, Heuristic, Random
from .method_table import LORA_RANK, SELECTIVE, default_rate, describe, names, needs_examples, parts_of
from .optimizer import ID3AdamW
from .validation import check_fresh

__all__ = ["Prepared", "default_rate", "describe", "distances", "embeddings", "names", "prepare", "recipe"]

LossOf = Callable[[nn.Module, Any], Tensor]
SAMPLES = 1024  # examples that a mask is computed from, as in the paper
_DIFF_BATCH, _DIFF_LR = 16, 2e-5


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to train, the same object as was given.

    optimizer: ID3AdamW over the pool; fresh parameters, and what a method trains whole, are dense groups.
    pool_entries: how many entries the pool has. budget: the most of them that training may change.
    after_step: None, or to be called as `after_step(step)` (the first step is 0) after `optimizer.step()` and
        before `zero_grad()`.
    merge: None, or to be called after training: it folds LoRA into the weights and returns the plain model.
    """

    model: nn.Module
    optimizer: ID3AdamW
    pool_entries: int
    budget: int
    after_step: Callable[[int], None] | None = None
    merge: Callable[[], nn.Module] | None = None


def prepare(
    name: str,
    model: nn.Module,
    fresh: Iterable[str] = (),
    *,
    budget: int | float,
    lr: float,
    total_steps: int | None,
    examples: Sequence[Any] = (),
    loss_of: LossOf | None = None,
    seed: int = 0,
    head_options: dict[str, Any] | None = None,
    leave_out: Iterable[str] = (),
    **options: Any,
) -> Prepared:
    """Makes the model trainable by the method `name` (one of `names()`), in place.

    fresh: names of parameters without pre-trained values, such as a new head, which every method trains
        whole. budget: entries, or a share of the model's own pre-trained entries whatever the pool is, so
        that all methods train equally many (a share becomes entries at once, so `grow_budget` does not
        apply); LoRA, AdaLoRA and SHiRA take the largest rank that fits.
    examples: batches of one labelled example; the first 1024 count. loss_of(model, batch): their loss; the
        default is `model(**batch).loss`. head_options: settings of the fresh parameters alone, such as `lr`.
    leave_out: parts of names, such as "embeddings", of parameters that stay frozen.
    options: further arguments of ID3AdamW; they take precedence over the method's own.
    Raises ValueError for an unknown name, missing examples, or a fresh name or part of a name that no
    parameter has, before anything changes.
    """
    method, pool = parts_of(name)
    fresh, leave_out = tuple(fresh), tuple(leave_out)
    head = _fresh_and_left_out(model, name, fresh, leave_out, examples)
    own = sum(p.numel() for p in _trainable(model, head).values())
    entries = schedules.resolve_budget(budget, own)
    with _seeded(seed):
        merge, after_step = _add_pool(method, pool, model, entries, total_steps, seed)
    _freeze(model, head, leave_out, embeddings(model) if method == "recipe" else [])
    groups = _groups(model, head, method not in SELECTIVE, head_options or {})
    sizes = {name: p.numel() for name, p in _trainable(model, head).items()}
    competing = sum(sizes.values())
    chosen = sum(size for name, size in sizes.items() if method != "bitfit" or name.endswith("bias"))
    allowed = min(entries, chosen) if method in SELECTIVE else competing
    if method in SELECTIVE:
        heuristic, strategy = SELECTIVE[method]
        heuristic = _made(heuristic, model, head, examples, loss_of or _own_loss, seed)
        options = {"heuristic": heuristic, "strategy": strategy, **options}
    optimizer = ID3AdamW(groups, lr=lr, budget=allowed, total_steps=total_steps, **options)
    return Prepared(model, optimizer, competing, allowed, after_step, merge)


def recipe(
    model: nn.Module,
    fresh: Iterable[str] = (),
    *,
    total_steps: int | None = None,
    budget: int | float = 0.0017,
    lr: float | None = None,
    **options: Any,
) -> ID3AdamW:
    """Freezes the model's embeddings, in place, and returns an optimizer of a random mask over the rest.

    What `docs/evidence.md` favours for short runs, and it changes with it; `ID3AdamW(...)` has the paper's
    settings. Let the learning rate rise and decay as always. A mask drawn at random selects nothing later, so
    that `sparse_backward(model, optimizer)` makes no weight gradient in any step but the first.

    fresh: names of parameters without pre-trained values, such as a new head; they are trained whole, at the
        same rate (`head_options={"lr": …}` for another). total_steps: of the run; None where a trainer's
        callback sets it. budget: entries, or a share of the model's own pre-trained entries, embeddings
        included; a share becomes entries at once, so `grow_budget` does not apply. lr: None for that of
        `default_rate`, 1e-2. options: further arguments of ID3AdamW, such as `max_grad_norm` (here 1.0 by
        default) and `weight_decay` (0); a `seed` draws another mask.
    Raises ValueError for a name in `fresh` that no parameter has, before anything changes.
    """
    rate = default_rate("recipe") if lr is None else lr
    options = {"max_grad_norm": 1.0, "weight_decay": 0.0, **options}
    ready = prepare("recipe", model, fresh, budget=budget, lr=rate, total_steps=total_steps, **options)
    return ready.optimizer


def _fresh_and_left_out(
    model: nn.Module, name: str, fresh: Iterable[str], leave_out: Iterable[str], examples: Sequence[Any]
) -> list[Tensor]:
    """The fresh parameters. Raises ValueError for what `prepare` refuses."""
    named = dict(model.named_parameters())
    check_fresh(named, fresh)
    for part in leave_out:
        if not any(part in known for known in named):
            raise ValueError(f"leave_out: expected parts of the model's parameter names, got {part!r}")
    if needs_examples(name) and not len(examples):
        raise ValueError(f"examples: expected labelled examples for the method {name}, got none")
    if name == "head" and not fresh:
        raise ValueError("fresh: expected parameters to train by the method head, got none")
    return [named[known] for known in fresh]


def embeddings(model: nn.Module) -> list[str]:
    """The names of the embeddings' weights; a head that is tied to them is among them."""
    found = {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    return [name for name, p in model.named_parameters() if id(p) in found]


def _trainable(model: nn.Module, head: list[Tensor]) -> dict[str, Tensor]:
    """The parameters that compete for the budget, or that a method trains whole, by name."""
    fresh = {id(p) for p in head}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in fresh}


def _add_pool(method: str, pool: str, model: nn.Module, budget: int, total_steps: int, seed: int):
    """Puts the pool into the model; all else is frozen then. Returns Prepared's `merge` and `after_step`."""
    if method == "head":
        model.requires_grad_(False)
    elif "adapter" in (method, pool):
        pools.add_bottlenecks(model)
    elif pool == "lora":
        return pools.add_lora(model, LORA_RANK, pools.block_layers(model)), None
    elif method in ("lora", "adalora", "shira"):
        rank, layers = pools.largest_rank(model, budget)
        if method == "adalora":
            return pools.add_adalora(model, rank, layers, total_steps)
        add = pools.add_lora if method == "lora" else partial(pools.add_shira, seed=seed)
        return add(model, rank, layers), None
    return None, None


def _freeze(
    model: nn.Module, head: list[Tensor], leave_out: Iterable[str], whole_names: Iterable[str]
) -> None:
    for name, p in model.named_parameters():
        if name in whole_names or any(part in name for part in leave_out):
            p.requires_grad_(False)
    for p in head:
        p.requires_grad_(True)


def _groups(model: nn.Module, head: list[Tensor], whole: bool, head_options: dict[str, Any]) -> list[dict]:
    pool, fresh = _trainable(model, head), {id(p) for p in head}
    groups = [{"params": list(pool.items()), "dense": whole}] if pool else []
    named = [(name, p) for name, p in model.named_parameters() if id(p) in fresh]
    return groups + ([{"params": named, "dense": True, **head_options}] if named else [])


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def _made(
    heuristic: Heuristic | str,
    model: nn.Module,
    head: list[Tensor],
    examples: Sequence[Any],
    loss_of: LossOf,
    seed: int,
) -> Heuristic:
    """The heuristic with its seed, or with the scores that it computes from examples."""
    if isinstance(heuristic, Random):
        return Random(seed)
    if isinstance(heuristic, partial):
        return heuristic()
    if not isinstance(heuristic, str):
        return heuristic
    training = model.training
    model.eval()  # no dropout
    try:
        if heuristic == "fisher":
            scored = fisher_scores(model, examples, loss_of, SAMPLES)
        else:
            scored = distances(model, _trainable(model, head), examples[:SAMPLES], loss_of)
    finally:
        model.train(training)
    return Fisher(scored)


def distances(
    model: nn.Module, params: dict[str, Tensor], examples: Sequence[Any], loss_of: LossOf
) -> dict[str, Tensor]:
    """How far each entry moves while AdamW trains all of `params` on the examples once, in batches of 16.

    The idea of Diff pruning in the form of Ansell et al. (2022): a mask of what moves farthest, in place of a
    learned one. `params` get their values back; gradients of the model are cleared.
    """
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = torch.optim.AdamW(params.values(), lr=_DIFF_LR, weight_decay=0.0)
    for start in range(0, len(examples), _DIFF_BATCH):
        for batch in examples[start : start + _DIFF_BATCH]:
            loss_of(model, batch).backward()
        optimizer.step()
        model.zero_grad()
    moved = {name: (p.detach() - before[name]).float().abs() for name, p in params.items()}
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(before[name])
    return moved


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator at `seed` inside, as it was before outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
