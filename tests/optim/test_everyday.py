"""The command line day by day: Ctrl-C, numbers elsewhere, completion in a shell, messages to act on."""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from train_command import run, save_train_files, snapshot, words

from id3_optim.cli.checkpoints import fault
from id3_optim.cli.divergence import FiniteLoss
from id3_optim.cli.interrupt import Interrupt


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_train_files(tmp_path_factory.mktemp("files"))


# --- Ctrl-C ------------------------------------------------------------------------------------------


def press_at(monkeypatch, *steps):
    """Ctrl-C in the backward passes of these steps."""
    see = FiniteLoss.see

    def pressing(self, step, loss):
        see(self, step, loss)
        for _ in range(steps.count(step)):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(FiniteLoss, "see", pressing)


@pytest.mark.parametrize("more", [[], ["--save-every", 2, "--keep", 1]], ids=["", "save-every"])
def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_bits(files, tmp_path, capsys, monkeypatch, more):
    options = ["--delta-only", "--steps", 6, *more]
    assert run(capsys, words(files, tmp_path / "straight", *options))[0] == 0
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        press_at(patched, 3)
        code, _, error = run(capsys, words(files, tmp_path / "out", *options))
    newest = tmp_path / "out" / "checkpoint-3"
    assert code == 130 and signal.getsignal(signal.SIGINT) is before
    assert error == f"id3-optim: interrupted; the same command with --resume goes on from {newest}"
    assert fault(newest) is None and not (tmp_path / "out" / "delta.safetensors").exists()
    assert run(capsys, words(files, tmp_path / "out", *options, "--resume"))[0] == 0
    results = [(tmp_path / name / "delta.safetensors").read_bytes() for name in ("straight", "out")]
    assert results[0] == results[1]


