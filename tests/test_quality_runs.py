"""Grids of the evidence that run: the causal model, times, exports, and another machine that goes on."""

import json
from dataclasses import replace

import pytest
from glue_files import write_data
from tiny_models import save_bert

from benchmarks.quality import causal_table, guide, report, run, tasks
from benchmarks.quality.base import corpus, make_base
from benchmarks.quality.parts import PARTS
from benchmarks.quality.tasks import TASKS


def test_a_causal_model_is_made_tuned_and_measured_on_what_it_knew(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "KEPT_ROWS", 20)
    texts = [f"The function number {i} returns the sum of {i} and its argument." for i in range(400)]
    about = json.loads((make_base(tmp_path / "runs" / "base", 2, texts) / "base.json").read_text())
    assert about["texts"] == 400
    words = ["--data", write_data(tmp_path / "data"), "--runs", tmp_path / "runs", "--output", tmp_path]
    words += ["--model", "unused", "--part", "causal", "--method", "id3", "--seeds", "2", "--steps", "2"]
    assert run.main([*map(str, words), "--cpu", "--no-pages"]) == 0
    made = json.loads((tmp_path / "causal-gsm8k.json").read_text())
    row = next(row for row in made["rows"] if row["method"] == "id3")
    lost = causal_table.forgotten(made, row)
    assert len(row["scores"]) == len(lost) == 2 and all(abs(loss) < 1 for loss in lost)
    before = {run["metrics"]["before_token_loss"] for run in made["runs"] if not run["tuning"]}
    page = report.page({("causal", "gsm8k"): made})
    assert len(before) == 1, "of the base, whatever trains it"
    assert "| id3 |" in page and f"{before.pop():.3f}. The base has {about['entries']:,}" in page
    assert f"ID3 {row['mean']:.2f}, {row['forgotten']:+.2f}, at " in guide.causal(made, "gsm8k")
    assert "every method on gsm8k at 1 %" in page, "two of three seeds, and no run"


def test_times_are_of_one_run_at_a_time_and_stay_with_their_machine(tmp_path):
    save_bert(tmp_path / "bert")
    (tmp_path / "data" / "MRPC").mkdir(parents=True)
    rows = [f"the film {i}\ta book was {word}\t{i % 2}" for i in range(20) for word in ("good", "bad")]
    for name in ("train.tsv", "dev.tsv"):
        text = "\n".join(["sentence1\tsentence2\tlabel", *rows, ""])
        (tmp_path / "data" / "MRPC" / name).write_text(text)
    words = ["--model", tmp_path / "bert", "--data", tmp_path / "data", "--runs", tmp_path / "runs"]
    words += ["--part", "time", "--method", "full", "id3", "--steps", 3, "--jobs", 2, "--cpu", "--no-pages"]
    words = [*map(str, words), "--output", str(tmp_path)]
    assert run.main(words) == 0
    made = json.loads((tmp_path / "time-mrpc.json").read_text())
    page = report.page({("time", "mrpc"): made})
    assert "| full |" in page and "| 1.00 |" in page and made["machine"]["cpu"] in page
    options = run._parse([*words, "--runs", str(tmp_path / "elsewhere")])
    command = run.command(options, "time", "mrpc", (tmp_path / "a", tmp_path / "b"))
    assert command[command.index("--jobs") + 1] == "1"
    run.restore(options, "time", "mrpc")
    assert not options.runs.exists(), "another machine has times of its own"


def test_an_export_has_each_part_s_own_lengths_whatever_ran_last(tmp_path):
    save_bert(tmp_path / "bert")
    words = ["--model", tmp_path / "bert", "--data", write_data(tmp_path / "data"), "--output", tmp_path]
    words = [*map(str, words), "--runs", str(tmp_path / "runs"), "--cpu", "--no-pages", "--task", "cola"]
    tuned = ("full", "id3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "cola", replace(TASKS["cola"], steps=4, tune=2))
        patch.setitem(PARTS, "longer", replace(PARTS["longer"], steps=6, seeds=1, methods=tuned))
        patch.setitem(PARTS, "main", replace(PARTS["main"], seeds=1, methods=tuned))
        for part in ("main", "longer"):
            assert run.main([*words, "--part", part]) == 0
        made = {part: (tmp_path / f"{part}-cola.json").read_text() for part in ("main", "longer")}
        assert run.main([*words, "--part", "main", "longer", "--export"]) == 0
    assert {part: (tmp_path / f"{part}-cola.json").read_text() for part in made} == made
    assert [json.loads(made[part])["steps"] for part in made] == [4, 6]


def test_the_documentation_of_python_is_a_corpus():
    texts = corpus()
    assert len(texts) > 1000 and sum(map(len, texts)) > 1_000_000 and texts == corpus()


def test_another_machine_goes_on_from_the_json(tmp_path, monkeypatch):
    save_bert(tmp_path / "bert")
    words = ["--model", tmp_path / "bert", "--data", write_data(tmp_path / "data"), "--output", tmp_path]
    words += ["--part", "untuned", "--task", "cola", "--method", "id3", "--seeds", "1", "--steps", "4"]
    words = [*map(str, words), "--cpu", "--no-pages"]
    assert run.main([*words, "--runs", str(tmp_path / "one")]) == 0
    path = tmp_path / "untuned-cola.json"
    made = path.read_text()
    monkeypatch.setattr("id3_optim.cli.compare.workers.run_trial", lambda *_: pytest.fail("has been run"))
    assert run.main([*words, "--runs", str(tmp_path / "two")]) == 0
    assert path.read_text() == made
