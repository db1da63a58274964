"""The tasks of the grids, and their files from a folder of data in the formats of GLUE and PolyAI.

The folder has `CoLA`, `MRPC`, `SST-2` (train.tsv and dev.tsv, tab-separated without quoting), `banking77`
(train.csv and test.csv) and `math` (gsm8k.train.jsonl). Only banking77 is part of this project; the other
data has terms of its own.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks.render import ROOT


@dataclass(frozen=True)
class Task:
    """folder, train, eval: of the data; text, label: its columns; rows: a fixed subset of the training rows.

    steps, batch, length: of a run. tune: steps of the longest tuning runs; as many as a run's where shorter
    ones give one label to all rows. evaluations: in its course; on the rows of three training steps one costs
    as much as a step. A text column has the same name in the files that are written. One of kind causal-lm
    has questions and answers in a single file, whose last `KEPT_ROWS` are measured on.
    """

    folder: str
    train: str
    eval: str
    text: tuple[str, ...]
    label: str
    metric: str
    rows: int | None = None
    steps: int = 1000
    tune: int = 500
    batch: int = 16
    length: int = 64
    evaluations: int = 4
    kind: str = "classification"


KEPT_ROWS = 500
TASKS = {
    "cola": Task(
        "CoLA", "train.tsv", "dev.tsv", ("sentence1",), "label", "matthews", tune=1000, evaluations=10
    ),
    "mrpc": Task("MRPC", "train.tsv", "dev.tsv", ("sentence1", "sentence2"), "label", "accuracy", length=96),
    "sst2": Task("SST-2", "train.tsv", "dev.tsv", ("sentence1",), "label", "accuracy", rows=16000),
    "banking77": Task("banking77", "train.csv", "test.csv", ("text",), "category", "accuracy", batch=32),
    "gsm8k": Task(
        "math",
        "gsm8k.train.jsonl",
        "gsm8k.train.jsonl",
        ("question",),
        "answer",
        "token_loss",
        steps=500,
        tune=250,
        batch=8,
        length=256,
        evaluations=2,
        kind="causal-lm",
    ),
}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file: tab-separated without quoting, or CSV."""
    with open(path, encoding="utf-8", newline="") as file:
        plain = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        return list(csv.DictReader(file, **plain))


def prepare(name: str, data: Path | None, target: Path) -> tuple[Path, Path]:
    """Writes a task's two files as CSV or JSONL, which `id3-optim` reads; returns their paths.

    data: the folder of all data; None: banking77 of this project. Raises FileNotFoundError for a task whose
    data is not there.
    """
    task = TASKS[name]
    inside = ROOT / "examples" if data is None else data
    written = []
    for part, file in (("train", task.train), ("eval", task.eval)):
        source = inside / task.folder / file
        if not source.is_file():
            raise FileNotFoundError(f"--data: expected {source}, got none: the task {name} needs it")
        if task.kind == "causal-lm":
            return _write_completions(task, source, target, name)
        rows = read_rows(source)
        if part == "train" and task.rows is not None and task.rows < len(rows):
            rows = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), task.rows))]
        written.append(_write(target / f"{name}.{part}.csv", rows, [*task.text, task.label]))
    return written[0], written[1]


def _write(path: Path, rows: list[dict[str, str]], columns: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row for row in rows if all(row[column].strip() for column in columns))
    return path


def _write_completions(task: Task, source: Path, target: Path, name: str) -> tuple[Path, Path]:
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    written = [{"prompt": f"Q: {row[task.text[0]]}\nA: ", "completion": row[task.label]} for row in rows]
    target.mkdir(parents=True, exist_ok=True)
    paths = target / f"{name}.train.jsonl", target / f"{name}.eval.jsonl"
    for path, part in zip(paths, (written[:-KEPT_ROWS], written[-KEPT_ROWS:]), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return paths
