"""`make gpu-check`: its bars, its report, and that no part stops another. Every number is made up."""

import json
import subprocess
import sys

import pytest

from benchmarks.gpu import check, pages
from benchmarks.gpu.bars import ADAMW, bars_of, with_ratios
from benchmarks.gpu.cases import Case
from benchmarks.gpu.device import BACKENDS
from benchmarks.gpu.processes import stream, together
from benchmarks.gpu.rows import selections
from benchmarks.gpu.tables import summary_table
from benchmarks.render import GPU, PAGE, README, RESULTS, ROOT, Pages, block

DENSE = "dense masking done well"
COPY = 4e9  # bytes per millisecond
# Made-up multiples of the floor. Every bar is met by them, some narrowly.
SPEED = {
    ("cuda", "step"): 1.15, ("cuda", "graph"): 1.05, ("cuda", "select"): 1.1,
    ("triton", "step"): 1.19, ("triton", "graph"): 1.1, ("triton", "select"): 1.12,
    (ADAMW, "step"): 3.6, ("dense masking", "step"): 9.0, ("toolkit", "step"): 60.0,
}  # fmt: skip
MODELS = {
    "184M float32": (184_000_000, "float32", 4), "184M bfloat16": (184_000_000, "bfloat16", 2),
    "1.3B bfloat16": (1_340_000_000, "bfloat16", 2), "6.7B bfloat16": (6_700_000_000, "bfloat16", 2),
}  # fmt: skip


