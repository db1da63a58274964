"""ID3AdamW beside the method's own toolkit: the comparison runs, counts what differs, and has its table."""

import json
from dataclasses import replace

import pytest
import torch
from glue_files import write_data
from tiny_models import save_bert

from benchmarks.quality import report, toolkit
from benchmarks.quality.toolkit_table import NOTHING, same_until, toolkit_table
from id3_optim.cli.start import load_start
from id3_optim.cli.tasks import task_of
from id3_optim.cli.train import build_optimizer

STEPS, PER_STEP = 6, 5


@pytest.fixture
def words(tmp_path):
    save_bert(tmp_path / "bert")
    folders = ["--model", tmp_path / "bert", "--data", write_data(tmp_path / "data")]
    folders += ["--runs", tmp_path / "runs", "--output", tmp_path / "json"]
    given = ["--task", "cola", "--steps", STEPS, "--per-step", PER_STEP, "--seeds", 1, "--no-pages"]
    return [*map(str, [*folders, *given])]


def test_both_choose_the_same_and_learn_the_same(words, tmp_path):
    toolkit.main(words)
    found = json.loads((tmp_path / "json" / "toolkit-cola.json").read_text())
    (run,) = found["runs"]
    assert run["choices"] == [{"differing": 0, "surplus": 0}] * STEPS
    assert run["shared"] == [1.0] * STEPS and run["id3"] == run["toolkit"]
    assert f"0 of {STEPS * PER_STEP}\nentries differ. id3-optim" in toolkit_table(found)
    assert toolkit_table(found) in report.page({("toolkit", "sst2"): found})


@pytest.mark.parametrize("name, changed", [("exp", 0.0), ("eps", 1e-3)])
def test_a_toolkit_that_scores_otherwise_is_seen(words, name, changed):
    settings = toolkit._settings(toolkit._parse(words))
    start = load_start(settings, task_of(settings))
    optimizer = build_optimizer(settings, start)
    optimizer.set_total_steps(STEPS)
    beside = toolkit.toolkit_optimizer(replace(settings, **{name: changed}), start)
    watched = toolkit.SameStep(optimizer, beside, PER_STEP)
    for p in start.model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer.step()
    assert watched.choices[0].differing > 0 and watched.choices[0].surplus == 0


def test_the_sets_are_the_same_until_a_thousandth_differs():
    assert same_until([1.0, 0.9995, 0.998, 1.0]) == 2
    assert same_until([1.0, 1.0]) == 2 and same_until([0.5]) == 0
    assert toolkit_table(None) == NOTHING
