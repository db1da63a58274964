"""The GPU's part of README and of docs/benchmarks.md, from a results file. No torch, no matplotlib."""

from benchmarks.gpu.bars import ADAMW, BACKENDS, LARGE, Results, bars_of, with_ratios
from benchmarks.render import GPU, Pages, bars_table, missed, number, size, table

NOTHING_YET = "No GPU has run these kernels yet, so no GPU number is shown."
LABELS = {backend: f"ID3AdamW, {backend}" for backend in BACKENDS}
_TRAINING = "one training step, Llama-3.2-3B, bf16, 4 × 512 tokens"


def check(results: dict) -> None:
    """Raises ValueError for results of no GPU, of toy models, or without rows."""
    machine = results.get("machine", {})
    if not machine.get("is_gpu"):
        raise ValueError(f"results: expected a run on a GPU, got one on {machine.get('gpu', 'unknown')!r}")
    if results.get("quick"):
        raise ValueError("results: expected a full run, got --quick, whose models are toys")
    if not any("median_ms" in row for row in results.get("bench", {}).get("rows", [])):
        raise ValueError("results: expected measured rows, got none: run the part `bench`")


def evidence(raw: dict, commit: str | None = None) -> dict:
    """The results file: the raw one without the processes' output, ratios and bars computed anew."""
    check(raw)
    rows = with_ratios(raw["bench"]["rows"])
    parts = ("build", "tests", "sanitize", "e2e")
    short = {part: _without_output(raw[part]) for part in parts if part in raw}
    machine = raw["machine"] | ({"commit": commit} if commit else {})
    return {"machine": machine, "bars": bars_of(rows), "bench": raw["bench"] | {"rows": rows}, **short}


def _without_output(found):
    if isinstance(found, dict):
        return {name: _without_output(value) for name, value in found.items() if name != "tail"}
    return [_without_output(value) for value in found] if isinstance(found, list) else found


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
        lines.append(
            [
                f"{row['model']}, B = {row['share']:.1%}{full}",
                label(row),
                f"{row['median_ms']:.3f} ({row['p20_ms']:.3f} – {row['p80_ms']:.3f})",
                number(row.get("over_floor")),
                f"{row['gb_per_s']:.0f}" if "gb_per_s" in row else "–",
                size(row.get("state_bytes")),
                size(row.get("peak_bytes")),
            ]
        )
    return table(header, lines)


def _training_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        numbers = ["–", "–", "–"]
        if "skipped" not in row:
            numbers = [
                f"{row['tokens_per_s']:,.0f}", size(row["peak_bytes"]), f"{row['optimizer_share']:.1%}"
            ]  # fmt: skip
        lines.append([row["method"], *numbers])
    return table([_TRAINING, "tokens/s", "peak", "in step()"], lines)


def _rates(results: dict) -> str:
    named = {
        row["measure"]: row for row in results["bench"]["rows"] if row.get("measure") in ("copy", "read")
    }
    return ", ".join(f"{name} {row['gb_per_s']:,.0f} GB/s" for name, row in named.items())


def readme_block(results: dict | None, picture: str = "") -> str:
    """The first backend's step of the first large model that was measured, and every missed bar by name."""
    if results is None:
        return NOTHING_YET
    check(results)
    machine, found = results["machine"], Results(results["bench"]["rows"])
    text = f"{machine['gpu']}, commit {machine['commit']}: "
    for model, backend in ((model, backend) for model in LARGE for backend in BACKENDS):
        over, faster = found.over_floor("step", backend, model), found.faster(ADAMW, backend, model)
        if over is not None:
            text += f"a step of {model} takes {number(over)} × the read of θ and g at the copy's rate"
            text += f", {ADAMW} {number(faster)} times as long as the step. " if faster else ". "
            break
    return text + missed(results["bars"])


def page_block(results: dict | None, picture: str = "") -> str:
    """Every table; None: nothing was measured."""
    if results is None:
        return NOTHING_YET
    check(results)
    machine = results["machine"]
    versions = ("driver", "cuda", "torch", "triton", "python")
    where = ", ".join(f"{name} {machine[name]}" for name in versions)
    parts = [
        f"![Time of a step against the number of entries]({picture})",
        f"{machine['gpu']}, {where}; commit {machine['commit']}, {machine['date']}.\n"
        f"Medians with a flushed L2 cache; measured {_rates(results)}. "
        "The floor: θ and g read once at the copy's rate.",
        _steps_table(results),
        missed(results["bars"]),
        bars_table(results["bars"]),
    ]
    if results.get("e2e", {}).get("rows"):
        parts.append(_training_table(results["e2e"]["rows"]))
    return "\n\n".join(parts)


GPU_PAGES = Pages(GPU, readme_block, page_block)
