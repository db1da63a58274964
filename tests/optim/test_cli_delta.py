"""`id3-optim inspect | apply | revert | merge | diff`: what they write and print, and how they refuse."""

import copy
import json
import shutil

import pytest
import torch
from delta_files import bits_of, classifier, run, same, save_files, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from id3_optim import load_delta
from id3_optim.cli import merge as cli_merge


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_files(tmp_path_factory.mktemp("files"))


def test_inspect_counts_by_layer_and_role(files, capsys):
    code, printed, _ = run(capsys, "inspect", files / "one")
    delta = load_delta(files / "one" / "delta.safetensors")
    report = delta.inspect()
    assert code == 0 and f"{report['entries']:,} entries of" in printed and "with originals" in printed
    rows = [line.split() for line in printed.splitlines()]
    assert next(row for row in rows if row[:1] == ["layer"])[:4] == ["layer", "key", "query", "value"]
    keys = [delta.changes[f"bert.encoder.layer.0.attention.self.key.{kind}"] for kind in ("weight", "bias")]
    zero = next(row for row in rows if row[:1] == ["0"])
    assert zero[1] == str(sum(change.indices.numel() for change in keys))
    total = next(row for row in rows if row[:1] == ["all"])
    assert total[-1] == f"{report['entries']:,}"
    assert "classifier.weight: 2×16 float32" in printed and 'method: "id3"' in printed


def test_inspect_as_json(files, capsys):
    code, printed, errors = run(capsys, "inspect", files / "one" / "delta.safetensors", "--json")
    report = json.loads(printed)
    assert code == 0 and errors == ""
    assert report["dense_entries"] == 34 and report["tensors"]["classifier.bias"]["kind"] == "dense"
    allocation = report["allocation"]
    assert allocation["layers"] == [None, 0, 1] and allocation["roles"][0] == "key"
    assert sum(map(sum, allocation["changed"])) == report["entries"]
    assert report["bytes"] == (files / "one" / "delta.safetensors").stat().st_size


