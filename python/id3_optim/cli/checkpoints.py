"""Checkpoints of `id3-optim train`: each is whole, and records the run that it belongs to.

The Trainer writes a checkpoint into `unfinished/` of the output directory. When all its files are there,
the callback adds the record `run.json` and moves the folder to `checkpoint-<step>`. So a killed process or a
full disk leaves the older checkpoints as they were.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers

from ..atomic import sync
from ..distributed.part import full
from ..ranks import launched, meet, writes_files
from .chat import Conversation
from .divergence import FiniteLoss
from .output import UNFINISHED, remove, remove_earlier
from .settings import Settings, option
from .tasks import Task

RECORD = "run.json"
_NAME = re.compile(r"checkpoint-(\d+)")
# Settings in which a resumed run may differ from the one that wrote its checkpoint.
_COMPARED_BY_CONTENT = {"model", "train", "task", "text_column", "label_column", "encoding", "delimiter"}
_WHAT_IS_WRITTEN = {
    "output",
    "overwrite",
    "resume",
    "delta_only",
    "originals",
    "save_every",
    "keep",
    "save_at",
}
_WHAT_IS_WRITTEN |= {"eval", "also_eval", "report", "report_to", "save_plots", "memory_report", "log_every"}
_THE_MACHINE = {"cpu", "backend", "release_gradients", "sparse_backward", "fsdp"}
# A setting that came after the checkpoint was written was at its default.
_DEFAULTS = {field.name: field.default for field in fields(Settings) if field.default is not MISSING}
# And the option of each; tokens depend on the tokenizer, its chat template too.
_HASHES = {"texts": "--train", "labels": "--train", "weights": "--model", "tokens": "--model"}
MAY_DIFFER = _COMPARED_BY_CONTENT | _WHAT_IS_WRITTEN | _THE_MACHINE


def run_record(settings: Settings, task: Task) -> dict[str, Any]:
    """What defines a run, as JSON: settings, processes, hashes of the texts it trains on and their labels."""
    defining = {name: value for name, value in asdict(settings).items() if name not in MAY_DIFFER}
    texts, labels = [(row.messages,) if isinstance(row, Conversation) else row for row in task.train], []
    if task.kind in ("classification", "regression"):
        texts, labels = [row.texts for row in task.train], [row.label for row in task.train]
    hashes = {"texts": _hash([task.kind, texts]), "labels": _hash(labels)}
    return {"settings": defining, "processes": launched()[1], **hashes}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def weights_hash(model: torch.nn.Module, without: set[str]) -> str:
    """A hash of the bits of all parameters but those named in `without`, the same however they are split."""
    digest = hashlib.sha256()
    for name, param in model.named_parameters():
        if name not in without:
            bits = full(param.detach()).cpu().contiguous().flatten().view(torch.uint8)
            digest.update(f"{name} {tuple(param.shape)} {param.dtype}".encode())
            digest.update(memoryview(bits.numpy()))
    return digest.hexdigest()


def tokens_hash(rows: Sequence[dict[str, Any]]) -> str:
    """A hash of the tokens that a run trains on, and of which of them its loss covers."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()


def check_same_run(checkpoint: Path, record: dict[str, Any]) -> None:
    """Raises ValueError, with all differences, unless the checkpoint belongs to the run of `record`.

    A hash that `record` lacks is not compared.
    """
    saved = json.loads((checkpoint / RECORD).read_text())
    there, here = _DEFAULTS | saved["settings"], record["settings"]
    differences = [
        f"{option(name)}: expected {there[name]} as in {checkpoint.name}, got {here[name]}"
        for name in here
        if json.dumps(there[name]) != json.dumps(here[name])
    ]
    processes = saved.get("processes", 1)  # older records do not say
    if processes != record["processes"]:
        expected = f"{processes}, as in {checkpoint.name}"
        differences.append(f"processes: expected {expected}, got {record['processes']}")
    for name, given in _HASHES.items():
        if name in record and saved.get(name, record[name]) != record[name]:  # older records have no tokens
            differences.append(f"{given}: expected the {name} as in {checkpoint.name}, got other {name}")
    if differences:
        raise ValueError("; ".join(differences))


