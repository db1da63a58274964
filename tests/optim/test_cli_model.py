"""What `id3-optim diff | merge | apply | revert` make: the model's class, its head, and no random weights."""

import json
import shutil

import pytest
import torch
from delta_files import bits_of, classifier, run, same, save_files
from transformers import AutoModelForSequenceClassification

from id3_optim import load_delta


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_files(tmp_path_factory.mktemp("files"))


def test_a_classifiers_diff_applies_by_itself(files, tmp_path, capsys):
    """Alone in its folder, over a base without the head; reverting says what stays tuned."""
    output = tmp_path / "alone" / "delta.safetensors"
    output.parent.mkdir()
    tuned = AutoModelForSequenceClassification.from_pretrained(files / "tuned")
    tuned.config.id2label = {0: "bad", 1: "good"}
    tuned.save_pretrained(tmp_path / "tuned")
    assert (
        run(capsys, "diff", "--base", files / "bert", "--tuned", tmp_path / "tuned", "--output", output)[0]
        == 0
    )
    applied, reverted = tmp_path / "applied", tmp_path / "reverted"
    assert run(capsys, "apply", output, "--model", files / "bert", "--output", applied)[0] == 0
    assert same(bits_of(applied), bits_of(files / "tuned"))
    config = AutoModelForSequenceClassification.from_pretrained(applied).config
    assert config.id2label == {0: "bad", 1: "good"} and config.label2id == {"bad": 0, "good": 1}
    command = ["revert", output, "--model", applied, "--output", reverted]
    _, printed, _ = run(capsys, *command)
    assert printed.splitlines()[1] == "still tuned, since stored whole: classifier.bias, classifier.weight"
    shutil.rmtree(reverted)
    summary = json.loads(run(capsys, *command, "--json")[1])
    assert sorted(summary["still_tuned"]) == ["classifier.bias", "classifier.weight"]
    assert 'model: ["BertForSequenceClassification"]' in run(capsys, "inspect", output)[1]


def test_two_classifiers_merge_with_the_first_head(files, tmp_path, capsys):
    output, applied = tmp_path / "both.safetensors", tmp_path / "applied"
    command = ["merge", files / "one", files / "two", "--output", output]
    code, _, errors = run(capsys, *command)
    assert (
        code == 2 and str(files / "two" / "delta.safetensors") in errors and "--whole first or drop" in errors
    )
    assert run(capsys, *command, "--whole", "first")[0] == 0
    assert run(capsys, "apply", output, "--model", files / "bert", "--output", applied)[0] == 0
    found, one = bits_of(applied), bits_of(files / "tuned")
    assert torch.equal(found["classifier.weight"], one["classifier.weight"])
    key = "bert.encoder.layer.0.attention.self.key.weight"
    changed = load_delta(output).changes[key]
    assert torch.equal(found[key].flatten()[changed.indices.long()], changed.values)


def test_dropped_heads_leave_a_model_of_another_class(files, tmp_path, capsys):
    """Onto a classifier of one's own, whose checkpoint has its head and tells its class, as --config does."""
    output, applied = tmp_path / "both.safetensors", tmp_path / "applied"
    command = ["merge", files / "one", files / "two", "--output", output, "--whole", "drop"]
    assert run(capsys, *command)[0] == 0 and load_delta(output).settings["whole"] == "drop"
    own = classifier(files / "bert", seed=3)
    own.save_pretrained(tmp_path / "own")
    config = tmp_path / "config"
    own.config.save_pretrained(config)
    command = ["apply", output, "--model", tmp_path / "own", "--output", applied]
    for options in ([], ["--config", config]):
        shutil.rmtree(applied, ignore_errors=True)
        assert run(capsys, *command, *options)[0] == 0
        assert torch.equal(bits_of(applied)["classifier.weight"], own.classifier.weight)


def test_no_random_weights_are_written(files, tmp_path, capsys):
    """A delta of the encoder alone, whose configuration has a head that the base lacks; also --config."""
    delta = load_delta(files / "one" / "delta.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        del delta.changes[name]
    shutil.copytree(files / "one", tmp_path / "encoder")
    delta.save(tmp_path / "encoder" / "delta.safetensors")
    message = f"--model: expected weights for classifier.bias in {files / 'bert'}, got none"
    command = ["--model", files / "bert", "--output", tmp_path / "out"]
    for name in ("apply", "revert"):
        code, _, errors = run(capsys, name, tmp_path / "encoder", *command)
        assert code == 2 and message in errors and not (tmp_path / "out").exists()
    code, _, errors = run(capsys, "revert", files / "one", *command)
    assert code == 2 and message in errors  # the head that the delta holds is not written by revert
