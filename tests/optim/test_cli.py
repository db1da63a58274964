"""The command `id3-optim`, run as a function: what it writes, what it prints, how it refuses."""

import json
import subprocess
import sys

import pytest
import torch
from tiny_models import save_bert, save_llama, write_completions, write_reviews
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from id3_optim.cli import budget, main


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_bert(folder / "bert")
    save_llama(folder / "llama")
    write_reviews(folder / "reviews.tsv")
    write_completions(folder / "facts.jsonl")
    return folder


def command(files, output, *more, model="bert", data="reviews.tsv"):
    paths = ["--model", files / model, "--train", files / data, "--eval", files / data, "--output", output]
    return [
        "train",
        *map(str, paths),
        "--steps",
        "4",
        "--batch-size",
        "8",
        "--cpu",
        "--log-every",
        "1",
        *more,
    ]


def test_train_writes_model_report_and_plots(files, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="--save-plots needs matplotlib")
    output, report = tmp_path / "out", tmp_path / "report.json"
    assert main(command(files, output, "--budget", "5%", "--save-plots", "--report", str(report))) == 0
    printed = capsys.readouterr().out
    assert "trained whole (dense): classifier.bias, classifier.weight" in printed
    for row in ("accuracy", "entries changed", "optimizer state", "forward, backward", "select", "update"):
        assert row in printed
    numbers = json.loads(report.read_text())
    assert numbers["entries"]["active"] == int(0.05 * numbers["entries"]["total"])
    assert numbers["optimizer"]["heuristic"]["eps"] == 1.0
    assert AutoModelForSequenceClassification.from_pretrained(output).config.num_labels == 2
    assert AutoTokenizer.from_pretrained(output)("good")["input_ids"]
    assert (output / "plots.png").read_bytes().startswith(b"\x89PNG")


def test_causal_lm(files, tmp_path, capsys):
    assert main(command(files, tmp_path / "out", "--budget", "100", model="llama", data="facts.jsonl")) == 0
    printed = capsys.readouterr().out
    assert "perplexity" in printed and "trained whole" not in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--text-column", "sentence"], "reviews.tsv: expected a column 'sentence', got 'text', 'label'"),
        (["--label-column", "class"], "reviews.tsv: expected a column 'class', got 'text', 'label'"),
        (["--text-column", "a", "b", "c"], "--text-column: expected one or two columns, got 3"),
        (["--eval", "missing.tsv"], "--eval: expected a file, got missing.tsv"),
        (["--budget", "999999999"], "budget: expected 0 to"),
        (["--schedule", "linear"], "schedule: expected one of"),
        (["--backend", "metal"], "backend"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--lr", "nan"], "--lr: expected a finite number, got nan"),
        (["--optimizer", "adamw", "--delta-only"], "--optimizer: expected id3 with --delta-only, got adamw"),
        (["--task", "causal-lm"], r"reviews.tsv:1: expected JSON, got 'text\tlabel' (Expecting"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(files, tmp_path, capsys, more, message):
    assert main(command(files, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("id3-optim: error: ") and message in error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_unknown_model_is_one_line(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(command(files, tmp_path / "out", model="nowhere")) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors and "nowhere" in errors.splitlines()[-1]


def test_debug_shows_the_traceback(files, tmp_path):
    with pytest.raises(ValueError, match="expected a column 'class'"):
        main(["--debug", *command(files, tmp_path / "out", "--label-column", "class")])


def test_env_lists_versions_and_backends(capsys):
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    for name in ("reference", "cpu", "triton", "cuda"):
        assert f"backend {name}: " in printed
    assert "backend reference: available" in printed


@pytest.mark.parametrize(
    ("text", "value"),
    [("320000", 320000), ("320_000", 320000), ("0.5%", 0.005), ("0.01", 0.01), ("1", 1), ("1.0", 1.0)],
)
def test_budget(text, value):
    assert budget(text) == value and type(budget(text)) is type(value)


@pytest.mark.parametrize("words", ["some", "200%", "0%", "1.5", "0.0", "-3", "nan", "inf%", "9" * 5000])
@pytest.mark.parametrize("name", ["--budget", "--save-at"])
def test_a_budget_out_of_range_is_refused_with_the_words_typed(capsys, name, words):
    with pytest.raises(SystemExit) as stopped:
        main(["train", name, words, "--model", "m", "--train", "t", "--eval", "e", "--output", "o"])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"id3-optim train: error: argument {name}: expected entries (320000) or a share")
    assert f"got {words!r}" in line


def test_importing_the_package_stays_light():
    """transformers takes seconds to import, and neither it nor matplotlib is a hard dependency."""
    code = "import sys, id3_optim, id3_optim.cli, id3_optim.analysis, id3_optim.plots; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "id3_optim.optimizer" in modules
    heavy = {"transformers", "accelerate", "peft", "trl", "lightning", "pytorch_lightning", "matplotlib"}
    assert not heavy & set(modules)
