"""`python -m benchmarks`: run every case, then write the results file, its picture and the pages' blocks."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.bars import bars_of
from benchmarks.machine import describe, results_path
from benchmarks.memory import measure_memory, supported
from benchmarks.pages import READS, medians_table
from benchmarks.render import RESULTS, ROOT, bars_table, missed
from benchmarks.report import publish
from benchmarks.shapes import MODELS

HERE = Path(__file__).parent
# Kinds of cases, each a file of pytest cases.
KINDS = ("step", "parts", "growth", "windows", "deltas")


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}".strip())
    parser.add_argument("--quick", action="store_true", help="the small model, one case of each kind")
    parser.add_argument("--threads", type=int, default=2, help="threads for every method (default: 2)")
    parser.add_argument("--rounds", type=int, help="rounds per case (default: 15, or 3 with --quick)")
    return parser


def _run_cases(options: argparse.Namespace, kind: str, raw: Path) -> None:
    command = [sys.executable, "-m", "pytest", str(HERE / f"test_{kind}.py"), "-v", "--benchmark-only"]
    command += [
        "--benchmark-disable-gc",
        "--benchmark-columns=min,median,iqr,rounds",
        f"--benchmark-json={raw}",
    ]
    command += [f"--threads={options.threads}", "-p", "no:cacheprovider"]
    command += ["--quick"] if options.quick else []
    command += [f"--rounds={options.rounds}"] if options.rounds else []
    subprocess.run(command, cwd=ROOT, check=True)


def _rows_of(kind: str, options: argparse.Namespace) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "pytest.json"
        _run_cases(options, kind, raw)
        rows = [benchmark["extra_info"] for benchmark in json.loads(raw.read_text())["benchmarks"]]
    for row in rows:
        _add_ratios(row)
    return rows


def _results(options: argparse.Namespace, rows: list[dict], memory: list[dict]) -> dict:
    bars = bars_of(rows, memory)
    return {"machine": describe(options.threads), "rows": rows, "memory": memory, "bars": bars}


def _add_ratios(row: dict) -> None:
    """Every method over the first and over the bare read; the reads' bytes per second."""
    subject = next(iter(row["methods"]))
    medians = {name: method["median_ms"] for name, method in row["methods"].items()}
    for name, method in row["methods"].items():
        method["over_subject"] = round(medians[name] / medians[subject], 4)
        if "read_both" in medians:
            method["over_read"] = round(medians[name] / medians["read_both"], 4)
        if name in READS:
            entry_bytes = (4 if row["case"]["dtype"] == "float32" else 2) * (2 if name == "read_both" else 1)
            method["gb_per_s"] = round(row["n"] * entry_bytes / medians[name] / 1e6, 1)


def run_kind(kind: str, arguments: list[str]) -> None:
    """Measure one kind of cases, print the medians and the bars that they decide."""
    parser = _parser(kind)
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="also write a results file there")
    options = parser.parse_args(arguments)
    results = _results(options, _rows_of(kind, options), [])
    print(medians_table(results["rows"]))
    if options.output is not None:
        path = results_path(options.output, results["machine"], "-quick" * options.quick)
        path.write_text(json.dumps(results, indent=1) + "\n")
    bars = [bar for bar in results["bars"] if bar["value"] is not None]
    if bars:
        print(bars_table(bars), missed(bars), sep="\n\n")


def run_all(arguments: list[str]) -> None:
    parser = _parser("")
    parser.description = __doc__
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--update-pages", action="store_true", help="put the tables into the two pages")
    options = parser.parse_args(arguments)
    path = results_path(options.output, describe(options.threads), "-quick" * options.quick)
    rows, memory = [], []
    for kind in KINDS:
        rows += _rows_of(kind, options)
        path.write_text(json.dumps(_results(options, rows, memory), indent=1) + "\n")  # if it is cut off
    if supported():
        memory = measure_memory(["MiniLM-L6"] if options.quick else list(MODELS), options.threads)
    publish(_results(options, rows, memory), path, options.update_pages)
