"""Every measured number in the README comes from the committed results."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks/results").glob("cpu-*.json"))


def test_there_are_results():
    assert RESULTS and all(path.with_suffix(".png").is_file() for path in RESULTS)


def test_the_readme_shows_them():
    pytest.importorskip("matplotlib")
    from benchmarks.report import BEGIN, END, markdown

    shown = (ROOT / "README.md").read_text().split(BEGIN)[1].split(END)[0].strip()
    sections = [
        markdown(json.loads(path.read_text()), str(path.with_suffix(".png").relative_to(ROOT)))
        for path in RESULTS
    ]
    assert shown in sections


def test_every_bar_is_reported_with_its_number():
    for path in RESULTS:
        bars = json.loads(path.read_text())["bars"]
        assert len(bars) > 15
        assert all(bar["value"] is not None and bar["met"] == (bar["value"] <= bar["limit"]) for bar in bars)
