"""What a delta knows of its model beside the weights: class, labels, padding, dtypes."""

import json
import re
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="the command line needs the extra `hf`")

from safetensors.torch import load_file
from train_command import run, save_train_files, words
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from id3_optim import Delta, load_delta
from id3_optim.cli.models import facts_of
from id3_optim.delta.publish import delta_card


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = save_train_files(tmp_path_factory.mktemp("files"))
    text = (folder / "reviews.csv").read_text().replace("praise", "ham").replace("blame", "spam")
    (folder / "other.csv").write_text(text)
    return folder


def alone(folder, tmp_path):
    """The delta of a run in a folder of its own, as on the hub."""
    path = tmp_path / "alone/delta.safetensors"
    path.parent.mkdir()
    return shutil.copy(folder / "delta.safetensors", path)


def test_the_delta_alone_has_the_class_and_the_labels(files, tmp_path, capsys):
    first, tuned, applied = tmp_path / "first", tmp_path / "tuned", tmp_path / "applied"
    assert run(capsys, words(files, first))[0] == 0
    own = {"model": first, "data": "other.csv"}
    assert run(capsys, words(files, tuned, "--delta-only", **own))[0] == 0
    path = alone(tuned, tmp_path)
    apply = ["apply", str(path), "--model", str(first), "--output", str(applied)]
    assert run(capsys, apply)[0] == 0
    labels = AutoModelForSequenceClassification.from_pretrained(applied).config.id2label
    assert labels == {0: "ham", 1: "spam"}


def test_the_card_of_what_train_writes_runs_as_it_stands(files, tmp_path, capsys):
    assert run(capsys, words(files, tmp_path / "tuned", "--delta-only"))[0] == 0
    path = alone(tmp_path / "tuned", tmp_path)
    code = re.search(r"```python\n(.*?)```", delta_card(load_delta(path), "user/x", None), re.DOTALL)[1]
    found = {}
    exec(code.replace('"BASE"', repr(str(files / "bert"))).replace('"user/x"', repr(str(path))), found)
    assert type(found["model"]).__name__ == "BertForSequenceClassification"
    assert found["model"].config.id2label == {0: "blame", 1: "praise"}
    assert (
        run(capsys, ["apply", str(path), "--model", str(files / "bert"), "--output", str(tmp_path / "a")])[0]
        == 0
    )


def test_a_decoder_that_classifies_keeps_its_padding(files, tmp_path, capsys):
    tuned, made, applied = tmp_path / "tuned", tmp_path / "made", tmp_path / "applied"
    assert run(capsys, words(files, tuned, model="llama"))[0] == 0
    diff = ["diff", "--base", files / "llama", "--tuned", tuned, "--output", made]
    assert run(capsys, [*map(str, diff)])[0] == 0
    assert run(capsys, [*map(str, ["apply", made, "--model", files / "llama", "--output", applied])])[0] == 0
    model = AutoModelForSequenceClassification.from_pretrained(applied)
    assert model(torch.arange(12).view(2, 6)).logits.shape == (2, 2)


def test_rows_are_padded_by_what_the_model_takes_for_padding(files, tmp_path, capsys):
    """A configuration with another padding token than the tokenizer's."""
    base, report = tmp_path / "base", tmp_path / "report.json"
    shutil.copytree(files / "llama", base)
    config = json.loads((base / "config.json").read_text()) | {"pad_token_id": 0}
    (base / "config.json").write_text(json.dumps(config))
    rows = "good,praise\nthe film was the film was the film was awful,blame\nbad the,blame\n"
    (files / "lengths.csv").write_text("text,label\n" + 8 * rows)
    more = ["--lr", "1e-2", "--report", str(report)]
    assert run(capsys, words(files, tmp_path / "tuned", *more, model=base, data="lengths.csv"))[0] == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    losses = []
    for line in rows.splitlines():
        text, label = line.split(",")
        logits = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([model.config.label2id[label]])))
    measured = json.loads(report.read_text())["metrics"]["eval_loss"]
    assert measured == pytest.approx(float(sum(losses)) / 3, rel=1e-4)


def test_diff_names_what_it_does_not_hold_of_the_configuration(files, tmp_path, capsys):
    tuned, made = tmp_path / "tuned", tmp_path / "made"
    model = AutoModelForCausalLM.from_pretrained(files / "llama")
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    model.config.rms_norm_eps = 0.01
    model.save_pretrained(tuned)
    diff = [*map(str, ["diff", "--base", files / "llama", "--tuned", tuned, "--output", made])]
    _, printed, _ = run(capsys, diff)
    assert f"the configurations differ, too: rms_norm_eps; `apply --config {tuned}`" in printed
    made.unlink()
    assert json.loads(run(capsys, [*diff, "--json"])[1])["configuration"] == ["rms_norm_eps"]
    applied = tmp_path / "applied"
    apply = ["apply", made, "--model", files / "llama", "--config", tuned, "--output", applied]
    assert run(capsys, [*map(str, apply)])[0] == 0
    x = torch.arange(12).view(1, 12)
    again = AutoModelForCausalLM.from_pretrained(applied)
    assert torch.equal(again(x).logits, AutoModelForCausalLM.from_pretrained(tuned)(x).logits)


def test_a_head_in_float32_beside_bfloat16_stays_exact(files, tmp_path, capsys):
    tuned, made, applied = tmp_path / "tuned", tmp_path / "made", tmp_path / "applied"
    assert run(capsys, words(files, tuned, "--bf16"))[0] == 0
    diff = ["diff", "--base", files / "bert", "--tuned", tuned, "--output", made]
    assert run(capsys, [*map(str, diff)])[0] == 0
    assert run(capsys, [*map(str, ["apply", made, "--model", files / "bert", "--output", applied])])[0] == 0
    found, own = (load_file(folder / "model.safetensors") for folder in (applied, tuned))
    assert found.keys() == own.keys() and len({value.dtype for value in own.values()}) == 2
    assert all(
        value.dtype == own[name].dtype and torch.equal(value, own[name]) for name, value in found.items()
    )


def test_a_delta_without_them_has_those_beside_it(files, tmp_path):
    """Of an earlier release."""
    delta = Delta({}, None, {})
    assert facts_of(delta, tmp_path) == {}
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    assert facts_of(delta, tmp_path) == config
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="expected a configuration in JSON"):
        facts_of(delta, tmp_path)
