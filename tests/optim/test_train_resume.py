"""`id3-optim train --resume`: from the newest whole checkpoint of the same run, or why not."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_models import save_bert
from train_command import run, save_train_files, snapshot, words
from transformers import BertModel

from id3_optim.cli import main
from id3_optim.cli.checkpoints import MAY_DIFFER, fault
from id3_optim.cli.divergence import FiniteLoss
from id3_optim.cli.settings import Settings


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Also straight/: a run of 6 steps, and run/: its checkpoints of 2 and 4 steps."""
    folder = save_train_files(tmp_path_factory.mktemp("files"))
    assert main(words(folder, folder / "straight", *OPTIONS)) == 0
    for step in (2, 4):
        shutil.copytree(folder / f"straight/checkpoint-{step}", folder / f"run/checkpoint-{step}")
    return folder


OPTIONS = ["--steps", 6, "--save-every", 2, "--delta-only", "--originals"]


@pytest.fixture
def stopped(files, tmp_path):
    return shutil.copytree(files / "run", tmp_path / "run")


def resume(files, folder, *more):
    return words(files, folder, *OPTIONS, "--resume", *more)


def same_result(files, folder):
    names = ("delta.safetensors", "config.json", "checkpoint-6/model.safetensors")
    return all((folder / name).read_bytes() == (files / "straight" / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "id3-adam"],
        ["--prune", "2", "--prune-share", "0.3", "--entry-warmup", "3"],
        ["--group-by-length", "--batch-size", "12"],
    ],
)
def test_sums_ages_pruning_and_the_order_of_rows_go_on(files, tmp_path, capsys, more):
    straight, stopped = tmp_path / "straight", tmp_path / "run"
    assert run(capsys, words(files, straight, *OPTIONS, *more))[0] == 0
    shutil.copytree(straight / "checkpoint-4", stopped / "checkpoint-4")
    assert run(capsys, resume(files, stopped, *more))[0] == 0
    for name in ("delta.safetensors", "checkpoint-6/model.safetensors"):
        assert (stopped / name).read_bytes() == (straight / name).read_bytes()


def test_a_checkpoint_of_a_version_with_fewer_settings(files, stopped, capsys):
    record = stopped / "checkpoint-4" / "run.json"
    saved = json.loads(record.read_text())
    del saved["settings"]["entry_warmup"]
    record.write_text(json.dumps(saved))
    code, _, error = run(capsys, resume(files, stopped, "--entry-warmup", "2"))
    assert code == 2 and "--entry-warmup: expected 0 as in checkpoint-4, got 2" in error
    assert run(capsys, resume(files, stopped))[0] == 0 and same_result(files, stopped)


