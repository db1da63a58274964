"""Deltas on the Hugging Face hub, against a stand-in for its HTTP interface on the loopback."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("huggingface_hub", reason="the hub needs the extra `hub`")

import hub_stand_in
from huggingface_hub import ModelCard, constants
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

import id3_optim
from id3_optim import DeltaError, ID3AdamW, load_delta, push_delta_to_hub, save_delta
from id3_optim.cli import main
from id3_optim.delta.hub import is_hub_name


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stand_in.serving() as (hub, url):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub_stand_in.TOKEN)
        yield hub


@pytest.fixture
def trained(model, train, tmp_path):
    """(the file of a delta, the base's parameters, the tuned ones)."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = ID3AdamW(model.named_parameters(), lr=1e-2, budget=200, total_steps=4)
    train(model, optimizer, 0, 4)
    save_delta(tmp_path / "tuned.safetensors", model, optimizer, originals=True)
    after = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.load_state_dict(before)
    return tmp_path / "tuned.safetensors", after


def test_what_was_pushed_comes_back(hub, trained, model):
    file, after = trained
    url = push_delta_to_hub(file, "user/tuned", base="org/base", base_revision="1a2b3c", private=True)
    assert url.endswith(f"/user/tuned/commit/{hub.files('user/tuned')[0]}") and hub.private["user/tuned"]
    assert hub.files("user/tuned")[1]["delta.safetensors"] == file.read_bytes() in hub.objects.values()
    load_delta("user/tuned").apply(model)
    assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())


def test_a_delta_in_memory_without_a_file(hub, trained, model):
    push_delta_to_hub(load_delta(trained[0]), "user/tuned")
    load_delta("user/tuned").apply(model)
    assert all(torch.equal(p, trained[1][name]) for name, p in model.named_parameters())


def test_the_card_says_method_budget_base_and_metrics(hub, trained):
    more = {"license": "mit", "datasets": ["org/reviews"]}
    push_delta_to_hub(trained[0], "user/tuned", "org/base", "1a2b3c", {"accuracy": 0.91}, more)
    files = hub.files("user/tuned")[1]
    card = ModelCard(files["README.md"].decode())
    fields = card.data.to_dict()
    assert fields["base_model"] == "org/base" and fields["base_model_relation"] == "adapter"
    assert fields["library_name"] == "id3-optim" and fields["license"] == "mit"
    mark = load_delta(trained[0]).inspect()["fingerprint"]
    for part in (
        "200 entries of 3,617 (5.53%)", "`org/base` at `1a2b3c`", mark, "| budget | 200 |",
        '| method | "id3" |',
        '| heuristic | {"name": "d3", "eps": 1.0, "exp": 2.0} |', "| accuracy | 0.91 |", 'revision="1a2b3c"',
        'load_delta("user/tuned").apply(model)',
    ):  # fmt: skip
        assert part in card.content, part
    if "allocation.png" in card.content:
        assert files["allocation.png"].startswith(b"\x89PNG")


def test_the_picture_is_left_out_without_matplotlib(hub, trained, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name)
    )
    push_delta_to_hub(trained[0], "user/tuned")
    files = hub.files("user/tuned")[1]
    assert set(files) == {"README.md", "delta.safetensors"} and b"allocation" not in files["README.md"]
    assert b"a base that is not named" in files["README.md"]


def test_a_revision_is_a_commit(hub, trained, model):
    push_delta_to_hub(trained[0], "user/tuned", metrics={"loss": 2.0})
    first = hub.files("user/tuned")[0]
    other = load_delta(trained[0])
    other.settings["step"] = 99
    push_delta_to_hub(other, "user/tuned")
    assert load_delta("user/tuned").settings["step"] == 99
    assert load_delta("user/tuned", revision=first).settings["step"] == 4


def test_the_second_load_is_from_the_cache(hub, trained):
    push_delta_to_hub(trained[0], "user/tuned")
    load_delta("user/tuned")
    asked = len(hub.requests)
    load_delta("user/tuned", local_files_only=True)
    assert len(hub.requests) == asked
    load_delta("user/tuned")
    assert [method for method, _ in hub.requests[asked:]] == ["HEAD"]


