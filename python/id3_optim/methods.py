"""The paper's methods and their rivals by name, each a pool, a heuristic and a strategy of one ID3AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .optimizer import ID3AdamW

LossOf = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to train.

    model: the model to call and to train; with an adapter, the given one with the adapter inside.
    optimizer: ID3AdamW over the pool; fresh parameters, and what a method trains whole, are dense groups.
    budget: the most entries of the pool that training may change.
    after_step: None, or to be called as `after_step(step)` (the first step is 0) after `optimizer.step()` and
        before `zero_grad()`.
    """

    model: nn.Module
    optimizer: ID3AdamW
    budget: int
    after_step: Callable[[int], None] | None = None


def names() -> list[str]:
    """Every name that `prepare` takes: a method (`id3`), or a method and its pool (`id3+lora`)."""
    raise NotImplementedError


def needs_examples(name: str) -> bool:
    """Whether the method scores entries before training, from `examples`."""
    raise NotImplementedError


def prepare(
    name: str,
    model: nn.Module,
    fresh: Iterable[str] = (),
    *,
    budget: int | float,
    lr: float,
    total_steps: int,
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
        that all methods train equally many; LoRA, AdaLoRA and SHiRA take the largest rank that fits.
    examples: batches of one labelled example; the first 1024 count. loss_of(model, batch): their loss; the
        default is `model(**batch).loss`. head_options: settings of the fresh parameters alone, such as `lr`.
    leave_out: parts of names, such as "embeddings", of parameters that stay frozen.
    options: further arguments of ID3AdamW; they take precedence over the method's own.
    Raises ValueError for an unknown name, or for missing examples, before anything changes.
    """
    raise NotImplementedError
