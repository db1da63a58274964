"""The CPU's part of README and of docs/benchmarks.md, from a results file."""

from benchmarks.bars import Results
from benchmarks.render import BENCH, Pages, bars_table, missed, number, size, table
from benchmarks.shapes import MODELS

# Label of each method; the line break is the picture's.
METHODS = {
    "id3": "ID3AdamW",
    "adamw": "AdamW(fused=True),\nall entries",
    "dense": "dense masking,\ndone well",
    "dense_plain": "dense masking,\nplain topk",
    "toolkit": "the method's\nown toolkit",
}
READS = {"read_both": "bare read of θ and g", "read_grad": "bare read of g"}
_IN_README = ("id3", "adamw", "dense", "toolkit", "read_both")
_BASE = "float32, budget 0.17 %, k = B/3000, half the budget active, exp 1"
_ALT = "Step times as multiples of one read of the weights and gradients"


def _machine(machine: dict, *more: str) -> str:
    """The machine line; `more`: parts between torch and the commit."""
    threads = f"{machine['cores']} cores, {machine['threads']} threads"
    parts = [
        f"{machine['cpu']}, {threads}, {machine['memory_gib']} GiB",
        f"torch {machine['torch']} ({machine['simd']})",
        *more,
        f"commit {machine['commit']}, {machine['date']}.",
    ]
    return "; ".join(parts)


def _base_rows(results: Results) -> dict[str, dict]:
    rows = {model: results.row("step", model) for model in MODELS}
    return {model: row for model, row in rows.items() if row is not None}


def _held(results: Results, model: str, name: str) -> dict:
    """The method's memory row, empty where it was not measured."""
    wanted = {"model": model, "method": name}
    return next((row for row in results.memory if wanted.items() <= row.items()), {})


def _step_table(results: Results, names: tuple[str, ...] = (), full: bool = True) -> str:
    """Rows: methods; per model the multiple of the bare read and the state, if `full` median and peak too."""
    rows, labels = _base_rows(results), METHODS | READS
    header = ["one step"]
    for model, row in rows.items():
        title = f"{model} ({row['n'] / 1e6:.1f}M)"
        header += [f"{title}, ms", "× read", "state", "peak"] if full else [f"{title}, × read", "state"]
    lines = []
    for name in names or labels:
        line = [labels[name].replace("\n", " ")]
        for model, row in rows.items():
            method, held = row["methods"].get(name), _held(results, model, name)
            ms, over = (f"{method['median_ms']:.1f}", f"{method['over_read']:.3g}") if method else "––"
            state, peak = (size(held.get(field)) for field in ("state_bytes", "peak_bytes"))
            line += [ms, over, state, peak] if full else [over, state]
        lines.append(line)
    return table(header, lines)


def _sweep_table(results: Results) -> str:
    """Every whole-step case: our median, and its multiples of the other methods' medians."""
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
        lines.append(line + [number(ours / methods[name]["median_ms"]) for name in names])
    return table(header, lines)


def _case(row: dict) -> str:
    """The kind, the model and what the case measures, in one line."""
    case, texts = row["case"], {"budget": "B = {:.2%}", "exp": "exp {:g}", "active": "|Λ| = {:g} B"}
    texts |= {"tokens": "{} tokens", "share": "{:.2%} active", "spread": "{} spread"}
    parts = [text.format(case[name]) for name, text in texts.items() if name in case]
    parts += ["k = 0"] if case.get("selects") is False else []
    return ", ".join([f"{row['kind']}: {case['model']}", case["dtype"], *parts])


def medians_table(rows: list[dict]) -> str:
    """Every method of every row: p20, median, p80 and rounds."""
    lines = []
    for row in rows:
        for name, method in row["methods"].items():
            times = [f"{method[field]:.3f}" for field in ("p20_ms", "median_ms", "p80_ms")]
            lines.append([_case(row), name, *times, str(method["rounds"])])
    return table(["case", "method", "p20, ms", "median, ms", "p80, ms", "rounds"], lines)


