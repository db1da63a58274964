"""`--allow-nonfinite`, `--cast`, and what `inspect` and `merge` say of values: the command line's half."""

import json
import math

import pytest
import torch
from delta_files import bits_of, classifier, run, same, save_files, train
from transformers import AutoModel

from id3_optim import load_delta

KEY = "bert.encoder.layer.0.attention.self.key.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def diverged(files, tmp_path):
    """one/ with a NaN and an infinity among its values."""
    delta = load_delta(files / "one" / "delta.safetensors")
    delta.changes[KEY].values[:2] = torch.tensor([math.nan, math.inf])
    delta.save(tmp_path / "diverged", allow_nonfinite=True)
    return tmp_path / "diverged"


def with_config(files, *words):
    return [*words, "--config", files / "one"]


def test_a_delta_of_a_run_that_diverged(files, diverged, tmp_path, capsys):
    base, out, other = files / "bert", tmp_path / "out", tmp_path / "other"
    commands = [
        with_config(files, "apply", diverged, "--model", base, "--output", out),
        ["merge", diverged, files / "two", "--whole", "first", "--output", other],
    ]
    for command, output in zip(commands, (out, other), strict=True):
        status, _, errors = run(capsys, *command)
        assert status == 2 and "expected finite values, got nan at index" in errors
        assert "--allow-nonfinite takes them" in errors and "=True" not in errors
        assert not output.exists()
        assert run(capsys, *command, "--allow-nonfinite")[0] == 0
    assert bits_of(out)[KEY].isnan().any() and load_delta(other).nonfinite() == {KEY: 2}
    command = ["diff", "--base", base, "--tuned", out, "--output", tmp_path / "found"]
    assert run(capsys, *command)[0] == 2 and not (tmp_path / "found").exists()
    assert run(capsys, *command, "--allow-nonfinite")[0] == 0
    reverted = tmp_path / "reverted"
    assert run(capsys, *with_config(files, "revert", diverged, "--model", out, "--output", reverted))[0] == 0
    assert torch.equal(bits_of(reverted)[KEY], bits_of(base)[KEY])


def test_inspect_counts_them(files, diverged, capsys):
    status, printed, _ = run(capsys, "inspect", diverged)
    assert status == 0 and f"2 values are NaN or infinite, first in {KEY}\n" in printed
    assert json.loads(run(capsys, "inspect", diverged, "--json")[1])["nonfinite"] == {KEY: 2}
    whole = files / "one"
    assert "infinite" not in run(capsys, "inspect", whole)[1]
    assert json.loads(run(capsys, "inspect", whole, "--json")[1])["nonfinite"] == {}


def test_a_float32_delta_on_a_bfloat16_base(files, tmp_path, capsys):
    """Refused with the option; with it the model is bfloat16, its head too, and the values are rounded."""
    AutoModel.from_pretrained(files / "bert").bfloat16().save_pretrained(tmp_path / "low")
    command = ["apply", files / "one", "--model", tmp_path / "low", "--output", tmp_path / "out"]
    status, _, errors = run(capsys, *command)
    assert status == 2 and not (tmp_path / "out").exists()
    assert "--model holds torch.bfloat16 and the delta torch.float32, which --cast rounds" in errors
    assert run(capsys, *command, "--cast")[0] == 0
    found = bits_of(tmp_path / "out")
    tuned = {name: value.bfloat16() for name, value in bits_of(files / "tuned").items()}
    assert same({n: v for n, v in found.items() if v.is_floating_point()},
                {n: v for n, v in tuned.items() if n in found and v.is_floating_point()})  # fmt: skip


def test_a_bfloat16_delta_on_a_float32_base(files, tmp_path, capsys):
    """Without the option the model is bfloat16, as the one that was trained; with it it stays float32."""
    model = classifier(files / "bert", torch.bfloat16)
    path = train(model, tmp_path / "low", originals=True)
    command = ["apply", tmp_path / "low", "--model", files / "bert", "--output"]
    assert run(capsys, *command, tmp_path / "narrow")[0] == 0
    assert same(bits_of(tmp_path / "narrow"), model.state_dict())
    assert run(capsys, *command, tmp_path / "wide", "--cast")[0] == 0
    wide, base = bits_of(tmp_path / "wide"), classifier(files / "bert").state_dict()
    for name, change in load_delta(path).changes.items():
        expected = base[name].clone().flatten()
        rows = slice(None) if change.indices is None else change.indices.long()
        expected[rows] = change.values.float().flatten()
        assert torch.equal(wide[name].flatten(), expected) and wide[name].dtype == torch.float32


def test_a_base_of_other_values_is_refused_with_the_option_too(files, tmp_path, capsys):
    stranger = classifier(files / "bert").bfloat16()
    with torch.no_grad():
        stranger.get_parameter(KEY).add_(1)
    stranger.save_pretrained(tmp_path / "low")
    command = ["apply", files / "one", "--model", tmp_path / "low", "--output", tmp_path / "out", "--cast"]
    status, _, errors = run(capsys, *command)
    assert status == 2 and "expected the base with fingerprint" in errors and not (tmp_path / "out").exists()


def test_merge_counts_what_both_change(files, tmp_path, capsys):
    copy = tmp_path / "copy"
    copy.write_bytes((files / "one" / "delta.safetensors").read_bytes())
    command = ["merge", files / "one", copy, "--output", tmp_path / "out", "--json"]
    summary = json.loads(run(capsys, *command)[1])
    assert summary["overlapping"] == summary["entries"] > 0 and summary["opposed"] == 0
    link = tmp_path / "link"
    link.symlink_to(copy)
    status, _, errors = run(capsys, "merge", copy, link, "--output", tmp_path / "no")
    assert status == 2 and "deltas: expected each file once" in errors and not (tmp_path / "no").exists()
