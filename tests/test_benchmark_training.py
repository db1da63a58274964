"""`python -m benchmarks training --resume` goes on from its own results, and from no others."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("psutil")

from benchmarks import training
from benchmarks.machine import describe, results_path
from benchmarks.methods import methods_of


@pytest.fixture
def measured(monkeypatch):
    """The (case, method) pairs that were measured, of which none is here."""
    asked = []

    def fresh(options, case, method):
        asked.append((case, method))
        return dict(zip(("model", "dtype", "tokens", "method"), [*case, method], strict=True))

    monkeypatch.setattr(training, "_fresh", fresh)
    monkeypatch.setattr(training, "pooled", lambda rows: rows[0])
    monkeypatch.setattr(training, "bars_of", lambda results: [])
    return asked


def test_times_are_the_medians_over_processes():
    rows = [{"model": "MiniLM", "rounds": 3, "ms": {"full": ms, "sparse": 1.0}} for ms in (9.0, 1.0, 2.0)]
    got = training.pooled(rows)
    assert got == {"model": "MiniLM", "rounds": 3, "processes": 3, "ms": {"full": 2.0, "sparse": 1.0}}


def options(folder, *more):
    return training._parse(["--model", "MiniLM", "--processes=1", "--output", str(folder), *more])


def test_a_run_that_was_cut_off_goes_on(tmp_path, measured):
    training.measure(options(tmp_path, "--tokens=512"))
    path = training.measure(options(tmp_path, "--resume"))
    results, methods = json.loads(path.read_text()), methods_of("MiniLM")
    each = [(("MiniLM", "float32", tokens), m) for tokens in (512, 2048) for m in (None, *methods)]
    assert measured == each  # none of them twice
    assert [row["tokens"] for row in results["times"]] == [512, 2048]
    assert len(results["memory"]) == 2 * len(methods)


def test_without_it_everything_is_measured_anew(tmp_path, measured):
    for _ in range(2):
        path = training.measure(options(tmp_path, "--tokens=512"))
    assert len(measured) == 2 * (1 + len(methods_of("MiniLM")))
    assert len(json.loads(path.read_text())["times"]) == 1


def test_results_of_another_torch_are_refused(tmp_path, measured):
    saved = describe(2)
    path = results_path(tmp_path, saved)
    path.write_text(json.dumps({"machine": saved | {"torch": "1.0"}, "times": [], "memory": []}))
    with pytest.raises(SystemExit, match=r"--resume: expected results of torch .*, got 1\.0 in"):
        training.measure(options(tmp_path, "--resume"))
    assert measured == []
