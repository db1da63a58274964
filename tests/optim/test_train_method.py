"""`id3-optim train --method`: the methods of `id3_optim.methods` by name."""

import json

import pytest
import torch
from train_command import run, save_train_files, words
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

from id3_optim import methods, pools
from id3_optim.cli.reading import read_labelled


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_train_files(tmp_path_factory.mktemp("files"))


def trained(capsys, files, tmp_path, *more, steps=40):
    report = tmp_path / "report.json"
    command = words(files, tmp_path / "out", "--lr", "1e-2", "--report", report, *more, steps=steps)
    code, printed, error = run(capsys, command)
    assert code == 0, error
    return json.loads(report.read_text()), printed


CHOSEN = ["id3", "fish", "bitfit", "full", "lora", "adalora", "shira", "id3+lora", "sparse-adapter", "diff"]


def loss_of(model, folder, files):
    rows = read_labelled(str(files / "reviews.csv"), ["text"], "label")
    batch = AutoTokenizer.from_pretrained(folder)(
        [r.texts[0] for r in rows], padding=True, return_tensors="pt"
    )
    labels = torch.tensor([model.config.label2id[row.label] for row in rows])
    with torch.no_grad():
        return model.eval()(**batch, labels=labels).loss.item()


@pytest.mark.parametrize("name", CHOSEN)
def test_a_method_learns_and_its_model_reloads(capsys, files, tmp_path, name):
    report, _ = trained(capsys, files, tmp_path, "--method", name, "--head-lr", "3e-2")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    if "adapter" in name:
        pools.load_bottlenecks(model, tmp_path / "out")
    loss = report["metrics"]["eval_loss"]
    assert loss_of(model, tmp_path / "out", files) == pytest.approx(loss, rel=1e-4)
    assert loss < report["history"][0]["loss"]
    own = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("classifier."))
    active = report["entries"]["active"]
    assert active == own if name == "full" else active > 0
    if name in methods.SELECTIVE or "+" in name:
        assert active <= 300


def test_id3_by_name_is_the_default(capsys, files, tmp_path):
    for folder, more in (("a", []), ("b", ["--method", "id3"])):
        assert run(capsys, words(files, tmp_path / folder, *more))[0] == 0
    a, b = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in "ab")
    assert a == b


def test_eps_and_exp_reach_the_scores_of_several_steps(capsys, files, tmp_path):
    report = tmp_path / "report.json"
    more = ["--method", "id3-sum", "--eps", "0.5", "--exp", "1", "--report", report]
    assert run(capsys, words(files, tmp_path / "out", *more))[0] == 0
    heuristic = json.loads(report.read_text())["optimizer"]["heuristic"]
    assert heuristic["kind"] == "sum" and heuristic["d3"] == {"name": "d3", "eps": 0.5, "exp": 1.0}


def test_the_recipe_has_its_own_rate_and_leaves_embeddings_alone(capsys, files, tmp_path):
    report = tmp_path / "report.json"
    more = ["--method", "recipe", "--report", report, "--sparse-backward"]
    code, _, error = run(capsys, words(files, tmp_path / "out", *more, steps=60))
    assert code == 0, error
    found = json.loads(report.read_text())
    assert found["settings"]["lr"] == 1e-2 and found["metrics"]["eval_loss"] < found["history"][0]["loss"]
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    kept = {
        n: w for n, w in BertModel.from_pretrained(files / "bert").state_dict().items() if "_embeddings" in n
    }
    assert len(kept) == 3 and all(w.equal(trained[f"bert.{n}"]) for n, w in kept.items())


def test_the_rows_that_fish_sees_are_of_all_classes(capsys, files, tmp_path):
    """A file may be sorted by its labels: the first rows would have one label."""
    from id3_optim.cli import by_method, tasks
    from id3_optim.cli.settings import Settings
    from id3_optim.cli.start import load_start

    rows = sorted((files / "reviews.csv").read_text().splitlines()[1:], key=lambda row: row.split(",")[1])
    (tmp_path / "sorted.csv").write_text("\n".join(["text,label", *(rows * 60)]) + "\n")
    path = str(tmp_path / "sorted.csv")
    settings = Settings(str(files / "bert"), path, path, str(tmp_path), method="fish", cpu=True)
    task = tasks.read_task(path, path)
    examples = by_method.examples_of(settings, task, load_start(settings, task))
    assert len(examples) == methods.SAMPLES and all(e["input_ids"].shape[0] == 1 for e in examples)
    assert 400 < sum(int(e["labels"]) for e in examples) < 624


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "id4"], "--method: expected one of full, "),
        (
            ["--method", "fish", "--strategy", "repeat"],
            "--strategy: does not apply to --method: fish decides it",
        ),
        (["--method", "lora", "--delta-only"], "--delta-only: does not apply to --method lora"),
        (["--leave-out", "embeddings"], "--leave-out: expected --method with it, got none"),
        (
            ["--method", "id3", "--leave-out", "x"],
            "leave_out: expected parts of the model's parameter names, got 'x'",
        ),
    ],
)
def test_refusals(capsys, files, tmp_path, more, message):
    code, _, error = run(capsys, words(files, tmp_path / "out", *more))
    assert code and message in error and not (tmp_path / "out").exists()


def test_embeddings_keep_their_bits(capsys, files, tmp_path):
    trained(capsys, files, tmp_path, "--method", "id3", "--leave-out", "embeddings")
    before = AutoModelForSequenceClassification.from_pretrained(files / "bert").state_dict()
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    changed = {n for n, v in after.items() if not torch.equal(v, before[n])}
    assert changed and not any("embeddings" in n for n in changed)
