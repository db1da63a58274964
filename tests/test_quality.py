"""The grids of the evidence: their commands, their data, and the pages that are made from their results."""

import itertools
import json

import pytest
from glue_files import write_data
from tiny_models import save_bert, write_reviews

from benchmarks.quality import guide, parts, report, run, tasks
from benchmarks.quality.parts import PARTS
from benchmarks.quality.rows import chosen_by_loss
from benchmarks.render import README, block
from id3_optim.cli.compare.methods import read_method
from id3_optim.cli.main import parser
from id3_optim.cli.settings import Settings, check_settings

BUDGET = report.budgets_of("main")[0]
SCORES = {"id3": 0.60, "full": 0.65, "head": 0.40, "fish": 0.58}


def made(part, task, scores, budget=BUDGET, seeds=5):
    """A report as `compare --report` writes it, with scores that grow with the seed."""
    rows = [
        {
            "method": method,
            "budget": None if method in ("full", "head") else budget,
            "lr": 1e-3,
            "at_edge": method == "fish",
            "scores": {str(seed): score + 0.01 * seed for seed in range(seeds)},
            "diverged": 0,
            "mean": score + 0.01 * (seeds - 1) / 2,
            "sd": 0.0158,
        }
        for method, score in scores.items()
    ]
    return {"part": part, "task": task, "steps": 10, "tune_steps": 5, "rows": rows, "runs": []}


@pytest.fixture
def reports():
    made_ = [made("main", task, SCORES) for task in ("cola", "mrpc")]
    return {(one["part"], one["task"]): one for one in made_}


def test_the_pages_show_the_committed_results():
    reports = report.read(report.QUALITY_RESULTS)
    assert block(README, report.QUALITY) == report.readme_block(reports), (
        "python -m benchmarks quality --export"
    )
    assert report.EVIDENCE.read_text() == report.page(reports)
    assert block(guide.GUIDE, guide.MARKERS) == guide.guide_block(reports)


def test_without_results_the_pages_say_so(tmp_path):
    reports = report.read(tmp_path)
    assert report.readme_block(reports) == report.NOTHING
    page = report.page(reports)
    for name, part in PARTS.items():
        assert part.about in page
        assert len(list(report.empty(reports, name))) == len(part.methods) * len(part.tasks) * len(
            part.budgets
        )


def test_the_guide_has_the_methods_that_were_run_and_where_entries_lay(reports):
    found = {"roles": ["query", "embeddings"], "active": [[0, 1], [3, 0]]}
    reports["main", "cola"]["runs"] = [{"method": "id3", "tuning": False, "allocation": found}]
    text = guide.guide_block(reports)
    assert "| ID3, the paper's settings | 62.0 ± 1.6 (5 seeds) | 0.001 | 62.0" in text
    assert "On cola, 75 % of the entries" in text and "On mrpc it is not recorded" in text
    assert "LoRA" not in text and guide.guide_block({}) == guide.NOTHING


def test_the_table_has_every_score_and_names_empty_cells(reports):
    table = report.part_table(reports, "main", BUDGET)
    lines = {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}
    assert set(lines) == set(SCORES) and table.startswith("| method | cola | mrpc | mean |")
    assert "62.00 ± 1.58" in lines["id3"] and "60.00 ± 1.58*" in lines["fish"]
    assert "-2.00 | 0.002 | 0/10/0" in lines["fish"] and "+5.00 | 0.002 | 10/0/0" in lines["full"]
    missing = list(report.empty(reports, "main"))
    assert "id3 on cola at 0.17 %" not in missing and "id3 on sst2 at 0.17 %" in missing
    page = report.page(reports)
    assert "lora on cola at 0.17 %; " in page and "every method on sst2 at 0.17 %" in page
    assert "| ID3, the paper's settings | 62.0 ± 1.6 (5 seeds)" in report.readme_block(reports)


