"""From the raw JSON of a run to the results file, and from that to README's tables."""

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.bars import Bar, Results, measured_bars
from benchmarks.picture import METHODS
from benchmarks.shapes import MODELS

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_READS = {"read_both": "bare read of θ and g", "read_grad": "bare read of g"}


def collect(pytest_json: Path, machine: dict, memory: list[dict]) -> dict:
    """The results file: machine, rows with medians and ratios, memory, bars."""
    raw = json.loads(pytest_json.read_text())
    rows = [benchmark["extra_info"] for benchmark in raw["benchmarks"]]
    for row in rows:
        _add_ratios(row)
    bars = [asdict(bar) | {"met": _met(bar)} for bar in measured_bars(Results(rows, memory))]
    return {"machine": machine, "rows": rows, "memory": memory, "bars": bars}


def _add_ratios(row: dict) -> None:
    """Every method over the first and over the bare read; the reads' bytes per second."""
    subject = next(iter(row["methods"]))
    medians = {name: method["median_ms"] for name, method in row["methods"].items()}
    for name, method in row["methods"].items():
        method["over_subject"] = round(medians[name] / medians[subject], 4)
        if "read_both" in medians:
            method["over_read"] = round(medians[name] / medians["read_both"], 4)
        if name in _READS:
            entry_bytes = (4 if row["case"]["dtype"] == "float32" else 2) * (2 if name == "read_both" else 1)
            method["gb_per_s"] = round(row["n"] * entry_bytes / medians[name] / 1e6, 1)


def _met(bar: Bar) -> bool | None:
    return None if bar.value is None else bar.value <= bar.limit


def _table(header: list[str], rows: list[list[str]]) -> str:
    align = ["---"] + ["---:"] * (len(header) - 1)
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in [header, align, *rows]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in escaped)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def _bytes(value: int) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def _step_table(results: Results) -> str:
    """Rows: methods; per model the median, its multiple of the bare read, state and peak memory."""
    rows = {model: results.row("step", model) for model in MODELS}
    rows = {model: row for model, row in rows.items() if row is not None}
    header = ["one step"]
    for model, row in rows.items():
        header += [f"{model} ({row['n'] / 1e6:.1f}M), ms", "× read", "state", "peak"]
    lines = []
    for name, label in (METHODS | _READS).items():
        line = [label.replace("\n", " ")]
        for model, row in rows.items():
            if name not in row["methods"]:
                line += ["–"] * 4
                continue
            method = row["methods"][name]
            held = next((m for m in results.memory if (m["model"], m["method"]) == (model, name)), None)
            line += [f"{method['median_ms']:.1f}", f"{method['over_read']:.3g}"]
            line += [_bytes(held["state_bytes"]), _bytes(held["peak_bytes"])] if held else ["–", "–"]
        lines.append(line)
    return _table(header, lines)


def _sweep_table(results: Results) -> str:
    """Every other whole-step case: our median, and its multiples of what it is compared with."""
    names = {"read_both": "bare read", "adamw": "AdamW(fused=True)", "dense": "dense masking"}
    header = ["model", "dtype", "budget", "exp", "active", "k", "ms"]
    header += [f"× {label}" for label in names.values()]
    lines = []
    for row in results.rows:
        if row["kind"] != "step":
            continue
        case, methods = row["case"], row["methods"]
        ours = methods["id3"]["median_ms"]
        line = [case["model"], case["dtype"], f"{case['budget']:.2%}", f"{case['exp']:g}"]
        line += [f"{row['n_active']:,}", str(row["k"]), f"{ours:.2f}"]
        lines.append(line + [_number(ours / methods[name]["median_ms"]) for name in names])
    return _table(header, lines)


def _bars_table(bars: list[dict]) -> str:
    verdict = {True: "met", False: "**missed**", None: "not run"}
    lines = []
    for bar in bars:
        measured, at_full = _number(bar["value"]), _number(bar["at_full"])
        lines.append([bar["what"], f"≤ {bar['limit']:.3g}", measured, verdict[bar["met"]], at_full])
    return _table(["ratio (|Λ| = B/2)", "bar", "measured", "", "at |Λ| = B"], lines)


def _bandwidth(results: Results) -> str:
    rows = filter(None, (results.row("step", model) for model in MODELS))
    return " and ".join(f"{row['methods']['read_both']['gb_per_s']:.0f}" for row in rows)


def markdown(results_file: dict, picture: str) -> str:
    """README's section between the markers."""
    machine = results_file["machine"]
    results = Results(results_file["rows"], results_file["memory"])
    build = ", ".join(f"{key} {value}" for key, value in machine["build"].items())
    note = f"\n{machine['note']}" if "note" in machine else ""
    rounds = {name: m["rounds"] for row in results.rows for name, m in row["methods"].items()}
    return f"""![Step times as multiples of one read of the weights and gradients]({picture})

{machine["cpu"]}, {machine["cores"]} cores, {machine["threads"]} threads, {machine["memory_gib"]} GiB; torch \
{machine["torch"]} ({machine["simd"]}); {build}; commit {machine["commit"]}, {machine["date"]}.
Medians of interleaved rounds in one process ({rounds.get("id3", 0)} of ours, {rounds.get("toolkit", 0)} of \
the toolkit and of plain masking on the largest model); every method first passes a correctness gate.
The bare read runs at {_bandwidth(results)} GB/s.
float32, budget 0.17 %, k = B/3000, half the budget active, exp 1, unless a table says otherwise.{note}

{_step_table(results)}

{_bars_table(results_file["bars"])}

<details><summary>Other budgets, exponents, dtypes and active sets</summary>

{_sweep_table(results)}

</details>"""


def update_readme(readme: Path, section: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Replace what stands between the markers; ValueError if they are not there."""
    text, (begin, end) = readme.read_text(), markers
    if begin not in text or end not in text:
        raise ValueError(f"{readme}: expected the markers {begin} and {end}")
    head, rest = text.split(begin, 1)
    tail = rest.split(end, 1)[1]
    readme.write_text(f"{head}{begin}\n{section}\n{end}{tail}")