def test_another_base_is_noticed_without_save_every(files, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        press_at(patched, 2)
        run(capsys, words(files, tmp_path / "out"))
    other = shutil.copytree(files / "bert", tmp_path / "other")
    from transformers import BertModel

    model = BertModel.from_pretrained(other)
    with torch.no_grad():
        model.pooler.dense.weight[3, 5] += 1
    model.save_pretrained(other)
    code, _, error = run(capsys, words(files, tmp_path / "out", "--resume", "--model", other))
    assert code == 2 and "--model: expected the weights as in checkpoint-2, got other weights" in error


def test_the_second_ctrl_c_stops_at_once(files, tmp_path, capsys, monkeypatch):
    press_at(monkeypatch, 2, 2)
    code, _, error = run(capsys, words(files, tmp_path / "out"))
    assert code == 130 and "has no checkpoint to go on from" in error
    assert not list((tmp_path / "out").glob("*"))


def test_ctrl_c_in_the_last_step_changes_nothing(files, tmp_path, capsys, monkeypatch):
    press_at(monkeypatch, 4)
    assert run(capsys, words(files, tmp_path / "out"))[0] == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_process_that_gets_the_signal(files, tmp_path):
    """As from a terminal: the signal comes from outside, at any point of the training."""
    command = [sys.executable, "-m", "id3_optim.cli", *words(files, tmp_path / "out", "--steps", 100_000)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        while "loss=" not in process.stderr.read(200):  # the bar of a run that has begun
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(60) == 130
    assert "saving after this step; Ctrl-C again stops at once" in said
    [checkpoint] = (tmp_path / "out").glob("checkpoint-*")
    assert fault(checkpoint) is None and said.splitlines()[-1].endswith(f"goes on from {checkpoint}")


def test_outside_the_main_thread_the_signal_is_left_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def listen():
        with Interrupt().listening():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


# --- where the numbers go ----------------------------------------------------------------------------


def test_tensorboard(files, tmp_path, capsys):
    """Its files lie in the output directory, and hold the numbers of the active set too."""
    pytest.importorskip("tensorboard", reason="--report-to tensorboard needs the extra `report`")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    code, _, error = run(capsys, words(files, out, "--report-to", "tensorboard"))
    assert code == 0 and "report_first" not in error
    events = EventAccumulator(str(out / "runs"))
    events.Reload()
    active = {event.step: event.value for event in events.Scalars("train/n_active")}
    assert active == {1: 75, 2: 150, 3: 225, 4: 300}
    assert {"train/loss", "train/tensor_sparsity", "eval/accuracy"} <= set(events.Tags()["scalars"])
    (out / "mine.txt").write_text("kept")
    before = list((out / "runs").iterdir())
    assert run(capsys, words(files, out, "--overwrite"))[0] == 0
    assert not any(path.exists() for path in before) and (out / "mine.txt").exists()


def test_wandb(files, tmp_path):
    """Offline: a run's file appears, and no network is needed. It is whole when the process has ended."""
    pytest.importorskip("wandb", reason="--report-to wandb needs wandb")
    command = [sys.executable, "-m", "id3_optim.cli", *words(files, tmp_path / "out", "--report-to", "wandb")]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    [log] = tmp_path.rglob("*.wandb")
    assert b"n_active" in log.read_bytes()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_the_reporters_come_last_and_get_every_number(files, tmp_path, capsys, monkeypatch, name):
    """With a stand-in for the reporter: the Trainer's own order would leave our numbers out."""
    import transformers

    from id3_optim.cli import progress

    seen = []

    class Reporter(transformers.TrainerCallback):
        logging_dir = None

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    monkeypatch.setattr(progress, "TensorBoardCallback", Reporter)
    monkeypatch.setattr(progress, "WandbCallback", Reporter)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: n if n in ("tensorboard", "wandb") else real(n)
    )
    code, _, error = run(capsys, words(files, tmp_path / "out", "--report-to", name))
    assert code == 0, error
    assert [logs["n_active"] for logs in seen if "loss" in logs] == [75, 150, 225, 300]


def test_a_reporter_that_is_not_installed(files, tmp_path, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    code, _, error = run(capsys, words(files, tmp_path / "out", "--report-to", "wandb"))
    expected = "--report-to: expected wandb to be installed, got none; pip install wandb"
    assert code == 2 and error == f"id3-optim: error: {expected}" and not (tmp_path / "out").exists()


# --- completion --------------------------------------------------------------------------------------


@pytest.fixture
def complete(capsys, tmp_path):
    """A function: the words that bash offers for the last of these words."""
    pytest.importorskip("shtab", reason="completion needs the extra `completion`")
    code, script, _ = run(capsys, ["completion", "bash"])
    assert code == 0
    (tmp_path / "script").write_text(script)
    (tmp_path / "reviews.csv").write_text("")
    (tmp_path / "base").mkdir()

    def offered(*typed):
        quoted = " ".join(f"'{word}'" for word in ("id3-optim", *typed))
        program = f"source ./script; COMP_WORDS=({quoted}); COMP_CWORD={len(typed)}; _shtab_id3_optim; "
        program += 'printf "%s\\n" "${COMPREPLY[@]}"'
        bash = ["bash", "--norc", "-c", program]
        done = subprocess.run(bash, cwd=tmp_path, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    return offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_in_bash(complete):
    assert complete("tr") == {"train"}
    assert {"inspect", "apply", "merge", "env", "estimate", "completion"} <= complete("")
    assert complete("train", "--bud") == {"--budget"}
    assert complete("train", "--strategy", "") == {"increment", "static", "repeat"}
    assert "reviews.csv" in complete("train", "--train", "r")
    assert "base" in complete("train", "--model", "b") and "reviews.csv" not in complete(
        "train", "--model", ""
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_of_each_shell(capsys, shell):
    pytest.importorskip("shtab", reason="completion needs the extra `completion`")
    code, script, _ = run(capsys, ["completion", shell])
    assert code == 0 and "id3-optim" in script and "release-gradients" in script


def test_completion_without_shtab(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, error = run(capsys, ["completion", "bash"])
    assert (
        code == 2 and "shtab: expected this package, got none; pip install 'id3-optim[completion]'" in error
    )


# --- messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["trian"], "train"),
        (["train", "--bugdet", "3"], "--budget"),
        (["train", "--strategy", "incremental"], "increment"),
        (["inspect", "x", "--jsno"], "--json"),
    ],
)
def test_a_word_mistyped(files, tmp_path, capsys, typed, meant):
    if typed[0] == "train":
        typed = [*words(files, tmp_path / "out"), *typed[1:]]
    before = snapshot(files)
    code, _, error = run(capsys, typed)
    assert code == 2 and f"; did you mean {meant}? (see id3-optim" in error and snapshot(files) == before


def test_a_word_like_no_other(capsys):
    assert "did you mean" not in run(capsys, ["xyzzy"])[2]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:83] . DefaultCPUAllocator: not enough memory: you tried"
        ),
        MemoryError(),
    ],
)
def test_too_little_memory_says_what_needs_less(files, tmp_path, capsys, monkeypatch, error):
    def fail(self, step, loss):
        raise error

    monkeypatch.setattr(FiniteLoss, "see", fail)
    code, _, said = run(capsys, words(files, tmp_path / "out"))
    assert code == 2 and str(error).split(".")[0] in said
    assert "; less is needed with a smaller --batch-size" in said and "--release-gradients" in said


def test_a_gated_model(files, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, error = run(capsys, words(files, tmp_path / "out", "--model", "org/gated"))
    assert (
        code == 2 and "got org/gated, which is gated: accept its terms" in error and "hf auth login" in error
    )