def test_the_hubs_own_errors(hub, trained):
    push_delta_to_hub(trained[0], "user/tuned")
    with pytest.raises(RepositoryNotFoundError):
        load_delta("user/nothing")
    with pytest.raises(RevisionNotFoundError):
        load_delta("user/tuned", revision="v9")
    with pytest.raises(EntryNotFoundError):
        load_delta("user/tuned", filename="other.safetensors")
    with pytest.raises(OSError, match="401"):
        push_delta_to_hub(trained[0], "user/tuned", token="hf_wrong")


def test_nothing_is_sent_of_a_delta_that_is_damaged(hub, trained, tmp_path, monkeypatch):
    (tmp_path / "cut.safetensors").write_bytes(trained[0].read_bytes()[:100])
    with pytest.raises(DeltaError):
        push_delta_to_hub(tmp_path / "cut.safetensors", "user/tuned")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "base").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="base: expected the name of a model on the hub, got the folder org/base"
    ):
        push_delta_to_hub(trained[0], "user/tuned", base="org/base")
    assert not hub.requests


def test_what_is_a_name_and_what_a_path(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert is_hub_name("user/tuned") and is_hub_name("user.name/tuned-v1.0")
    paths = ["tuned", "a/b/c", "user/tuned.safetensors", "runs/tuned", "./tuned", "~/tuned", "/tuned", ""]
    assert not any(map(is_hub_name, [*paths, Path("user/tuned")]))
    with pytest.raises(FileNotFoundError):
        load_delta("runs/tuned")
    with pytest.raises(
        ValueError, match=r"revision: does not apply to a file of this machine: .*tuned.safetens"
    ):
        load_delta(trained[0], revision="main")


def test_the_command_line_reads_a_name(hub, trained, capsys):
    push_delta_to_hub(trained[0], "user/tuned")
    assert main(["inspect", "user/tuned", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["entries"] == 200
    assert main(["inspect", "user/nothing"]) == 2
    error = capsys.readouterr().err.strip()
    assert (
        error.startswith("id3-optim: error: delta: expected a file or a repository on the hub")
        and "\n" not in error
    )


def test_the_command_line_without_a_network(trained, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} seconds"))
    assert main(["inspect", "user/tuned"]) == 2
    assert "and the hub gave none" in capsys.readouterr().err


# --- transformers' Trainer ------------------------------------------------------------------------------

PROGRAM = """
import sys
import torch
from tiny_models import save_llama
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from id3_optim.integrations.huggingface import ID3Callback, id3_optimizer

folder, strategy = sys.argv[1:]
words = torch.tensor([6, 8, 13, 5])
model = AutoModelForCausalLM.from_pretrained(save_llama(folder + "/base"))
args = TrainingArguments(
    folder + "/run", max_steps=4, save_steps=2, learning_rate=1e-2, max_grad_norm=0, report_to="none",
    use_cpu=True, push_to_hub=True, hub_model_id="user/run", hub_strategy=strategy, hub_always_push=True,
)
trainer = Trainer(
    model, args, train_dataset=[{"input_ids": words, "labels": words}] * 8,
    optimizer_cls_and_kwargs=id3_optimizer(args, budget=300), callbacks=[ID3Callback(originals=True)],
)
trainer.train()
trainer.push_to_hub()
trainer.model.save_pretrained(folder + "/tuned")
"""


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_the_trainer_uploads_the_delta(tmp_path, strategy):
    """Also in the checkpoint on the hub, which a run on another machine goes on from."""
    pytest.importorskip("accelerate", reason="the Trainer needs the extra `hf`")
    from transformers import AutoModelForCausalLM

    with hub_stand_in.serving() as (hub, url):
        own = {"HF_ENDPOINT": url, "HF_TOKEN": hub_stand_in.TOKEN, "HF_HOME": str(tmp_path / "home")}
        own["HF_HUB_DISABLE_XET"] = "1"
        own["PYTHONPATH"] = os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | own
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), strategy]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        commits = [files for _, files in hub.repos["user/run"]]
    (tmp_path / "delta.safetensors").write_bytes(commits[-1]["delta.safetensors"])
    delta = load_delta(tmp_path / "delta.safetensors")
    assert delta.settings["step"] == 4 and delta.inspect()["entries"] == 300
    base, tuned = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "tuned"))
    delta.apply(base)
    assert all(map(torch.equal, base.parameters(), tuned.parameters()))
    if strategy != "end":
        assert any("delta.safetensors" in files for files in commits[1:-1])
    if strategy == "checkpoint":
        assert "last-checkpoint/delta.safetensors" in commits[-1]


def test_it_is_public():
    assert "push_delta_to_hub" in id3_optim.__all__