def test_rates_that_the_loss_has_chosen_are_named(reports):
    def tuned(method, steps, *scores):
        own = {"method": method, "budget": BUDGET, "steps": steps, "tuning": True}
        return [own | {"metrics": {"eval_matthews": score}} for score in scores]

    one = reports["main", "cola"] | {"metric": "matthews"}
    one["runs"] = [
        *tuned("id3", 2, 0.3, 0.1), *tuned("id3", 5, 0.0, 0.0),
        *tuned("fish", 2, 0.0, 0.0), *tuned("fish", 5, 0.0, 0.1),  # a round that drops rates
        *tuned("lora", 2, 0.0, 0.2), *tuned("lora", 5, 0.0, 0.1),
        *tuned("full", 5, 0.0),
        {"method": "id3", "budget": BUDGET, "steps": 5, "tuning": True},  # diverged
    ]  # fmt: skip
    assert chosen_by_loss(one) == ["id3", "fish"]
    reports["main", "cola"] = one
    text = "On cola the loss decided a round of tuning"
    assert text in guide.guide_block(reports) and text in report.readme_block(reports)
    assert "of id3, fish.\n" in report.page(reports)
    assert not list(guide.undecided({("main", "mrpc"): reports["main", "mrpc"]}))


def test_methods_that_were_tuned_by_shorter_runs_are_named(reports):
    reports["budgets", "cola"] = made("budgets", "cola", {parts.RECIPE: 0.6}, guide.budget("1%"))
    assert not list(guide.shorter(reports))
    reports["main", "cola"]["tune_steps"] = 8
    (text,) = guide.shorter(reports)
    assert text.startswith(
        "Tuned on cola by runs of 5 steps, where the main part's methods were tuned by 8: random"
    )
    assert "runs of 5 steps" in report.readme_block(reports) and "runs of 5 steps" in guide.guide_block(
        reports
    )


def test_a_cell_with_seeds_missing_is_named(reports):
    reports["main", "cola"] = made("main", "cola", SCORES, seeds=3)
    assert "id3 on cola at 0.17 %" in list(report.empty(reports, "main"))
    assert "(3 of 5)" in report.part_table(reports, "main", BUDGET)


def test_a_task_without_room_does_not_count(reports):
    assert report.with_room(reports, "main") == list(PARTS["main"].tasks)
    reports["main", "mrpc"] = made("main", "mrpc", SCORES | {"head": 0.62, "fish": 0.9})
    assert report.room(reports, "mrpc") == pytest.approx(0.03)
    assert "mrpc" not in report.with_room(reports, "main")
    versus = report.versus(reports, "main", "fish", BUDGET)
    assert (versus.wins, versus.losses) == (0, 5)
    assert "mrpc +3.0 points (does not count)" in report.page(reports)


def test_opposite_differences_are_not_called_equal(reports):
    reports["main", "cola"] = made("main", "cola", SCORES | {"fish": 0.8})
    line = next(x for x in report.part_table(reports, "main", BUDGET).splitlines() if x.startswith("| fish"))
    assert "(opposite)" in line
    reports["main", "mrpc"] = made("main", "mrpc", SCORES | {"fish": 0.7})
    line = next(x for x in report.part_table(reports, "main", BUDGET).splitlines() if x.startswith("| fish"))
    assert "(" not in line.split("|")[5]


def test_what_differs_by_less_than_two_standard_errors_is_equal(reports):
    close = made("main", "cola", SCORES)
    next(row for row in close["rows"] if row["method"] == "fish")["scores"] = {
        "0": 0.61,
        "1": 0.60,
        "2": 0.62,
    }
    reports = {("main", "cola"): close}
    line = next(x for x in report.part_table(reports, "main", BUDGET).splitlines() if x.startswith("| fish"))
    assert "(equal)" in line


def test_a_run_that_diverged_is_shown(reports):
    row = next(row for row in reports["main", "cola"]["rows"] if row["method"] == "fish")
    row |= {"scores": {}, "diverged": 5, "mean": None, "sd": None}
    assert "5 diverged" in report.part_table(reports, "main", BUDGET)
    assert "fish on cola at 0.17 %" not in list(report.empty(reports, "main"))