def _alone_table(results: Results, kinds: tuple[str, ...], labels: dict[str, str]) -> str:
    """One row per case of `kinds`: the medians of the methods in `labels`."""
    lines = []
    for row in results.rows:
        if row["kind"] in kinds:
            medians = (row["methods"].get(name, {}).get("median_ms") for name in labels)
            lines.append([_case(row), *("–" if ms is None else f"{ms:.2f}" for ms in medians)])
    return table(["median, ms", *(label.replace("\n", " ") for label in labels.values())], lines)


def _growth_table(results: Results) -> str:
    """Rows: points of a growing run; the update and the join there, over the update of a run that holds B."""
    lines = []
    for row in results.rows:
        if row["kind"] != "growth":
            continue
        medians = {name: method["median_ms"] for name, method in row["methods"].items()}
        points = sum(name.startswith("update_") for name in medians)
        for point in range(points):
            times = [medians[f"{part}_{point}"] for part in ("update", "join")]
            ratios = [number(time / medians["static"]) for time in (times[0], sum(times))]
            at = f"{row['case']['model']}, {row['b']:,} entries, |Λ| = {2 * point + 1}/{2 * points} B"
            lines.append([at, *(f"{time:.2f}" for time in times), *ratios])
    return table(["growing run", "update, ms", "join, ms", "update / static", "with join / static"], lines)


def _sampled(results: Results) -> str:
    """The section of sampled weight gradients; empty where none was measured."""
    if not any(row["kind"] == "sampled" for row in results.rows):
        return ""
    labels = {"sampled": "at active entries", "dense": "dense"}
    labels |= {f"{name}_cached": f"{label}, in the cache" for name, label in labels.items()}
    return f"\n\n### The weight gradient of one layer\n\n{_alone_table(results, ('sampled',), labels)}"


def _bandwidth(results: Results) -> str:
    rows = _base_rows(results).values()
    return " and ".join(f"{row['methods']['read_both']['gb_per_s']:.0f}" for row in rows)


def _note(machine: dict) -> str:
    return f"\n{machine['note']}" if "note" in machine else ""


def readme_block(results_file: dict, picture: str) -> str:
    """Picture, machine, one small table, and every missed bar by name."""
    machine, results = results_file["machine"], Results(results_file["rows"], results_file["memory"])
    return f"""![{_ALT}]({picture})

{_machine(machine)}
Medians; {_BASE}.{_note(machine)}

{_step_table(results, _IN_README, full=False)}

{missed(results_file["bars"])}"""


def page_block(results_file: dict, picture: str) -> str:
    """Every table."""
    machine, results = results_file["machine"], Results(results_file["rows"], results_file["memory"])
    build = ", ".join(f"{key} {value}" for key, value in machine["build"].items())
    rounds = {name: m["rounds"] for row in results.rows for name, m in row["methods"].items()}
    return f"""![{_ALT}]({picture})

{_machine(machine, build)}
Medians of interleaved rounds in one process ({rounds.get("id3", 0)} of ours, {rounds.get("toolkit", 0)} of \
the toolkit and of plain masking on the largest model); every method first passes a correctness gate.
The bare read runs at {_bandwidth(results)} GB/s.
{_BASE}, unless a table says otherwise.{_note(machine)}

### One step

{_step_table(results)}

### Bars

{missed(results_file["bars"])}

{bars_table(results_file["bars"], "ratio (|Λ| = B/2)")}

### Other budgets, exponents, dtypes and active sets

{_sweep_table(results)}

### A growing active set

{_growth_table(results)}

### Selection and update alone

{_alone_table(results, ("selection", "update"), METHODS)}

### A delta of 320K entries

{_alone_table(results, ("delta",), {"apply": "apply", "revert": "revert"})}{_sampled(results)}"""


CPU_PAGES = Pages(BENCH, readme_block, page_block)
