"""The data of `id3-optim train`: labelled text (CSV, TSV), and prompts with completions (JSONL).

Reading, tokenising, padding and metrics; every mistake in a file is a ValueError that names the file and the
line.
"""

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

IGNORED = -100  # torch.nn.CrossEntropyLoss leaves targets of this value out


class LabelledText(NamedTuple):
    texts: tuple[str, ...]  # one sentence, or the two of a pair
    label: str


class Completion(NamedTuple):
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
    """The task that a file's ending stands for."""
    suffix = Path(path).suffix.lower()
    kinds = {".csv": "classification", ".tsv": "classification", ".jsonl": "causal-lm"}
    if suffix not in kinds:
        raise ValueError(f"--task: can not be told from {path}: expected .csv, .tsv or .jsonl, or --task")
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
            f"{train}: column {label_column!r} has one label only ({labels[0]!r}): nothing to learn"
        )
    unknown = sorted({row.label for row in eval_rows} - set(labels))
    if unknown:
        raise ValueError(
            f"{eval}: label {unknown[0]!r} does not occur in {train} ({len(unknown)} such labels)"
        )
    return Task(kind, rows, eval_rows, labels)


def sorted_labels(labels: set[str]) -> list[str]:
    """By number where all are whole numbers (so that label 10 follows 9), else by text."""
    numeric = all(label.removeprefix("-").isdecimal() for label in labels)
    return sorted(labels, key=int if numeric else str)


def read_labelled(path: str, text_columns: list[str], label_column: str) -> list[LabelledText]:
    """CSV with the usual quoting, TSV (by the file's ending) without any; the first row names the columns."""
    tab = Path(path).suffix.lower() == ".tsv"
    dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, **dialect)
        columns = reader.fieldnames or []
        for column in (*text_columns, label_column):
            if columns and column not in columns:
                raise ValueError(
                    f"{path}: no column {column!r}; the columns are {', '.join(map(repr, columns))}"
                )
        rows = []
        for row in reader:
            fields = [row[column] for column in (*text_columns, label_column)]
            if None in row or None in fields:
                raise ValueError(f"{path}:{reader.line_num}: expected {len(columns)} fields")
            rows.append(LabelledText(tuple(fields[:-1]), fields[-1].strip()))
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def read_completions(path: str) -> list[Completion]:
    """JSONL: one object a line, with the strings `prompt` and `completion`; other keys are left alone."""
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
            for key in Completion._fields:
                if not isinstance(row, dict) or not isinstance(row.get(key), str):
                    raise ValueError(f"{path}:{number}: expected an object with the string {key!r}")
            if not row["completion"]:
                raise ValueError(f"{path}:{number}: the completion is empty: nothing to learn")
            rows.append(Completion(row["prompt"], row["completion"]))
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def encode(rows: list, task: Task, tokenizer, max_length: int) -> list[dict]:
    """Rows as the model's inputs (lists of ints, not padded), with `labels`."""
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
    """Prompt, completion, end of text; the loss sees the last two. The prompt's beginning is cut first."""
    prompt = tokenizer(row.prompt)["input_ids"]
    completion = tokenizer(row.completion, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    # One place is kept for the prompt: the first token of a sequence is never predicted.
    completion = completion[: max_length - 1]
    prompt = prompt[-(max_length - len(completion)) :]
    tokens = prompt + completion
    return {
        "input_ids": tokens,
        "attention_mask": [1] * len(tokens),
        "labels": [IGNORED] * len(prompt) + completion,
    }


def padding_token(tokenizer) -> int:
    """The tokenizer's own, else the end of text, else 0: padding is masked out of attention and loss."""
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
    """For the Trainer's `preprocess_logits_for_metrics`: keeps [rows] or [rows, 2] numbers of the logits."""

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
    """For the Trainer's `compute_metrics`: accuracy, or the mean loss of a token and its perplexity."""

    def accuracy(prediction):
        return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}

    def perplexity(prediction):
        loss, tokens = prediction.predictions.sum(axis=0, dtype=np.float64)
        return {"token_loss": loss / tokens, "perplexity": math.exp(min(loss / tokens, 700.0))}

    return perplexity if kind == "causal-lm" else accuracy
