"""`id3-optim train` on scores, on tagged words, and with a head on the mean of all tokens."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from train_command import run, save_train_files, words
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from id3_optim.cli import metrics, reading, tasks
from id3_optim.integrations.mean_pooling import MeanPoolingClassifier


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = save_train_files(tmp_path_factory.mktemp("files"))
    scores = {"good": 4.5, "fine": 3.5, "bad": 1.5, "awful": 0.5}
    lines = [f"the {noun} was {word},{score}" for noun in ("film", "book") for word, score in scores.items()]
    (folder / "scores.csv").write_text("text,label\n" + "\n".join(lines * 4) + "\n")
    sentences = ["good B-X\nfilm I-X\nis O\nred B-Y\n", "the O\nbook B-Y\nwas O\nawful B-X\nfilm I-X\n"]
    (folder / "tags.conll").write_text("-DOCSTART- -X- O\n\n" + "\n".join(sentences * 10))
    return folder


def report_of(capsys, tmp_path, command):
    code, _, error = run(capsys, [*command, "--report", str(tmp_path / "report.json")])
    assert code == 0, error
    return json.loads((tmp_path / "report.json").read_text())


def test_regression_learns_scores(capsys, files, tmp_path):
    command = words(
        files,
        tmp_path / "out",
        *["--task", "regression", "--lr", "1e-2", "--budget", "3000"],
        data="scores.csv",
        steps=120,
    )
    found = report_of(capsys, tmp_path, command)["metrics"]
    assert found["eval_pearson"] > 0.9 and found["eval_spearman"] > 0.85
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts, labels = zip(
        *(
            (r.texts[0], float(r.label))
            for r in reading.read_labelled(str(files / "scores.csv"), ["text"], "label")
        ),
        strict=True,
    )
    with torch.no_grad():
        given = model(**tokenizer(list(texts), padding=True, return_tensors="pt")).logits[:, 0]
    assert np.corrcoef(given.numpy(), labels)[0, 1] == pytest.approx(found["eval_pearson"], abs=1e-5)
    assert model.config.problem_type == "regression"


def test_a_model_of_another_kind_of_task_learns_classes(capsys, files, tmp_path):
    """Its configuration says what its own labels were."""
    base = tmp_path / "base"
    shutil.copytree(files / "bert", base)
    config = json.loads((base / "config.json").read_text()) | {"problem_type": "regression"}
    (base / "config.json").write_text(json.dumps(config))
    command = words(files, tmp_path / "out", "--model", base, "--steps", 2)
    assert run(capsys, command)[0] == 0
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["problem_type"] == "single_label_classification"


def test_scores_must_be_numbers(capsys, files, tmp_path):
    code, _, error = run(capsys, words(files, tmp_path / "out", "--task", "regression"))
    assert code == 1 or code == 2
    assert "expected numbers in column 'label', got 'praise'" in error


def test_tagged_words_are_learnt(capsys, files, tmp_path):
    command = words(files, tmp_path / "out", "--lr", "1e-2", data="tags.conll", steps=80)
    found = report_of(capsys, tmp_path, command)["metrics"]
    assert found["eval_f1"] > 0.9 and found["eval_accuracy"] > 0.9
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out")
    assert sorted(model.config.label2id) == ["B-X", "B-Y", "I-X", "O"]


def test_the_first_token_of_a_word_has_its_tag(files):
    tokenizer = AutoTokenizer.from_pretrained(files / "bert")
    row = reading.TaggedText(("good-film", "red"), ("B-X", "O"))  # Whitespace splits at the hyphen
    (encoded,), cut = tasks.encode_tagged([row], ["B-X", "O"], tokenizer, 16)
    assert cut == 0 and tasks.encode_tagged([row, row], ["B-X", "O"], tokenizer, 4).cut == 2
    ignored = metrics.IGNORED
    assert encoded["labels"] == [ignored, 0, ignored, ignored, 1, ignored]
    batch = tasks.collate([encoded, {**encoded, **{k: v[:3] for k, v in encoded.items()}}], 0)
    assert batch["labels"][1].tolist() == [ignored, 0, *[ignored] * 4]


def test_a_word_without_a_tag_is_refused(tmp_path):
    (tmp_path / "a.conll").write_text("good B-X\nfilm\n")
    with pytest.raises(ValueError, match=r"a.conll:2: expected a word and its tag, got 'film'"):
        reading.read_tagged(str(tmp_path / "a.conll"))
    (tmp_path / "a.conll").write_text("\n\n")
    with pytest.raises(ValueError, match=r"a.conll: expected rows, got none"):
        reading.read_tagged(str(tmp_path / "a.conll"))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-X I-X O B-Y", [("X", 0, 2), ("Y", 3, 4)]),
        ("B-X B-X", [("X", 0, 1), ("X", 1, 2)]),
        ("I-X I-X I-Y", [("X", 0, 2), ("Y", 2, 3)]),
        ("O I-X O", [("X", 1, 2)]),
        ("X X O", [("X", 0, 2)]),
        ("O O", []),
    ],
)
def test_entities(tags, expected):
    assert metrics.entities(tags.split()) == expected


def test_entity_scores_by_hand():
    labels = ["O", "B-X", "I-X"]
    expected = np.array([[1, 2, 0, 1, -100], [1, 0, 0, -100, -100]])
    given = np.array([[1, 2, 0, 0, 1], [1, 2, 0, 1, 1]])  # finds the first alone; one with a wrong end
    found = metrics.entity_scores(given, expected, labels)
    assert found == {"f1": 2 / 5, "precision": 1 / 2, "recall": 1 / 3, "accuracy": 5 / 7}


def test_correlations_by_hand():
    a, b = np.array([1.0, 2.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0, 9.0])
    assert metrics.ranks(a).tolist() == [1.0, 2.5, 2.5, 4.0]
    assert metrics.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert metrics.pearson(a, np.ones(4)) == 0.0
    given, expected = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    assert metrics.matthews(given, expected) == pytest.approx(np.corrcoef(given, expected)[0, 1])
    assert metrics.matthews(np.zeros(3, int), np.array([0, 1, 0])) == 0.0


def test_mean_pooling_reloads_with_and_without_this_package(capsys, files, tmp_path):
    command = words(files, tmp_path / "out", "--pooling", "mean", "--lr", "3e-2", steps=120)
    report = report_of(capsys, tmp_path, command)
    assert report["metrics"]["eval_accuracy"] > 0.9 and report["metrics"]["eval_matthews"] > 0.8
    assert set(report["dense_parameters"]) == {"classifier.weight", "classifier.bias"}
    model = MeanPoolingClassifier.from_pretrained(tmp_path / "out").eval()
    assert not any("pooler" in name for name, _ in model.named_parameters())
    ids = torch.tensor([[2, 5, 9, 3], [2, 6, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits
        states = model.encoder(input_ids=ids, attention_mask=mask)[0]
    pooled = torch.stack([states[0].mean(0), states[1, :3].mean(0)])
    torch.testing.assert_close(logits, model.classifier(pooled))
    by_name = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(by_name(input_ids=ids, attention_mask=mask).logits, logits)
    script = (
        "import sys, torch; sys.modules['id3_optim'] = None\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        f"model = Auto.from_pretrained({str(tmp_path / 'out')!r}, trust_remote_code=True).eval()\n"
        f"print(model(input_ids=torch.tensor({ids.tolist()}), attention_mask=torch.tensor({mask.tolist()}))"
        ".logits.tolist())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    torch.testing.assert_close(torch.tensor(json.loads(printed.splitlines()[-1])), logits)


def test_a_mean_pooled_delta_is_applied(capsys, files, tmp_path):
    command = words(files, tmp_path / "delta", "--pooling", "mean", "--delta-only")
    assert run(capsys, command)[0] == 0
    assert run(capsys, words(files, tmp_path / "whole", "--pooling", "mean"))[0] == 0
    apply = [
        "apply",
        str(tmp_path / "delta"),
        "--model",
        str(files / "bert"),
        "--output",
        str(tmp_path / "out"),
    ]
    code, _, error = run(capsys, apply)
    assert code == 0, error
    ours, theirs = (MeanPoolingClassifier.from_pretrained(tmp_path / name) for name in ("out", "whole"))
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_mean_pooling_is_for_texts_alone(capsys, files, tmp_path):
    command = words(files, tmp_path / "out", "--pooling", "mean", data="tags.conll")
    code, _, error = run(capsys, command)
    assert code and "--pooling: does not apply to token-classification" in error
