"""Every measured number in README and docs/benchmarks.md comes from the committed results."""

import json
from pathlib import Path

import pytest

from benchmarks.bars import bars_of
from benchmarks.pages import CPU_PAGES
from benchmarks.render import BENCH, RESULTS, TRAINING, block
from benchmarks.training_report import TRAINING_PAGES
from benchmarks.training_report import bars_of as training_bars_of

FILES = sorted(RESULTS.glob("cpu-*.json"))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_there_are_results():
    assert FILES and all(path.with_suffix(".png").is_file() for path in FILES)


def test_both_pages_show_the_same_results():
    shown = {page: block(page, BENCH) for page in (CPU_PAGES.readme, CPU_PAGES.page)}
    assert shown in [CPU_PAGES.sections(read(path), path.with_suffix(".png")) for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_bar_is_reported_with_its_number(path):
    results = read(path)
    bars = results["bars"]
    assert len(bars) > 25
    assert all(bar["value"] is not None and bar["met"] == (bar["value"] <= bar["limit"]) for bar in bars)
    assert bars == bars_of(results["rows"], results["memory"]), "python -m benchmarks report renews them"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_missed_bars_are_in_both_pages(path):
    results = read(path)
    missed = [bar["what"] for bar in results["bars"] if not bar["met"]]
    for section in CPU_PAGES.sections(results, path.with_suffix(".png")).values():
        text = " ".join(section.split())  # long lines are wrapped
        assert missed and all(what in text for what in missed)


def test_the_readme_has_one_table_and_the_page_the_rest():
    results = read(FILES[0])
    sections = CPU_PAGES.sections(results, FILES[0].with_suffix(".png"))
    tables = {page: section.count("| --- |") for page, section in sections.items()}
    layers = any(row["kind"] == "sampled" for row in results["rows"])  # older files have none
    assert tables == {CPU_PAGES.readme: 1, CPU_PAGES.page: 6 + layers}
    assert len(sections[CPU_PAGES.readme].splitlines()) < 24


TRAINING_FILES = sorted((RESULTS / "training").glob("cpu-*.json"))


def test_both_pages_show_the_same_training_results():
    shown = {page: block(page, TRAINING) for page in (TRAINING_PAGES.readme, TRAINING_PAGES.page)}
    expected = [TRAINING_PAGES.sections(read(path), path.with_suffix(".png")) for path in TRAINING_FILES]
    assert shown in expected and all(path.with_suffix(".png").is_file() for path in TRAINING_FILES)


@pytest.mark.parametrize("path", TRAINING_FILES, ids=lambda path: path.stem)
def test_every_training_bar_is_reported_with_its_number(path):
    results = read(path)
    assert len(results["bars"]) > 15 and all(bar["value"] is not None for bar in results["bars"])
    assert results["bars"] == training_bars_of(results)


def test_generated_prose_is_at_most_120_wide():
    for pages, files in ((CPU_PAGES, FILES), (TRAINING_PAGES, TRAINING_FILES)):
        for path in files:
            for section in pages.sections(read(path), path.with_suffix(".png")).values():
                prose = [line for line in section.splitlines() if not line.startswith(("|", "!["))]
                assert max(map(len, prose)) <= 120, max(prose, key=len)