@pytest.mark.parametrize("name", PARTS)
def test_every_grid_is_a_command_that_parses(name, tmp_path):
    options = run._parse(["--model", "m", "--runs", str(tmp_path)])
    for task in PARTS[name].tasks:
        arguments = parser().parse_args(run.command(options, name, task, (tmp_path / "a", tmp_path / "b")))
        assert [method.name for method in arguments.methods] == list(PARTS[name].methods)
        assert {len(method.rates) for method in arguments.methods} == {7 if PARTS[name].tuned else 1}


def test_tuning_is_as_long_as_the_task_needs(tmp_path):
    def length(part, task, *more):
        options = run._parse(["--model", "m", "--runs", str(tmp_path), *more])
        words = run.command(options, part, task, (tmp_path / "a", tmp_path / "b"))
        return int(words[words.index("--tune-steps") + 1])

    assert length("main", "cola") == length("longer", "cola") == 1000  # they share these runs
    assert length("main", "sst2") == 500 and length("main", "cola", "--steps", "40") == 20


@pytest.mark.parametrize("name", PARTS)
def test_every_method_of_a_grid_has_settings_that_can_run(name, tmp_path):
    write_reviews(tmp_path / "rows.csv")
    path = str(tmp_path / "rows.csv")
    for method in PARTS[name].methods:
        changes = {**dict(read_method(method).changes), "budget": 0.0017}
        check_settings(Settings("model", path, path, str(tmp_path / "out"), **changes))


def test_an_untuned_method_has_a_default_inside_its_tuned_range():
    for method in parts.MAIN:
        (default,) = parser_rates(method, False)
        rates = parser_rates(method, True)
        assert rates[0] < default < rates[-1] and all(b <= 2.01 * a for a, b in itertools.pairwise(rates))


def parser_rates(method, tuned):
    from id3_optim.cli.compare.methods import read_method

    return read_method(parts.with_rates(method, PARTS["main" if tuned else "untuned"])).rates


def test_data_becomes_files_that_the_tool_reads(tmp_path):
    train, _ = tasks.prepare("cola", write_data(tmp_path / "data"), tmp_path / "out")
    rows = tasks.read_rows(train)
    assert len(rows) == 32 and rows[0] == {"sentence1": 'the "film 0 was good', "label": "1"}
    with pytest.raises(FileNotFoundError, match=r"--data: expected .*MRPC.* got none"):
        tasks.prepare("mrpc", tmp_path / "data", tmp_path / "out")
    own, _ = tasks.prepare("banking77", None, tmp_path / "out")
    assert len(tasks.read_rows(own)) == 10003


def test_a_grid_runs_goes_on_and_is_exported(tmp_path):
    save_bert(tmp_path / "bert")
    words = [
        "--model",
        tmp_path / "bert",
        "--data",
        write_data(tmp_path / "data"),
        "--runs",
        tmp_path / "runs",
    ]
    words += ["--output", tmp_path / "json", "--part", "untuned", "--task", "cola", "--method", "id3", "head"]
    words = [*map(str, words), "--steps", "4", "--cpu", "--no-pages"]
    assert run.main([*words, "--seeds", "1"]) == 0
    assert run.main([*words, "--seeds", "2"]) == 0
    (path,) = (tmp_path / "json").glob("*.json")
    made = json.loads(path.read_text())
    assert (made["part"], made["task"]) == ("untuned", "cola") and len(made["runs"]) == 4
    scores = {row["method"]: len(row["scores"]) for row in made["rows"]}
    assert scores == dict.fromkeys(PARTS["untuned"].methods, 0) | {"id3": 2, "head": 2}
    path.unlink()
    assert run.main([*words, "--export"]) == 0 and json.loads(path.read_text()) == made
    reports = report.read(path.parent)
    assert "id3 on cola at 0.17 %" in list(report.empty(reports, "untuned")), "two of five seeds"
    assert "fish on cola at 0.17 %" in list(report.empty(reports, "untuned")), "left out by --method"