def _row(method: str, measure: str, model: str, share: float = 0.001, **more) -> dict:
    n, dtype, size = MODELS.get(model, (10_000_000, "float32", 4))
    ms = SPEED.get((method, measure), 1.0) * 2 * n * size / COPY
    times = {"p20_ms": 0.98 * ms, "median_ms": ms, "p80_ms": 1.03 * ms, "rounds": 30}
    about = {"method": method, "measure": measure, "model": model, "share": share, "active": 0.5}
    sizes = {"n": n, "dtype": dtype, "floor_bytes": 2 * n * size, "bytes": 2 * n * size}
    return about | sizes | {"state_bytes": n // 40, "peak_bytes": n // 64} | times | more


@pytest.fixture
def rows():
    found = [{"measure": "copy", "bytes": 8e9, "median_ms": 8e9 / COPY, "p20_ms": 2.0, "p80_ms": 2.0}]
    found += [_row(method, measure, model) for method, measure in SPEED for model in MODELS]
    for method in ("cuda", "triton", "dense masking"):
        found.append(_row(method, "step", "1.3B bfloat16", 0.01))
    for backend in ("cuda", "triton"):
        found.append(_row(backend, "host", "300 tensors", median_ms=0.15))
        found.append(_row(backend, "hook", "300 tensors", hook_us=20.0))
        for parts, ratio in (("update", 0.5), ("update and join", 0.6)):
            found.append(_row(backend, f"growth, {parts}", "1.3B bfloat16", 0.01, ratio=ratio))
    return found


@pytest.fixture
def raw(rows):
    machine = {
        "gpu": "NVIDIA H200", "is_gpu": True, "driver": "1", "cuda": "13.0", "torch": "2.11.0",
        "triton": "3.6.0", "python": "3.12", "commit": "abc1234", "date": "2000-01-01",
    }  # fmt: skip
    trained = {"tokens_per_s": 21_000.0, "peak_bytes": 31e9, "optimizer_share": 0.04, "step_ms": 97.0}
    e2e = [{"method": "full"} | trained, {"method": "id3", "skipped": "out of memory"}]
    ran = {"cuda": {"ok": True, "seconds": 9.0, "last_line": "100 passed", "tail": "much"}}
    bench = {"rows": rows, "failed": {}, "not_run": []}
    return {"machine": machine, "quick": False, "tests": ran, "bench": bench, "e2e": {"rows": e2e}}


# --- bars ---------------------------------------------------------------------------------------------


def test_every_bar_finds_its_number(rows):
    bars = bars_of(rows)
    assert len(bars) > 30
    assert [bar["what"] for bar in bars if not bar["met"]] == []


@pytest.mark.parametrize(
    "measure, method, model, share, slower, missed",
    [
        ("select", "cuda", "1.3B bfloat16", 0.001, 1.1, "selection / copy rate, 1.3B bfloat16"),
        ("graph", "cuda", "184M float32", 0.001, 1.3, "step in a CUDA graph / floor, 184M float32"),
        ("step", "cuda", "1.3B bfloat16", 0.01, 2.0, f"{DENSE} / step, B = 1.0%, 1.3B bfloat16"),
        ("host", "cuda", "300 tensors", 0.001, 2.0, "host ms of a step, 300 tensors"),
    ],
)  # fmt: skip
def test_what_is_too_slow_misses_its_bar_alone(rows, measure, method, model, share, slower, missed):
    wanted = {"measure": measure, "method": method, "model": model, "share": share}
    (row,) = [row for row in rows if wanted.items() <= row.items()]
    row["median_ms"] *= slower
    assert [bar["what"] for bar in bars_of(rows) if not bar["met"]] == [f"cuda: {missed}"]


def test_what_was_not_measured_is_not_run():
    assert {bar["met"] for bar in bars_of([])} == {None}


def test_ratios(rows):
    row = next(row for row in with_ratios(rows) if row["measure"] == "step" and row["method"] == "cuda")
    assert row["gb_per_s"] == pytest.approx(4000 / 1.15, rel=1e-3)
    assert row["over_floor"] == pytest.approx(1.15) and row["over_copy"] == pytest.approx(1 / 1.15, rel=1e-3)


# --- the report ---------------------------------------------------------------------------------------


@pytest.fixture
def report():
    pytest.importorskip("matplotlib")
    from benchmarks.gpu import report

    return report


@pytest.fixture
def empty_pages(tmp_path):
    """A README and a page with nothing but old blocks."""
    (tmp_path / "docs").mkdir()
    made = Pages(GPU, pages.readme_block, pages.page_block, tmp_path / "README.md", tmp_path / "docs/page.md")
    for page in (made.readme, made.page):
        page.write_text("before\n" + "\nold\n".join(GPU) + "\nafter\n")
    return made


def test_a_result_goes_into_both_pages(raw, tmp_path, report, empty_pages):
    path = report.publish(raw, tmp_path / "results", empty_pages, commit="fedcba9")
    assert path.name == "gpu-nvidia-h200.json" and path.with_suffix(".png").stat().st_size > 10_000
    for page in (empty_pages.readme, empty_pages.page):
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert " ".join(block(empty_pages.readme, GPU).split()) == (
        "NVIDIA H200, commit fedcba9: a step of 1.3B bfloat16 takes 1.15 × the read of θ and g at the copy's "
        "rate, AdamW(fused=True) 3.13 times as long as the step. 35 of 35 bars are met."
    )
    shown = block(empty_pages.page, GPU)
    assert "(gpu-nvidia-h200.png)" in shown and "commit fedcba9" in shown
    assert "| 1.3B bfloat16, B = 0.1% | ID3AdamW, cuda | 1.541 (1.510 – 1.587) | 1.15 | 3478 |" in shown
    assert "| cuda: step / floor, 1.3B bfloat16 | ≤ 1.2 | 1.15 | met |" in shown
    assert "| full | 21,000 | 31.00 GB | 4.0% |" in shown
    kept = json.loads(path.read_text())
    assert kept["machine"]["commit"] == "fedcba9" and "tail" not in kept["tests"]["cuda"]
    assert pages.page_block(kept, "gpu-nvidia-h200.png") == shown


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda raw: raw["machine"].update(is_gpu=False), "expected a run on a GPU, got one on"),
        (lambda raw: raw.update(quick=True), "got --quick"),
        (lambda raw: raw["bench"].update(rows=[]), "got none"),
    ],
)  # fmt: skip
def test_what_is_no_gpu_result_is_refused(raw, tmp_path, report, change, why):
    change(raw)
    with pytest.raises(ValueError, match=why):
        report.publish(raw, tmp_path, None)
    assert list(tmp_path.iterdir()) == []