def test_inspect_draws_a_picture(files, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    code, printed, _ = run(capsys, "inspect", files / "one", "--plot", tmp_path / "new" / "a.png")
    assert code == 0 and f"picture: {tmp_path / 'new' / 'a.png'}" in printed
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")


def test_apply_and_revert(files, tmp_path, capsys):
    applied, reverted = tmp_path / "applied", tmp_path / "reverted"
    code, printed, _ = run(capsys, "apply", files / "one", "--model", files / "bert", "--output", applied)
    assert code == 0 and printed == f"written to {applied}\n"
    assert same(bits_of(applied), bits_of(files / "tuned"))
    assert AutoTokenizer.from_pretrained(applied)("good")["input_ids"]
    command = ["revert", files / "one", "--model", applied, "--output", reverted, "--json"]
    code, printed, errors = run(capsys, *command)
    summary = json.loads(printed)
    assert code == 0 and errors == "" and summary["tokenizer"] and summary["output"] == str(reverted)
    base = classifier(files / "bert").state_dict()
    again, tuned = bits_of(reverted), bits_of(applied)
    for name, value in base.items():
        assert torch.equal(again[name], tuned[name] if name.startswith("classifier") else value)
    code, _, errors = run(capsys, "revert", files / "one", "--model", reverted, "--output", tmp_path / "no")
    assert code == 2 and ", as in this delta, got " in errors and not (tmp_path / "no").exists()


def test_bf16_with_a_float32_head(files, tmp_path, capsys):
    """As `train --bf16` makes it; the base on disk is float32. The head keeps its bits in both directions."""
    model = classifier(files / "bert", torch.bfloat16)
    model.classifier.float()
    base = copy.deepcopy(model.state_dict())
    train(model, tmp_path / "delta", originals=True, compact=True)
    applied, reverted = tmp_path / "applied", tmp_path / "reverted"
    assert run(capsys, "apply", tmp_path / "delta", "--model", files / "bert", "--output", applied)[0] == 0
    assert run(capsys, "revert", tmp_path / "delta", "--model", applied, "--output", reverted)[0] == 0
    found = bits_of(reverted, torch.float32)
    for name, value in base.items():
        expected = model.state_dict()[name] if name.startswith("classifier") else value
        assert torch.equal(found[name], expected.float()), name


def test_a_delta_without_a_directory_of_its_own(files, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(files / "llama")
    path = train(model, tmp_path / "alone", config=False)
    code, _, _ = run(capsys, "apply", path, "--model", files / "llama", "--output", tmp_path / "out")
    assert code == 0 and AutoTokenizer.from_pretrained(tmp_path / "out")("good")["input_ids"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert same(found, model.state_dict())


def test_a_model_without_a_tokenizer(files, tmp_path, capsys):
    for source in ("bert", "one"):
        shutil.copytree(files / source, tmp_path / source)
        for file in (tmp_path / source).glob("*token*"):
            file.unlink()
    command = ["apply", tmp_path / "one", "--model", tmp_path / "bert", "--output", tmp_path / "out"]
    code, printed, _ = run(capsys, *command)
    assert code == 0 and printed == f"written to {tmp_path / 'out'}, without a tokenizer\n"


def test_diff_finds_what_was_trained(files, tmp_path, capsys):
    output = tmp_path / "found.safetensors"
    command = ["diff", "--base", files / "bert", "--tuned", files / "tuned", "--output", output]
    code, printed, errors = run(capsys, *command, "--json")
    summary = json.loads(printed)
    trained, found = load_delta(files / "one" / "delta.safetensors"), load_delta(output)
    assert code == 0 and errors == "" and set(summary["whole"]) == {"classifier.bias", "classifier.weight"}
    assert found.fingerprint == trained.fingerprint and summary["originals"]
    for name, change in trained.changes.items():
        for one, other in zip(change, found.changes[name], strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    code, printed, _ = run(capsys, *command, "--compact", "--no-originals")
    assert code == 0 and printed.splitlines()[-1].startswith(f"written to {output} (")
    assert output.stat().st_size < summary["bytes"] and not load_delta(output).inspect()["originals"]
    command = ["apply", output, "--model", files / "tuned", "--output", tmp_path / "no"]
    assert run(capsys, *command)[0] == 2  # the tuned model is not the base


def test_merge_reports_conflicts(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli_merge, "SHOWN", 3)
    output = tmp_path / "both.safetensors"
    for folder in ("one", "two"):  # their heads are whole and differ
        delta = load_delta(files / folder / "delta.safetensors")
        for name in ("classifier.weight", "classifier.bias"):
            del delta.changes[name]
        delta.save(tmp_path / folder)
    deltas = [tmp_path / "one", tmp_path / "two"]
    code, printed, _ = run(capsys, "merge", *deltas, "--output", output, "--json")
    summary, merged = json.loads(printed), load_delta(output)
    assert (
        code == 0 and summary["weights"] == [1.0, 1.0] and summary["entries"] == merged.inspect()["entries"]
    )
    assert summary["overlapping"] == sum(c["overlapping"] for c in summary["conflicts"].values()) > 0
    assert merged.settings["merged"][0] == load_delta(deltas[0]).settings
    command = ["merge", *deltas, "--weights", "0.5", "0.5", "--output", output, "--compact"]
    code, printed, _ = run(capsys, *command)
    assert code == 0 and printed.splitlines()[0].startswith(f"{summary['overlapping']:,} of ")
    assert "more parameters (--json lists all)" in printed and load_delta(output).settings["weights"] == [
        0.5,
        0.5,
    ]
    assert output.stat().st_size < summary["bytes"]
    command = ["apply", output, "--model", files / "bert", "--config", files / "one"]
    code, _, errors = run(capsys, *command, "--output", tmp_path / "out")
    assert code == 2 and "--model: expected weights for classifier.bias" in errors  # no one brings a head


def broken(files, folder):
    """Things that a user may give by mistake, by the names below."""
    whole = load_delta(files / "one" / "delta.safetensors")
    (folder / "cut").write_bytes((files / "one" / "delta.safetensors").read_bytes()[:-1])
    (folder / "text").write_text("not a delta, but long enough")
    bare = {name: change._replace(originals=None) for name, change in whole.changes.items()}
    type(whole)(bare, whole.fingerprint, whole.settings).save(folder / "bare", compact=True)
    shutil.copytree(files / "bert", folder / "damaged")
    (folder / "damaged" / "model.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"{" * 40)
    shutil.copytree(files / "one", folder / "adapter")
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    for name, facts in (("strange", {"architectures": ["os"]}), ("other", {"architectures": ["LlamaModel"]})):
        type(whole)(whole.changes, whole.fingerprint, {"config": facts}).save(folder / name)
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    shutil.copytree(files / "tuned", folder / "headless")
    shutil.copy(files / "bert" / "model.safetensors", folder / "headless")


MISTAKES = [
    ("inspect {}/missing", "delta: expected a file or a folder with delta.safetensors, got "),
    ("inspect {}/missing", "/missing, which does not exist"),
    ("inspect {}/empty", "delta: expected a file or a folder with delta.safetensors, got the folder "),
    ("inspect llama", "delta: expected a file or a folder with delta.safetensors, got the folder llama"),
    ("apply {}/missing --model bert --output {}/out", "delta: expected a file or a folder with delta.safe"),
    ("merge one {}/missing --output {}/out", "delta: expected a file or a folder with delta.safe"),
    ("inspect {}/cut", "a truncated file?"),
    ("inspect {}/text --json", "delta file: expected a safetensors file, got one that begins with b'"),
    ("apply {}/cut --model bert --output {}/out", "a truncated file?"),
    ("apply one --model tuned --output {}/out", "expected the base with fingerprint"),
    ("apply one --model llama --output {}/out", "expected"),
    ("apply one --model {}/empty --output {}/out", "empty"),
    ("apply one --model {}/damaged --output {}/out", "expected a model's weights in"),
    ("apply {}/adapter --model bert --output {}/out", "of the PEFT adapter in"),
    ("revert {}/adapter --model tuned --output {}/out", "of the PEFT adapter in"),
    (
        "apply {}/strange --model bert --output {}/out",
        "architectures: expected a model class of",
    ),
    (
        "apply {}/other --model bert --output {}/out",
        "expected one that LlamaModel can hold, got a bert",
    ),
    ("apply one --model bert --config llama --output {}/out", "expected"),
    ("apply one --model bert --output bert", "--output: expected another folder than --model"),
    ("apply one --model bert --output {}/file", "--output: expected a folder, got the file"),
    ("revert {}/bare --model tuned --output {}/out", "originals: expected them in the delta"),
    (
        "revert one --model bert --output {}/out",
        "expected weights for classifier.bias in bert, got none",
    ),
    (
        "merge one two --output {}/out",
        "two/delta.safetensors: classifier.weight: expected 0.",
    ),
    (
        "merge one {}/bare --output {}/out",
        "/bare: bert.embeddings.LayerNorm.bias: expected originals, got none",
    ),
    ("merge one two --weights 1 --output {}/out", "weights: expected 2 finite numbers, got [1.0]"),
    ("merge one two --weights 1 nan --output {}/out", "weights: expected 2 finite numbers"),
    ("merge one two --output {}/empty", "--output: expected a file in an existing folder, got the folder"),
    ("merge one two --output {}/no/where", "--output: expected a file in an existing folder, got '"),
    ("merge one one --output {}/out", "deltas: expected each file once, got one/delta.safetensors twice"),
    ("merge one one/delta.safetensors --output {}/out", "expected each file once"),
    ("merge one two --output one/delta.safetensors", "expected another file than the delta one/delta"),
    ("merge one two --output bert/model.safetensors", "expected a new file or a delta to replace, got bert/"),
    ("diff --base bert --tuned tuned --output tuned/config.json", "expected a new file or a delta to rep"),
    ("convert bert/config.json --model bert --output bert/model.safetensors", "expected a new file or a d"),
    ("apply one --model bert --output two", "expected a new or an empty folder, got two with config.json"),
    ("revert one --model tuned --output bert", "expected a new or an empty folder, got bert with config"),
    (
        "apply one --model ./nowhere --output {}/out",
        "--model: expected a folder or the name of a model on the hub, got ./nowh",
    ),
    (
        "apply one --model nowhere --output {}/out",
        "--model: expected a folder or the name of a model on the hub, got nowhere:",
    ),
    ("revert one --model no/where/at/all --output {}/out", "got no/where/at/all, which does not exist"),
    (
        "apply one --model bert --config ~/no --output {}/out",
        "--config: expected a folder or the name of a model on the hub",
    ),
    (
        "diff --base nowhere --tuned tuned --output {}/out",
        "--base: expected a folder or the name of a model on the hub, got",
    ),
    (
        "diff --base bert --tuned /no/where --output {}/out",
        "--tuned: expected a folder or the name of a model on the hub, got",
    ),
    ("convert one/config.json --model nowhere --output {}/out", "--model: expected a folder or the na"),
    (
        "estimate --model one/nowhere",
        "--model: expected a folder or the name of a model on the hub, got one/nowhere, which does",
    ),
    (
        "estimate --model nowhere",
        "--model: expected a folder or the name of a model on the hub, got nowhere: there is no such f",
    ),
    ("estimate --model {}/empty", "--model: expected a config.json in"),
    (
        "diff --base llama --tuned tuned --output {}/out",
        "--base: expected a bert model as --tuned, got llama",
    ),
    ("diff --base bert --tuned {}/headless --output {}/out", "expected weights for classifier.bias"),
    ("diff --base {}/damaged --tuned tuned --output {}/out", "expected a model's weights in"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_code_2(files, tmp_path, capsys, monkeypatch, command, message):
    monkeypatch.chdir(files)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    broken(files, tmp_path)
    code, printed, errors = run(capsys, *command.format(tmp_path, tmp_path).split())
    assert (code, printed) == (2, ""), errors
    assert errors.startswith("id3-optim: error: ") and errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "out").exists()