def all_checkpoints(output: Path) -> list[Path]:
    """The folders of checkpoints, the newest first, whole or not."""
    found = [path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: -int(path.name.partition("-")[2]))


def fault(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole; None where all files are as recorded."""
    try:
        files = json.loads((checkpoint / RECORD).read_text())["files"]
        sizes = {name: (checkpoint / name).stat().st_size for name in files if (checkpoint / name).exists()}
    except FileNotFoundError:
        return f"{RECORD} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{RECORD} cannot be read ({type(error).__name__})"
    for name, size in files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]:,} of {size:,} bytes"
        if not os.access(checkpoint / name, os.R_OK):
            return f"{name} cannot be read"
    return None


def newest_checkpoint(settings: Settings) -> Path | None:
    """The newest whole checkpoint with `resume`, else None; prints which newer ones are not whole.

    Raises ValueError where there is none.
    """
    if not settings.resume:
        return None
    output, broken = Path(settings.output), []
    for checkpoint in all_checkpoints(output):
        why = fault(checkpoint)
        if why is None:
            if broken:
                print(f"{'; '.join(broken)}: going on from {checkpoint.name}")
            return checkpoint
        broken.append(f"{checkpoint.name} is not whole, {why}")
    got = "; ".join(broken) or "none"
    raise ValueError(f"--resume: expected a whole checkpoint of --save-every in {output}, got {got}")


def how_to_go_on(output: Path) -> str:
    """What to do after a run that stopped early."""
    checkpoint = next((path for path in all_checkpoints(output) if fault(path) is None), None)
    if checkpoint is None:
        return f"{output} has no checkpoint to go on from (--save-every STEPS writes them)"
    return f"the same command with --resume goes on from {checkpoint}"


class Checkpoints(transformers.TrainerCallback):
    """Makes a checkpoint of what the Trainer and its callbacks wrote to `unfinished/`, and removes old ones.

    Old checkpoints are removed once a further step has had a finite loss, so that a run that diverges keeps
    the last good one; those of an earlier run, with `overwrite`, when training begins. Put the callback after
    those that save, and before those that begin files.
    record: what `run_record` returns, with `weights`. watch: knows which losses are finite.
    """

    def __init__(self, settings: Settings, record: dict[str, Any], watch: FiniteLoss) -> None:
        self.output, self.keep, self._overwrites = Path(settings.output), settings.keep, settings.overwrite
        self.record, self.watch = record, watch
        self._has_old = False  # since the newest save

    def on_train_begin(self, args, state, control, **kwargs):
        if self._overwrites:
            remove_earlier(self.output)

    def on_step_end(self, args, state, control, **kwargs):
        if self.watch.finite(state.global_step):
            self.remove_old()

    def on_save(self, args, state, control, **kwargs):
        meet()  # every process has written its files
        name = f"checkpoint-{state.global_step}"
        folder = self.output / UNFINISHED / name
        if not writes_files():
            return
        self._has_old = self.keep is not None
        if self.watch.finite(state.global_step):
            files = (path for path in sorted(folder.rglob("*")) if path.is_file())
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
            (folder / RECORD).write_text(json.dumps(self.record | {"files": sizes}, indent=2) + "\n")
            for path in (*folder.rglob("*"), folder):
                sync(path)
            remove(self.output / name)  # one that is not whole: a run goes on from the newest whole one
            os.replace(folder, self.output / name)
        remove(folder)

    def remove_old(self) -> None:
        """Removes all but the newest `keep` whole checkpoints."""
        known = all_checkpoints(self.output) if self._has_old else []
        whole = [path for path in known if fault(path) is None]
        for path in known:
            if path not in whole[: self.keep]:
                remove(path)
        self._has_old = False
