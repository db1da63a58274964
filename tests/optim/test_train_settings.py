"""Settings of `id3-optim train` that cannot run are refused in one line, before the model is loaded."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train_command import run, save_train_files, words

from id3_optim.cli import main, train, trainer
from id3_optim.cli.settings import Settings, check_settings


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_train_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--batch-size", "-1"], "--batch-size: expected at least 1, got -1"),
        (["--accumulate", "0"], "--accumulate: expected at least 1, got 0"),
        (["--log-every", "0"], "--log-every: expected at least 1, got 0"),
        (["--max-length", "1"], "--max-length: expected at least 2, got 1"),
        (["--save-every", "0"], "--save-every: expected at least 1, got 0"),
        (["--keep", "0", "--save-every", "1"], "--keep: expected at least 1, got 0"),
        (["--keep", "2"], "--keep: expected --save-every with it, got none"),
        (["--seed", "-1"], "--seed: expected at least 0, got -1"),
        (["--seed", str(2**32)], f"--seed: expected less than {2**32}, got {2**32}"),
        (["--epochs", "1"], "argument --epochs: not allowed with argument --steps"),
        (["--lr", "-1"], "--lr: expected more than 0, got -1.0"),
        (["--lr", "inf"], "--lr: expected a finite number, got inf"),
        (["--head-lr", "0"], "--head-lr: expected more than 0, got 0.0"),
        (["--warmup", "nan"], "--warmup: expected a finite number, got nan"),
        (["--warmup", "-0.1"], "--warmup: expected at least 0, got -0.1"),
        (["--weight-decay", "inf"], "--weight-decay: expected a finite number, got inf"),
        (["--max-grad-norm", "-1"], "--max-grad-norm: expected at least 0, got -1.0"),
        (["--eps", "-1"], "--eps: expected a finite number >= 0, got -1.0"),
        (["--eps", "0"], "--eps: expected > 0 (in float32) with exp = 2.0 > 0, got 0.0"),
        (["--exp", "nan"], "--exp: expected a finite number"),
        (["--schedule", "linear"], "--schedule: expected one of uniform"),
        (["--schedule", "exponential:x"], "--schedule: expected a number after 'exponential:', got 'x'"),
        (["--schedule", "exponential:0"], "--schedule: a: expected a number with 0 < |a|"),
        (["--backend", "metal"], "--backend: expected one of"),
        (["--save-at", "0"], "--save-at: expected more than 0 and at most --budget, 300, got 0"),
        (["--save-at", "20", "301"], "--save-at: expected more than 0 and at most --budget, 300, got 301"),
        (["--budget", "1%", "--save-at", "2%"], "--save-at: expected more than 0 and at most --budget, 0.01"),
        (["--save-at", "20", "--strategy", "static"], "--strategy: expected increment with --save-at, got"),
        (["--optimizer", "adamw", "--memory-report"], "--optimizer: expected id3 with --memory-report, got"),
        (["--originals"], "--originals: expected --delta-only, --save-at or --save-every with it, got none"),
        (["--resume", "--overwrite"], "--overwrite: does not apply to --resume: the run goes on with what"),
        (["--eval", "nowhere.csv"], "--eval: expected a file, got nowhere.csv, which is none"),
        (["--heuristic", "luck"], "argument --heuristic: invalid choice: 'luck'"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    ],
)
def test_refused_before_the_model_is_loaded(files, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.setattr(train, "load_start", lambda *args: pytest.fail("the model was loaded"))
    code, printed, error = run(capsys, words(files, tmp_path / "out", *more))
    assert code == 2 and f"error: {message}" in error and printed == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("epochs", "expected"), [(0.0, "more than 0"), (math.inf, "a finite number")])
def test_epochs(files, epochs, expected):
    data = str(files / "reviews.csv")
    with pytest.raises(ValueError, match=f"^--epochs: expected {expected}, got {epochs}$"):
        check_settings(Settings(str(files / "bert"), data, data, "out", epochs=epochs))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--save-at", "0.1%", "50%"], "--save-at: expected 1 to 300 entries (--budget), got 0.5, which is "),
        (["--save-at", "1e-9"], "--save-at: expected a share of at least one of "),
        (["--budget", "200000000"], "--budget: expected 0 to "),
    ],
)
def test_budgets_that_the_model_decides_on_are_refused_by_their_options(
    files, tmp_path, capsys, more, message
):
    code, _, error = run(capsys, words(files, tmp_path / "out", *more))
    assert code == 2 and f"error: {message}" in error and not (tmp_path / "out").exists()


def test_a_budget_of_no_entry_is_said(files, tmp_path, capsys):
    code, printed, _ = run(capsys, words(files, tmp_path / "out", "--budget", "0"))
    assert code == 0 and "--budget 0: no entry of the model is trained" in printed


VALUES = st.sampled_from(
    ["0", "-1", "1", "7", "0.5", "1e400", "nan", "200%", "1%", "", "x", "text", "label", "é"]
)
NUMBERED = ["--budget", "--save-at", "--steps", "--lr", "--seed", "--warmup", "--epochs", "--keep", "--eps"]
NUMBERED += ["--save-every", "--exp", "--batch-size", "--max-length", "--schedule", "--backend", "--head-lr"]
NUMBERED += [
    "--text-column",
    "--label-column",
    "--encoding",
    "--delimiter",
    "--task",
    "--strategy",
    "--report",
]
FLAGS = ["--resume", "--overwrite", "--bf16", "--delta-only", "--originals", "--memory-report", "--cpu"]
OPTION = st.tuples(st.sampled_from(NUMBERED), VALUES) | st.tuples(st.sampled_from(FLAGS))
CONTENT = st.text(st.sampled_from('text,label\n1203x;"\t {}[]:é\0'), max_size=60).map(str.encode)


@settings(max_examples=200)
@given(
    options=st.lists(OPTION, max_size=4),
    content=CONTENT | CONTENT.map(lambda rows: b"text,label\n" + rows) | st.binary(max_size=60),
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".txt"]),
)
def test_any_words_and_files_are_a_start_or_one_line(files, tmp_path_factory, options, content, suffix):
    """No traceback, and nothing is written. The training itself is left out."""
    folder = tmp_path_factory.mktemp("any")
    data = folder / f"data{suffix}"
    data.write_bytes(content)
    more = [word for option in options for word in option]
    command = words(files, folder / "out", "--train", data, "--eval", data, *more)

    def start(*args):
        raise ValueError("--model: expected to get here, got here")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "load_start", start)
        patched.chdir(folder)
        try:
            code = main(command)
        except SystemExit as ended:
            code = ended.code
    assert code == 2
    assert [path.name for path in folder.iterdir()] == [data.name]


def test_a_process_that_sees_several_gpus_uses_one(files, tmp_path, monkeypatch):
    """nn.DataParallel would take four times --batch-size rows."""
    arguments = trainer.trainer_arguments(
        Settings(*map(str, (files / "model", files / "t", files / "t", tmp_path)))
    )
    arguments._n_gpu = 4
    assert arguments.train_batch_size == 4 * arguments.per_device_train_batch_size
    trainer.on_one_gpu(arguments)
    assert arguments.train_batch_size == arguments.per_device_train_batch_size
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    (note,) = trainer.idle_gpus(torch.device("cuda", 0), 1)
    assert "one of 4 GPUs" in note
    assert not trainer.idle_gpus(torch.device("cuda", 0), 4) and not trainer.idle_gpus(torch.device("cpu"), 1)
