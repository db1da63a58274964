"""The metrics of `id3-optim train`: what is kept of logits, and the numbers of each kind of task."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

IGNORED = -100  # torch.nn.CrossEntropyLoss excludes targets of this value
NAMES = ("accuracy", "matthews", "f1", "precision", "recall", "pearson", "spearman")
NAMES += ("token_loss", "perplexity", "loss")


def picked(measured: dict[str, Any], *prefixes: str) -> dict[str, float]:
    """The metrics among what the Trainer has measured under the prefixes, in the order of `NAMES`."""
    names = (f"{prefix}_{name}" for prefix in prefixes for name in NAMES)
    return {name: float(measured[name]) for name in names if name in measured}


def reduce_logits(kind: str) -> Callable:
    """The Trainer's `preprocess_logits_for_metrics`: classes, scores [rows], or [rows, 2] the loss of a row
    and the number of its tokens."""

    def predicted_class(logits, labels):
        return _first(logits).argmax(-1)

    def score(logits, labels):
        return _first(logits).squeeze(-1).float()

    def summed_loss(logits, labels):
        losses = torch.nn.functional.cross_entropy(
            _first(logits)[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).view(len(labels), -1)
        return torch.stack([losses.sum(1), (labels[:, 1:] != IGNORED).sum(1)], dim=1)

    return {"causal-lm": summed_loss, "regression": score}.get(kind, predicted_class)


def _first(logits):
    return logits[0] if isinstance(logits, tuple) else logits


def metrics(kind: str, labels: Sequence[str] = ()) -> Callable[[Any], dict[str, float]]:
    """The Trainer's `compute_metrics` of a kind of task. labels: the classes in order, as tags of tokens."""

    def classes(prediction):
        right = float(np.mean(prediction.predictions == prediction.label_ids))
        return {"accuracy": right, "matthews": matthews(prediction.predictions, prediction.label_ids)}

    def scores(prediction):
        given, expected = (np.ravel(x) for x in (prediction.predictions, prediction.label_ids))
        return {"pearson": pearson(given, expected), "spearman": pearson(ranks(given), ranks(expected))}

    def tags(prediction):
        return entity_scores(prediction.predictions, prediction.label_ids, labels)

    def perplexity(prediction):
        loss, tokens = prediction.predictions.sum(axis=0, dtype=np.float64)
        return {"token_loss": loss / tokens, "perplexity": math.exp(min(loss / tokens, 700.0))}

    kinds = {"causal-lm": perplexity, "regression": scores, "token-classification": tags}
    return kinds.get(kind, classes)


def matthews(given: np.ndarray, expected: np.ndarray) -> float:
    """The correlation of Matthews, for more than two classes Gorodkin's; 0 where one side has one class."""
    n = 1 + int(max(given.max(), expected.max()))
    table = np.zeros((n, n))
    np.add.at(table, (expected, given), 1)
    total, rows, columns = table.sum(), table.sum(1), table.sum(0)
    spread = (total**2 - columns @ columns) * (total**2 - rows @ rows)
    return float((np.trace(table) * total - rows @ columns) / math.sqrt(spread)) if spread else 0.0


def pearson(given: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant."""
    a, b = (np.asarray(x, dtype=np.float64) - np.mean(x, dtype=np.float64) for x in (given, expected))
    size = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value; equal values share the mean of their ranks, as Spearman's correlation needs."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[at]


def entity_scores(given: np.ndarray, expected: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Precision, recall and F1 of entities, whose type and both ends must match, and the accuracy of tags.

    given, expected: numbers of tags [rows, length]; positions where `expected` is `IGNORED` do not count.
    """
    found = wanted = both = tokens = right = 0
    for row, gold in zip(given, expected, strict=True):
        kept = gold != IGNORED
        ours, theirs = ({*entities([labels[i] for i in x[kept]])} for x in (row, gold))
        found, wanted, both = found + len(ours), wanted + len(theirs), both + len(ours & theirs)
        tokens, right = tokens + int(kept.sum()), right + int((row[kept] == gold[kept]).sum())
    precision, recall = both / max(found, 1), both / max(wanted, 1)
    f1 = 2 * both / max(found + wanted, 1)
    return {"f1": f1, "precision": precision, "recall": recall, "accuracy": right / max(tokens, 1)}


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first, end) of each entity in tags of the schemes IOB1 and IOB2, as conlleval reads them.

    An entity begins at `B-`, and at `I-` after `O` or another type. Tags without a hyphen but "O" are types.
    """
    found: list[tuple[str, int, int]] = []
    kind_before = ""
    for at, tag in enumerate(tags):
        prefix, hyphen, kind = tag.partition("-")
        kind = "" if tag == "O" else kind if hyphen else tag
        if kind and (prefix == "B" or kind != kind_before):
            found.append((kind, at, at + 1))
        elif kind:
            found[-1] = (kind, found[-1][1], at + 1)
        kind_before = kind
    return found
