"""A folder with all files that the commands of `id3-optim` read, the commands on them, and its contents."""

import os
import shutil
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from delta_files import save_files
from test_toolkit import SelectivePeftSummary, summary_of
from tiny_models import write_completions, write_reviews
from transformers import AutoModel

from id3_optim import load_delta
from id3_optim.cli import main

TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
MODEL = ["config.json", "model.safetensors"]
CHECKPOINT = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
QUICK = "--steps 2 --batch-size 4 --cpu --log-every 1 --max-length 8 --budget 50"
# What is done: the words of the command, and the files that it reads. Of the outputs those named old* exist.
COMMANDS = {
    "inspect": ("inspect one --plot old.png", ["one/delta.safetensors"]),
    "apply": (
        "apply one --model bert --output new",
        ["one/delta.safetensors", "one/config.json", *(f"bert/{name}" for name in [*MODEL, *TOKENIZER])],
    ),
    "revert": (
        "revert one --model tuned --output new",
        ["one/delta.safetensors", "one/config.json", *(f"tuned/{name}" for name in MODEL)],
    ),
    "merge": (
        "merge one two --whole first --output old",
        ["one/delta.safetensors", "two/delta.safetensors"],
    ),
    "diff": (
        "diff --base bert --tuned tuned --output old",
        [f"{folder}/{name}" for folder in ("bert", "tuned") for name in MODEL],
    ),
    "convert": (
        "convert summary.pt --model bert --output old",
        ["summary.pt", *(f"bert/{name}" for name in MODEL)],
    ),
    "estimate": ("estimate --model bert --length 8", ["bert/config.json"]),
    "train": (
        f"train --model bert --train a.csv --eval b.csv --output new --report old.json {QUICK}",
        ["a.csv", "b.csv", *(f"bert/{name}" for name in [*MODEL, *TOKENIZER])],
    ),
    "causal": (
        f"train --model llama --train facts.jsonl --eval facts.jsonl --output new {QUICK}",
        ["facts.jsonl", *(f"llama/{name}" for name in [*MODEL, *TOKENIZER])],
    ),
    "resume": (
        f"train --model bert --train a.csv --eval b.csv --output run --resume --save-every 1 {QUICK}",
        [f"run/checkpoint-1/{name}" for name in CHECKPOINT],
    ),
}


def save_summary(path: Path, model) -> None:
    """What the toolkit writes for `model`, under the name that its class has there."""
    module = types.ModuleType("selective_optimizers.load_store")
    module.SelectivePeftSummary = SelectivePeftSummary
    packages = {"selective_optimizers": types.ModuleType("selective_optimizers"), module.__name__: module}
    with mock.patch.dict(sys.modules, packages):
        torch.save(summary_of(model), path)


def save_all(folder: Path) -> Path:
    save_files(folder)
    save_summary(folder / "summary.pt", AutoModel.from_pretrained(folder / "bert"))
    write_reviews(folder / "a.csv")
    write_reviews(folder / "b.csv", rows=8)
    write_completions(folder / "facts.jsonl")
    load_delta(folder / "two" / "delta.safetensors").save(folder / "old")
    with pytest.MonkeyPatch.context() as patch:  # a run that was stopped after its first step
        patch.chdir(folder)
        assert main(COMMANDS["resume"][0].replace(" --resume", "").split()) == 0
    shutil.move(folder / "run", folder / "whole")
    (folder / "run").mkdir()
    shutil.move(folder / "whole" / "checkpoint-1", folder / "run")
    shutil.rmtree(folder / "whole")
    (folder / "old.png").write_bytes(b"\x89PNG old")
    (folder / "old.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes | None]:
    """Path → content, None for a folder; without what a killed process leaves under a hidden name."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    return {
        name: path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
        for name, path in sorted(found.items())
        if ".partial" not in name and path.parts[-1] != "unfinished" and "unfinished" not in path.parts
    }