def test_a_stopped_run_ends_at_the_same_bytes(files, stopped, capsys):
    code, printed, _ = run(capsys, resume(files, stopped))
    assert code == 0 and "not whole" not in printed
    assert same_result(files, stopped)


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("optimizer.pt", None, "optimizer.pt is missing"),
        ("scheduler.pt", None, "scheduler.pt is missing"),
        ("run.json", None, "run.json is missing"),
        ("trainer_state.json", None, "trainer_state.json is missing"),
        ("run.json", b"", "run.json cannot be read"),
        ("run.json", b'{"settings"', "run.json cannot be read"),
        ("optimizer.pt", b"", "optimizer.pt has 0 of"),
        ("model.safetensors", b"half", "model.safetensors has 4 of"),
        ("delta.safetensors", b"half", "delta.safetensors has 4 of"),
    ],
)
def test_the_newest_whole_checkpoint_is_taken(files, stopped, capsys, name, damage, why):
    broken = stopped / "checkpoint-4" / name
    broken.unlink() if damage is None else broken.write_bytes(damage)
    code, printed, _ = run(capsys, resume(files, stopped))
    assert code == 0 and f"checkpoint-4 is not whole, {why}" in printed
    assert "going on from checkpoint-2" in printed
    assert same_result(files, stopped) and fault(stopped / "checkpoint-4") is None
    shutil.rmtree(stopped / "checkpoint-2")
    for checkpoint in stopped.glob("checkpoint-*"):
        (checkpoint / name).unlink() if damage is None else (checkpoint / name).write_bytes(damage)
    before = snapshot(stopped)
    code, _, error = run(capsys, resume(files, stopped))
    assert code == 2 and f"--resume: expected a whole checkpoint of --save-every in {stopped}" in error
    assert why.split(" has ")[0] in error and snapshot(stopped) == before


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "model.safetensors", "scheduler.pt", "trainer_state.json", "rng_state.pth"]
)
def test_a_file_of_the_right_size_that_does_not_load(files, stopped, capsys, name):
    file = stopped / "checkpoint-4" / name
    file.write_bytes(b"\xff" * file.stat().st_size)
    code, _, error = run(capsys, resume(files, stopped))
    assert code == 2 and f"--resume: expected {file.parent} to load, got " in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lr", "0.01"], "--lr: expected 0.001 as in checkpoint-4, got 0.01"),
        (["--seed", "7"], "--seed: expected 42 as in checkpoint-4, got 7"),
        (["--batch-size", "4"], "--batch-size: expected 8 as in checkpoint-4, got 4"),
        (["--accumulate", "2"], "--accumulate: expected 1 as in checkpoint-4, got 2"),
        (["--optimizer", "adamw"], "--optimizer: expected id3 as in checkpoint-4, got adamw"),
        (["--budget", "1.0"], "--budget: expected 300 as in checkpoint-4, got 1.0"),
        (["--steps", "8"], "--steps: expected 6 as in checkpoint-4, got 8"),
        (["--max-length", "9"], "--max-length: expected 256 as in checkpoint-4, got 9"),
        (["--bf16"], "--bf16: expected False as in checkpoint-4, got True"),
        (["--warmup", "0", "--exp", "1"], "--exp: expected 2.0 as in checkpoint-4, got 1.0; --warmup: exp"),
    ],
)
def test_other_settings_are_named(files, stopped, capsys, more, message):
    before = snapshot(stopped)
    more = [*more, "--save-every", "2"]
    command = [word for word in resume(files, stopped, *more) if "adamw" not in more or word not in IDS]
    code, _, error = run(capsys, command)
    assert code == 2 and message in error and snapshot(stopped) == before


IDS = ("--delta-only", "--originals")  # options that need ID3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("the", "a", "--train: expected the texts as in checkpoint-4, got other texts"),
        ("praise", "blame!", "--train: expected the labels as in checkpoint-4, got other labels"),
    ],
)
def test_other_data_is_named(files, stopped, tmp_path, capsys, old, new, message):
    text = (files / "reviews.csv").read_text().replace(old, new)
    (tmp_path / "other.csv").write_text(text)
    command = resume(files, stopped, "--train", tmp_path / "other.csv", "--eval", tmp_path / "other.csv")
    code, _, error = run(capsys, command)
    assert code == 2 and error == f"id3-optim: error: {message}"


def test_another_base_is_named(files, stopped, tmp_path, capsys):
    """The delta's originals are the base's."""
    save_bert(tmp_path / "other")
    model = BertModel.from_pretrained(files / "bert")
    with torch.no_grad():
        model.pooler.dense.weight[3, 5] += 1
    model.save_pretrained(tmp_path / "other")
    code, _, error = run(capsys, resume(files, stopped, "--model", tmp_path / "other"))
    assert code == 2
    assert error == "id3-optim: error: --model: expected the weights as in checkpoint-4, got other weights"


def test_what_does_not_define_the_run_may_differ(files, stopped, tmp_path, capsys):
    """The same rows and the same base elsewhere, and what is written."""
    shutil.copytree(files / "bert", tmp_path / "copy")
    text = (files / "reviews.csv").read_text().replace("text,label", "words,class").replace(",", ";")
    (tmp_path / "moved.csv").write_bytes(text.encode("utf-16"))
    more = ["--model", tmp_path / "copy", "--train", tmp_path / "moved.csv", "--eval", tmp_path / "moved.csv"]
    more += ["--encoding", "utf-16", "--delimiter", ";", "--text-column", "words", "--label-column", "class"]
    more += ["--keep", 1, "--log-every", 3, "--report", tmp_path / "report.json", "--backend", "reference"]
    assert run(capsys, resume(files, stopped, *more))[0] == 0
    assert [path.name for path in stopped.glob("checkpoint-*")] == ["checkpoint-6"]


