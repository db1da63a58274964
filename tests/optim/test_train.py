"""`id3_optim.cli.train`: from files to a tuned model, with models made on the spot."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import save_bert, save_llama, word_tokenizer, write_completions, write_reviews
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
)

from id3_optim.cli import tasks
from id3_optim.cli.models import load_model
from id3_optim.cli.report import table, write_report
from id3_optim.cli.settings import Settings
from id3_optim.cli.start import load_start
from id3_optim.cli.train import build_optimizer, fit, train
from id3_optim.delta import load_delta
from id3_optim.integrations.huggingface import ID3Callback


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_bert(folder / "bert")
    save_llama(folder / "llama")
    write_reviews(folder / "reviews.csv")
    write_completions(folder / "facts.jsonl")
    return folder


@pytest.fixture
def settings(files, tmp_path):
    return Settings(
        model=str(files / "bert"),
        train=str(files / "reviews.csv"),
        eval=str(files / "reviews.csv"),
        output=str(tmp_path / "out"),
        budget=300,
        steps=30,
        batch_size=8,
        lr=1e-2,
        log_every=5,
        cpu=True,
    )


@pytest.fixture
def causal(settings, files):
    facts = str(files / "facts.jsonl")
    return replace(settings, model=str(files / "llama"), train=facts, eval=facts, batch_size=6)


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_classification_learns_within_the_budget(settings):
    report, start, optimizer = train(replace(settings, budget=2500, steps=60))
    assert report["metrics"]["eval_accuracy"] == 1.0
    assert start.fresh == {"classifier.weight", "classifier.bias"}
    assert report["entries"]["dense"] == 2 * 16 + 2
    assert optimizer.n_active == report["entries"]["active"] == 2500
    assert report["entries"]["changed"] == 2500
    assert report["optimizer"]["total_steps"] == report["steps"] == 60
    base = BertForSequenceClassification.from_pretrained(settings.model)
    pretrained = dict(base.named_parameters())
    changed = sum(
        int((value != pretrained[name]).sum())
        for name, value in start.model.named_parameters()
        if name not in start.fresh
    )
    assert changed == 2500


def test_a_static_budget_of_everything_is_adamw(settings):
    """Same batches, dropout and learning rates. Losses are compared, not weights: a key's bias has no
    effect on attention, so its gradient is rounding noise, of which Adam makes whole steps."""
    short = replace(settings, steps=10, max_grad_norm=0.0, overwrite=True)
    all_active, _, _ = train(replace(short, budget=1.0, strategy="static"))
    dense, _, _ = train(replace(short, optimizer="adamw"))
    assert all_active["metrics"]["eval_loss"] == pytest.approx(dense["metrics"]["eval_loss"], rel=1e-4)


def test_the_head_has_its_own_rate_with_every_optimizer(settings):
    _, start, optimizer = train(replace(settings, optimizer="adamw", steps=2, head_lr=0.25))
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in start.model.named_parameters()}
    assert {name for name, rate in found.items() if rate == 0.25} == start.fresh
    assert set(found.values()) == {0.25, settings.lr}


def test_the_written_model_is_the_tuned_one(settings):
    _, start, _ = train(settings)
    again = AutoModelForSequenceClassification.from_pretrained(settings.output)
    assert again.config.label2id == {"blame": 0, "praise": 1}
    assert all(
        torch.equal(value, start.model.state_dict()[name]) for name, value in again.state_dict().items()
    )


def test_the_seed_gives_the_run(settings):
    short = replace(settings, steps=6, overwrite=True)
    runs = [bits(train(s)[1].model) for s in (short, short, replace(short, seed=7))]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert not torch.equal(runs[0]["classifier.weight"], runs[2]["classifier.weight"])


@pytest.mark.parametrize(
    ("batch", "accumulate", "epochs", "steps"), [(7, 2, 2, 6), (16, 1, 1.5, 5), (40, 3, 2, 2)]
)
def test_total_steps_are_those_the_trainer_takes(settings, batch, accumulate, epochs, steps):
    uneven = replace(settings, steps=None, batch_size=batch, accumulate=accumulate, epochs=epochs)
    _, _, optimizer = train(uneven)
    assert optimizer.total_steps == optimizer.steps_done == steps
    assert optimizer.n_active == 300


def test_total_steps_given_before_stay(settings):
    task = tasks.read_task(settings.train, settings.eval)
    start = load_start(settings, task)
    optimizer = build_optimizer(settings, start)
    optimizer.set_total_steps(60)
    run = fit(start, task, optimizer, settings, [ID3Callback()])
    assert (optimizer.total_steps, optimizer.n_active) == (60, 150)
    counts = [entry["n_active"] for entry in run.history if "loss" in entry]
    assert counts == [25, 50, 75, 100, 125, 150]
    assert all(entry["threshold"] > 0 for entry in run.history if "loss" in entry)


def test_a_head_of_another_size_is_fresh(settings, tmp_path):
    """A classifier with three classes is tuned for two: its head has no use, its encoder has."""
    old = BertForSequenceClassification.from_pretrained(settings.model, num_labels=3)
    old.save_pretrained(tmp_path / "three")
    word_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]").save_pretrained(
        tmp_path / "three"
    )
    task = tasks.read_task(settings.train, settings.eval)
    start = load_start(replace(settings, model=str(tmp_path / "three")), task)
    assert start.fresh == {"classifier.weight", "classifier.bias"}
    assert start.model.classifier.out_features == 2


def test_causal_lm_learns_the_completions(causal):
    before, _, _ = train(replace(causal, steps=1, lr=1e-9))
    report, start, optimizer = train(replace(causal, budget=0.2, steps=60, overwrite=True))
    assert report["metrics"]["eval_token_loss"] < 0.5 < before["metrics"]["eval_token_loss"]
    assert start.fresh == set()
    assert optimizer.n_active == int(0.2 * sum(p.numel() for p in start.model.parameters()))
    again = AutoModelForCausalLM.from_pretrained(causal.output)
    assert all(
        torch.equal(value, start.model.state_dict()[name]) for name, value in again.state_dict().items()
    )


def test_token_loss_is_the_mean_over_the_tokens_of_all_batches(causal):
    """Batches of unequal length must not count alike."""
    report, start, _ = train(replace(causal, steps=1, batch_size=1))
    losses = []
    for row in tasks.encode(
        tasks.read_task(causal.train, causal.eval).eval,
        tasks.Task("causal-lm", [], [], []),
        start.tokenizer,
        32,
    ).rows:
        logits = start.model(torch.tensor([row["input_ids"]])).logits[0]
        losses += [
            torch.nn.functional.cross_entropy(logits[i - 1], torch.tensor(token)).item()
            for i, token in enumerate(row["labels"])
            if token != tasks.IGNORED
        ]
    assert report["metrics"]["eval_token_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_a_second_file_is_measured_at_the_end(causal, tmp_path, capsys):
    other = tmp_path / "other.jsonl"
    other.write_text(Path(causal.train).read_text().splitlines()[0])
    causal = replace(causal, max_length=4)
    report, _, _ = train(replace(causal, steps=3, also_eval=str(other)))
    assert "--also-eval: 1 of 1 rows are cut to 4 tokens (--max-length)" in "".join(capsys.readouterr())
    alone, _, _ = train(replace(causal, steps=3, eval=str(other), overwrite=True))
    found = report["metrics"]
    assert found["also_token_loss"] == alone["metrics"]["eval_token_loss"] != found["eval_token_loss"]
    base, _, _ = train(replace(causal, steps=1, lr=1e-30, also_eval=str(other), overwrite=True))
    assert found["before_token_loss"] == pytest.approx(base["metrics"]["also_token_loss"], abs=1e-6)
    assert found["before_token_loss"] != found["also_token_loss"]


def test_what_is_measured_before_training_changes_nothing(settings, causal, tmp_path):
    """Dropout and batches are those of a run that measures nothing; a fresh head has nothing to forget."""
    model = shutil.copytree(causal.model, tmp_path / "dropout")
    config = json.loads((model / "config.json").read_text()) | {"attention_dropout": 0.5}
    (model / "config.json").write_text(json.dumps(config))
    for given, is_fresh in ((replace(causal, model=str(model)), False), (settings, True)):
        states = []
        for also in (None, given.eval):
            report, start, _ = train(replace(given, steps=3, also_eval=also, overwrite=True))
            states.append(bits(start.model))
        assert ("before_loss" in report["metrics"]) is not is_fresh
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("bf16", [False, True])
def test_a_delta_on_its_base_is_the_tuned_model(settings, bf16):
    tuned = replace(settings, delta_only=True, bf16=bf16, steps=8)
    _, start, _ = train(tuned)
    path = Path(tuned.output) / "delta.safetensors"
    assert not (path.parent / "model.safetensors").exists()
    delta = load_delta(path)
    model = load_model(delta, path.parent, settings.model)
    delta.apply(model, strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, start.model.state_dict()[name]), name
    assert start.model.bert.pooler.dense.weight.dtype == (torch.bfloat16 if bf16 else torch.float32)
    assert start.model.classifier.weight.dtype == torch.float32


def test_adamw_trains_everything(settings):
    report, start, _ = train(replace(settings, optimizer="adamw", lr=5e-3))
    total = sum(p.numel() for p in start.model.parameters())
    assert report["metrics"]["eval_accuracy"] == 1.0
    assert report["entries"]["active"] + report["entries"]["dense"] == total
    assert report["optimizer_bytes"] >= 8 * total
    with pytest.raises(ValueError, match="--optimizer: expected id3 with --delta-only, got adamw"):
        train(replace(settings, optimizer="adamw", delta_only=True))


@pytest.mark.parametrize(
    "choice",
    [
        {"heuristic": "magnitude"},
        {"heuristic": "random"},
        {"heuristic": "bias", "budget": 20},
        {"strategy": "static"},
        {"strategy": "repeat"},
        {"schedule": "exponential:3"},
        {"bias_correction": "entry"},
    ],
)
def test_every_way_to_choose_keeps_the_budget(settings, choice):
    _, _, optimizer = train(replace(settings, steps=4, **choice))
    assert optimizer.n_active == choice.get("budget", 300)


def test_report_is_json_and_a_table(settings, tmp_path):
    report, _, _ = train(replace(settings, steps=5))
    write_report(tmp_path / "new" / "report.json", report | {"odd": float("nan")})
    read = json.loads((tmp_path / "new" / "report.json").read_text())
    assert read["odd"] is None and read["settings"]["budget"] == 300
    step = read["step_ms"]
    assert step["forward_backward"] + step["select"] + step["update"] == pytest.approx(step["total"])
    text = table(report)
    for word in (
        "accuracy",
        "entries changed",
        "300 of",
        "optimizer state",
        "forward, backward",
        "select",
        "update",
    ):
        assert word in text


def test_a_resumed_run_ends_where_the_straight_one_does(settings, tmp_path):
    straight = replace(settings, output=str(tmp_path / "straight"), steps=12, save_every=5, bf16=True)
    _, whole, optimizer = train(straight)
    assert load_delta(tmp_path / "straight/checkpoint-10/delta.safetensors").settings["step"] == 10
    shutil.copytree(tmp_path / "straight/checkpoint-5", tmp_path / "cut/checkpoint-5")
    _, resumed, second = train(replace(straight, output=str(tmp_path / "cut"), resume=True))
    assert (second.steps_done, second.n_active) == (12, optimizer.n_active)
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    with pytest.raises(ValueError, match="--budget: expected 300 as in checkpoint-12, got 7"):
        train(replace(straight, output=str(tmp_path / "cut"), resume=True, budget=7))


def test_there_must_be_something_to_resume(settings, tmp_path):
    with pytest.raises(ValueError, match="--resume: expected a whole checkpoint of --save-every"):
        train(replace(settings, output=str(tmp_path / "empty"), resume=True))


def test_deltas_along_the_budget(settings, tmp_path):
    train(replace(settings, output=str(tmp_path), steps=10, budget=100, save_at=(20, 50), originals=True))
    names = sorted(path.name for path in tmp_path.glob("delta-*"))
    assert names == ["delta-20.safetensors", "delta-50.safetensors"]
    assert load_delta(tmp_path / names[1]).inspect()["originals"]
    with pytest.raises(ValueError, match="--optimizer: expected id3 with --save-at, got adamw"):
        train(replace(settings, optimizer="adamw", save_at=(20,)))
