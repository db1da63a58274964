"""The data of `id3-optim train`: labelled text (CSV, TSV), and prompts with completions (JSONL).

Reading, tokenising, padding and metrics. A mistake in a file raises ValueError with the file and the line.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

IGNORED = -100  # torch.nn.CrossEntropyLoss excludes targets of this value


class LabelledText(NamedTuple):
    """A row of a classification task."""

    texts: tuple[str, ...]  # one sentence, or the two of a pair
    label: str


class Completion(NamedTuple):
    """A row of a causal language model's task."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Task:
    """`kind` is "classification" or "causal-lm"; `labels` (classification only) orders the classes."""

    kind: str
    train: list
    eval: list
    labels: list[str]


def infer_kind(path: str) -> str:
    """The task for the ending of a file's name. Raises ValueError for an unknown ending."""
    suffix = Path(path).suffix.lower()
    kinds = {".csv": "classification", ".tsv": "classification", ".jsonl": "causal-lm"}
    if suffix not in kinds:
        raise ValueError(
            f"--train: expected a name in .csv, .tsv or .jsonl, got {path}; name it so or give --task"
        )
    return kinds[suffix]


def read_task(
    train: str,
    eval: str,
    *,
    kind: str | None = None,
    text_columns: list[str] | None = None,
    label_column="label",
) -> Task:
    """Reads both files. The label set is that of `train`; a label that only `eval` has is refused."""
    kind = kind or infer_kind(train)
    if kind == "causal-lm":
        return Task(kind, read_completions(train), read_completions(eval), [])
    text_columns = text_columns or ["text"]
    rows = read_labelled(train, text_columns, label_column)
    eval_rows = read_labelled(eval, text_columns, label_column)
    labels = sorted_labels({row.label for row in rows})
    if len(labels) < 2:
        raise ValueError(
            f"{train}: expected two labels or more in column {label_column!r}, got {labels[0]!r} alone"
        )
    unknown = sorted({row.label for row in eval_rows} - set(labels))
    if unknown:
        raise ValueError(
            f"{eval}: expected labels that occur in {train}, got {', '.join(map(repr, unknown[:5]))} "
            f"({len(unknown)} such labels)"
        )
    return Task(kind, rows, eval_rows, labels)


def sorted_labels(labels: set[str]) -> list[str]:
    """By number where all are whole numbers (so that label 10 follows 9), else by text."""
    numeric = all(label.removeprefix("-").isdecimal() for label in labels)
    return sorted(labels, key=int if numeric else str)


def read_labelled(path: str, text_columns: list[str], label_column: str) -> list[LabelledText]:
    """Reads CSV with quoting, or TSV (by the file's ending) without; the first row names the columns."""
    tab = Path(path).suffix.lower() == ".tsv"
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, **dialect)
        columns = reader.fieldnames or []
        for column in (*text_columns, label_column):
            if columns and column not in columns:
                raise ValueError(
                    f"{path}: expected a column {column!r}, got {', '.join(map(repr, columns))}; "
                    "choose with --text-column and --label-column"
                )
        rows = []
        for row in reader:
            fields = [row[column] for column in (*text_columns, label_column)]
            if None in row or None in fields:
                n = sum(value is not None for name, value in row.items() if name is not None) + len(
                    row.get(None, [])
                )
                raise ValueError(f"{path}:{reader.line_num}: expected {len(columns)} fields, got {n}")
            rows.append(LabelledText(tuple(fields[:-1]), fields[-1].strip()))
    if not rows:
        raise ValueError(f"{path}: expected rows, got none")
    return rows


def read_completions(path: str) -> list[Completion]:
    """Reads JSONL: an object per line, with the strings `prompt` and `completion`; ignores other keys."""
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                got = _shortened(line.strip())
                raise ValueError(f"{path}:{number}: expected JSON, got {got} ({error.msg})") from None
            for key in ("prompt", "completion"):
                if not isinstance(row, dict) or not isinstance(row.get(key), str):
                    got = _shortened(row)
                    raise ValueError(
                        f"{path}:{number}: expected an object with the string {key!r}, got {got}"
                    )
            if not row["completion"]:
                raise ValueError(f"{path}:{number}: completion: expected a text to learn, got ''")
            rows.append(Completion(row["prompt"], row["completion"]))
    if not rows:
        raise ValueError(f"{path}: expected rows, got none")
    return rows


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def encode(rows: list, task: Task, tokenizer, max_length: int) -> list[dict]:
    """The model's inputs for each row (lists of ints, not padded), with `labels`."""
    if task.kind == "causal-lm":
        return [encode_completion(row, tokenizer, max_length) for row in rows]
    number = {label: i for i, label in enumerate(task.labels)}
    columns = zip(*(row.texts for row in rows), strict=True)
    encoded = tokenizer(*map(list, columns), truncation=True, max_length=max_length)
    return [
        {**{key: values[i] for key, values in encoded.items()}, "labels": number[row.label]}
        for i, row in enumerate(rows)
    ]


def encode_completion(row: Completion, tokenizer, max_length: int) -> dict:
    """Prompt, completion, end of text; the loss covers the last two. The prompt's beginning is cut first."""
    prompt = tokenizer(row.prompt)["input_ids"]
    completion = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    # One token is reserved for the prompt: the first token of a sequence is never predicted.
    completion = completion[: max_length - 1]
    prompt = prompt[-(max_length - len(completion)) :]
    tokens = prompt + completion
    return {
        "input_ids": tokens,
        "attention_mask": [1] * len(tokens),
        "labels": [IGNORED] * len(prompt) + completion,
    }


def padding_token(tokenizer) -> int:
    """The padding token, else the end of text, else 0; attention and loss mask padding out."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def collate(rows: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch [rows, longest row], padded on the right; class labels stay [rows]."""
    filler = {"input_ids": pad_token_id, "labels": IGNORED}
    batch = {}
    for key, first in rows[0].items():
        values = [row[key] for row in rows]
        if not isinstance(first, int):
            longest = max(map(len, values))
            values = [value + [filler.get(key, 0)] * (longest - len(value)) for value in values]
        batch[key] = torch.tensor(values)
    return batch


def reduce_logits(kind: str):
    """The Trainer's `preprocess_logits_for_metrics`: reduces logits to [rows] or [rows, 2] numbers."""

    def predicted_class(logits, labels):
        return logits.argmax(-1)

    def summed_loss(logits, labels):
        logits = logits[0] if isinstance(logits, tuple) else logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels[:, 1:].flatten(),
            ignore_index=IGNORED,
            reduction="none",
        ).view(len(labels), -1)
        return torch.stack([losses.sum(1), (labels[:, 1:] != IGNORED).sum(1)], dim=1)

    return summed_loss if kind == "causal-lm" else predicted_class


def metrics(kind: str):
    """The Trainer's `compute_metrics`: accuracy, or the mean loss of a token and its perplexity."""

    def accuracy(prediction):
        return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}

    def perplexity(prediction):
        loss, tokens = prediction.predictions.sum(axis=0, dtype=np.float64)
        return {"token_loss": loss / tokens, "perplexity": math.exp(min(loss / tokens, 700.0))}

    return perplexity if kind == "causal-lm" else accuracy