def test_every_setting_defines_the_run_or_may_differ(files):
    record = json.loads((files / "run/checkpoint-4/run.json").read_text())
    assert set(record["settings"]) | MAY_DIFFER == set(Settings.__dataclass_fields__)
    assert not set(record["settings"]) & MAY_DIFFER


def test_only_whole_checkpoints_count_for_keep(files, stopped, capsys):
    (stopped / "checkpoint-5").mkdir()
    assert run(capsys, resume(files, stopped, "--keep", "2"))[0] == 0
    assert sorted(path.name for path in stopped.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


# Runs the command of `sys.argv` once for each place in it to be killed at, with a folder for each.
KILLED = """
import os, signal, sys
import torch, transformers
from id3_optim.cli import main, train
from id3_optim.integrations import huggingface

def dies(function, calls):
    def call(*args, **options):
        nonlocal calls
        calls -= 1
        if calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return call

places = [(transformers.PreTrainedModel, "save_pretrained", 2), (torch, "save", 5),
          (huggingface, "save_delta", 2), (os, "replace", 4)]
for place, name, calls in places:
    child = os.fork()
    if child == 0:
        setattr(place, name, dies(getattr(place, name), calls))
        main([word.replace("FOLDER", name) for word in sys.argv[1:]])
    _, status = os.waitpid(child, 0)
    assert status == signal.SIGKILL, (name, status)
"""


def test_a_run_killed_while_it_saves(files, tmp_path, capsys):
    """SIGKILL in the midst of the second checkpoint: the first is whole, and the run goes on from it."""
    command = words(files, tmp_path / "FOLDER", *OPTIONS)
    subprocess.run([sys.executable, "-c", KILLED, *command], check=True, timeout=120)
    for name in ("save_pretrained", "save", "save_delta", "replace"):
        folder = tmp_path / name
        assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
        assert (folder / "unfinished").exists() and fault(folder / "checkpoint-2") is None
        code, printed, _ = run(capsys, resume(files, folder))
        assert code == 0 and "not whole" not in printed
        assert same_result(files, folder) and not (folder / "unfinished").exists()


def test_ctrl_c_says_how_to_go_on(files, stopped, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(FiniteLoss, "see", interrupt)
        code, _, error = run(capsys, resume(files, stopped))
    assert code == 130 and not (stopped / "unfinished").exists()
    newest = stopped / "checkpoint-4"
    assert error == f"id3-optim: interrupted; the same command with --resume goes on from {newest}"
    assert run(capsys, resume(files, stopped))[0] == 0 and same_result(files, stopped)


def interrupt(self, step, loss):
    raise KeyboardInterrupt


def test_ctrl_c_without_a_checkpoint(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(FiniteLoss, "see", interrupt)
    code, _, error = run(capsys, words(files, tmp_path / "out"))
    none = f"{tmp_path}/out has no checkpoint to go on from (--save-every STEPS writes them)"
    assert code == 130 and error == f"id3-optim: interrupted; {none}"


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_an_error_of_the_training_keeps_its_own_words(files, stopped, capsys, monkeypatch, kind):
    def fail(self, step, loss):
        raise kind("of the training")

    monkeypatch.setattr(FiniteLoss, "see", fail)
    code, _, error = run(capsys, resume(files, stopped))
    assert code in (1, 2) and "of the training" in error and "--output" not in error
    assert not (stopped / "unfinished").exists()


def test_a_disk_that_is_full(files, stopped, capsys):
    """No file can grow beyond what checkpoint-6 needs: the older ones stay, and the run goes on with room."""
    resource = pytest.importorskip("resource")
    before = snapshot(stopped)
    for limit in (1_000, 20_000, (stopped / "checkpoint-4/optimizer.pt").stat().st_size - 1):
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        try:
            code, _, error = run(capsys, resume(files, stopped))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
        assert code == 2 and f"--output: expected to write into {stopped}, got " in error
        assert f"--resume goes on from {stopped / 'checkpoint-4'}" in error
        assert snapshot(stopped) == before
    assert run(capsys, resume(files, stopped))[0] == 0 and same_result(files, stopped)