def test_both_pages_show_what_is_committed():
    shown = {page: block(page, GPU) for page in (README, PAGE)}
    files = sorted(RESULTS.glob("gpu-*.json"))
    sections = [
        pages.GPU_PAGES.sections(json.loads(path.read_text()), path.with_suffix(".png")) for path in files
    ]
    assert shown in (sections or [dict.fromkeys(shown, pages.NOTHING_YET)])


def test_a_missed_bar_is_in_both_pages(raw):
    row = next(row for row in raw["bench"]["rows"] if row.get("measure") == "host")
    row["median_ms"] *= 2
    results = pages.evidence(raw)
    for section in pages.GPU_PAGES.sections(results, RESULTS / "x.png").values():
        assert "Missed: cuda: host ms of a step, 300 tensors (0.3 vs ≤ 0.2)." in " ".join(section.split())


def test_the_table_at_the_end(raw):
    shown = summary_table(raw | {"bars": bars_of(raw["bench"]["rows"])})
    assert "tests cuda: ok, 9.0 s: 100 passed" in shown
    assert "id3                skipped: out of memory" in shown
    assert "cuda: step / floor, 1.3B bfloat16" in shown and "missed" not in shown


# --- parts --------------------------------------------------------------------------------------------


def test_rows_of_a_process_that_hangs_are_kept():
    script = "import time; print('{\"a\": 1}', flush=True); print('words', flush=True); time.sleep(60)"
    rows = []
    tail = stream([sys.executable, "-c", script], 3, rows.append)
    assert rows == [{"a": 1}] and tail.startswith("words\n(cut off after")


def test_commands_that_fail_hang_or_are_missing():
    commands = {
        "succeeds": [sys.executable, "-c", "print('all well')"],
        "fails": [sys.executable, "-c", "raise SystemExit('no good')"],
        "hangs": [sys.executable, "-c", "import time; time.sleep(60)"],
        "missing": ["id3-no-such-tool"],
    }
    found = together(commands, 3)
    assert {name: one["ok"] for name, one in found.items()} == {
        "succeeds": True, "fails": False, "hangs": False, "missing": None,
    }  # fmt: skip
    assert found["succeeds"]["last_line"] == "all well" and found["fails"]["last_line"] == "no good"
    assert found["hangs"]["timed_out"] and not found["fails"]["timed_out"]
    assert "id3-no-such-tool" in found["missing"]["skipped"]


def test_a_part_runs_here_and_its_results_are_no_gpu_s(tmp_path):
    output = tmp_path / "gpu-check.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--part", "sanitize", "build"]
    done = subprocess.run([*command, f"--output={output}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["sanitize"]["plain"]["last_line"] == "done", results["sanitize"]
    assert results["quick"] and {bar["met"] for bar in results["bars"]} == {None}
    refused = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.report", str(output), "--update-pages"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert refused.returncode == 2 and "expected a run on a GPU" in refused.stderr


def test_jobs_of_the_benchmark_run_here():
    """And one that fails says so; on a GPU its process ends there."""
    id3 = f"id3 {BACKENDS[0]} tiny float32 5.0%"
    jobs = ["bandwidth", id3, "adamw tiny float32 5.0%", "no such job"]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.bench", "--quick", *jobs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    ended = {row["job"]: row.get("skipped") for row in found if row.get("done")}
    assert ended == dict.fromkeys(jobs) | {"no such job": "KeyError: 'no such job'"}
    measured = {(row["job"].split()[0], row["measure"]) for row in found if "median_ms" in row}
    assert measured >= {("bandwidth", "copy"), ("bandwidth", "read"), ("adamw", "step")}
    assert measured >= {("id3", measure) for measure in ("select", "step", "host", "update")}


def test_a_run_begins_with_what_is_most_worth_knowing():
    assert list(check.PARTS)[:2] == ["build", "first"]


def test_selections_are_measured_on_both_sides_of_each_border():
    found = {row["measure"]: row for row in selections("cpu", Case("tiny bfloat16", 0.05), 1)}
    n = Case("tiny bfloat16").counts()[0]
    for border in (16384, 1024):
        below, above = (found[f"select, k {side} N/{border}"]["k"] for side in ("below", "above"))
        assert below <= n / border < above
    assert found["select, 97 % zero rows"]["median_ms"] > 0
