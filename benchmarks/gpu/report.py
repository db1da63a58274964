"""`python -m benchmarks.gpu.report runs/gpu-check.json`: results file, picture and README's GPU section.

Refuses what was not measured on a GPU, or with toy models.
"""

import argparse
import json
import re
from pathlib import Path

from benchmarks.gpu.bars import BACKENDS, measured_bars, with_ratios
from benchmarks.report import _bytes, _number, _table, update_readme

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKERS = "<!-- gpu:begin -->", "<!-- gpu:end -->"
NOTHING_YET = "No GPU has run these kernels yet, so no GPU number is shown."
LABELS = {backend: f"ID3AdamW, {backend}" for backend in BACKENDS}
_HELD = "state_bytes", "peak_bytes"
_TRAINING = "one training step, Llama-3.2-3B, bf16, 4 × 512 tokens"
_VERDICT = {True: "met", False: "**missed**", None: "not run"}


def check(results: dict) -> None:
    """Raises ValueError for results that say nothing about a GPU."""
    machine = results.get("machine", {})
    if not machine.get("is_gpu"):
        raise ValueError(f"results: expected a run on a GPU, got one on {machine.get('gpu', 'unknown')!r}")
    if results.get("quick"):
        raise ValueError("results: expected a full run, got --quick, whose models are toys")
    if not any("median_ms" in row for row in results.get("bench", {}).get("rows", [])):
        raise ValueError("results: expected measured rows, got none: run the part `bench`")


def evidence(raw: dict, commit: str | None = None) -> dict:
    """The results file: what `benchmarks.gpu` wrote without the processes' output, ratios and bars anew."""
    check(raw)
    rows = with_ratios(raw["bench"]["rows"])
    short = {
        part: _without_output(raw[part]) for part in ("build", "tests", "sanitize", "e2e") if part in raw
    }
    machine = raw["machine"] | ({"commit": commit} if commit else {})
    bench = raw["bench"] | {"rows": rows}
    return {"machine": machine, "bars": measured_bars(rows), "bench": bench, **short}


def _without_output(found):
    if isinstance(found, dict):
        return {name: _without_output(value) for name, value in found.items() if name != "tail"}
    return [_without_output(value) for value in found] if isinstance(found, list) else found


def slug(machine: dict) -> str:
    """`gpu-nvidia-h200`: the name of the machine's results."""
    return "-".join(re.findall(r"[a-z0-9]+", f"gpu {machine['gpu']}".lower()))


def steps(results: dict) -> list[dict]:
    """The rows of whole steps."""
    rows = results["bench"]["rows"]
    return [row for row in rows if row.get("measure") in ("step", "graph") and "median_ms" in row]


def label(row: dict) -> str:
    graph = ", CUDA graph" if row["measure"] == "graph" else ""
    return LABELS.get(row["method"], row["method"]) + graph


def _steps_table(results: dict) -> str:
    header = ["one step", "method", "ms (p20 – p80)", "× floor", "GB/s", "state", "peak"]
    lines = []
    for row in sorted(steps(results), key=lambda row: (row["n"], row["dtype"], row["share"], row["active"])):
        full = ", |Λ| = B" if row["active"] == 1.0 else ""
        held = [
            _bytes(row[name]) if row.get(name) is not None else "–" for name in ("state_bytes", "peak_bytes")
        ]
        lines.append(
            [
                f"{row['model']}, B = {row['share']:.1%}{full}",
                label(row),
                f"{row['median_ms']:.3f} ({row['p20_ms']:.3f} – {row['p80_ms']:.3f})",
                _number(row["over_floor"]) if "over_floor" in row else "–",
                f"{row['gb_per_s']:.0f}" if "gb_per_s" in row else "–",
                *held,
            ]
        )
    return _table(header, lines)


def _bars_table(bars: list[dict]) -> str:
    lines = [
        [bar["what"], f"{bar['sense']} {bar['limit']:g}", _number(bar["value"]), _VERDICT[bar["met"]]]
        for bar in bars
    ]
    return _table(["ratio", "bar", "measured", ""], lines)


def _training_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        if "skipped" in row:
            lines.append([row["method"], "–", "–", "–"])
            continue
        numbers = f"{row['tokens_per_s']:,.0f}", _bytes(row["peak_bytes"]), f"{row['optimizer_share']:.1%}"
        lines.append([row["method"], *numbers])
    return _table(
        ["one training step, Llama-3.2-3B, bf16, 4 × 512 tokens", "tokens/s", "peak", "in step()"], lines
    )


def _rates(results: dict) -> str:
    named = {
        row["measure"]: row for row in results["bench"]["rows"] if row.get("measure") in ("copy", "read")
    }
    return ", ".join(f"{name} {row['gb_per_s']:,.0f} GB/s" for name, row in named.items())


def markdown(results: dict | None, picture: str = "") -> str:
    """README's section between the markers; None: nothing was measured."""
    if results is None:
        return NOTHING_YET
    check(results | {"quick": False})
    machine = results["machine"]
    where = ", ".join(f"{name} {machine[name]}" for name in ("driver", "cuda", "torch", "triton", "python"))
    parts = [
        f"![Time of a step against the number of entries]({picture})",
        f"{machine['gpu']}, {where}; commit {machine['commit']}, {machine['date']}.\n"
        f"Medians with a flushed L2 cache; measured {_rates(results)}. "
        "The floor: θ and g read once at the copy's rate.",
        _steps_table(results),
        _bars_table(results["bars"]),
    ]
    if results.get("e2e", {}).get("rows"):
        parts.append(_training_table(results["e2e"]["rows"]))
    return "\n\n".join(parts)


def committed(folder: Path = RESULTS) -> list[Path]:
    """The results of GPUs in the repository."""
    return sorted(folder.glob("gpu-*.json"))


def publish(raw: dict, folder: Path, readme: Path | None, commit: str | None = None) -> Path:
    """Writes results file and picture into `folder`, and the section into `readme`."""
    from benchmarks.gpu.picture import draw

    results = evidence(raw, commit)
    path = folder / f"{slug(results['machine'])}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    picture = path.with_suffix(".png")
    draw(results, picture)
    if readme is not None:
        inside = picture.resolve().is_relative_to(readme.resolve().parent)
        shown = str(picture.resolve().relative_to(readme.resolve().parent)) if inside else picture.name
        update_readme(readme, markdown(results, shown), MARKERS)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.report", description=__doc__)
    parser.add_argument("raw", type=Path, help="what `make gpu-check` wrote")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--commit", help="of the code that ran, where the GPU machine had no git")
    parser.add_argument("--update-readme", action="store_true")
    options = parser.parse_args()
    readme = ROOT / "README.md" if options.update_readme else None
    try:
        print(publish(json.loads(options.raw.read_text()), options.output, readme, options.commit))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
