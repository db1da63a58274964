"""Tables, bars and the picture of `python -m benchmarks training`."""

from pathlib import Path

from benchmarks.render import TRAINING, Bar, Pages, bar_rows, bars_table, missed, number, table

WINDOWS = (1, 4, 16, 64)
SPARSE = ("sparse", "sparse_more")  # their steps with and without selection are timed apart
LABELS = {
    "full": "full fine-tuning, AdamW(fused=True)",
    "passes": "forward and dX alone (floor)",
    "lora8": "LoRA, r = 8",
    "lora32": "LoRA, r = 32",
    "shira": "SHiRA, r = 8",
    "dense": "ID3 0.17 %, dense gradients",
    "released": "ID3 0.17 %, released gradients",
    "sparse": "ID3 0.17 %, sparse backward",
    "sparse_more": "ID3 1 %, sparse backward",
    "recipe": "recipe 0.17 %, sparse backward",
}


def step_ms(row: dict, method: str, every: int = 1) -> float | None:
    """Mean milliseconds of a step: of a sparse method one of `every` steps selects."""
    ms = row["ms"].get(method)
    if ms is None or method not in SPARSE:
        return ms
    return (row["ms"][f"{method}_select"] + (every - 1) * ms) / every


def front_loaded_ms(row: dict, method: str = "sparse", share: float = 0.2) -> float:
    """Mean milliseconds where all steps of the first share of a run select, and none later."""
    return share * row["ms"][f"{method}_select"] + (1 - share) * row["ms"][method]


def _lines(row: dict) -> dict[str, float]:
    """Label: mean milliseconds of a step."""
    lines = {}
    for method, label in LABELS.items():
        if method in SPARSE:
            lines |= {f"{label}, K = {every}": step_ms(row, method, every) for every in WINDOWS}
        elif method in row["ms"]:
            lines[label] = row["ms"][method]
    return lines | {f"{LABELS['sparse']}, front-loaded 20 %": front_loaded_ms(row)}


def _case(row: dict) -> str:
    return f"{row['model']} ({row['entries'] / 1e6:.0f}M), {row['dtype']}, {row['tokens']} tokens"


def tables(results: dict) -> str:
    """Times as milliseconds and as shares of full fine-tuning's; tokens per second; peak memory."""
    times = []
    for row in results["times"]:
        full = row["ms"]["full"]
        for label, ms in _lines(row).items():
            rate = f"{row['tokens'] / ms * 1e3:,.0f}"
            times.append([_case(row), label, f"{ms:.0f}", f"{ms / full:.3f}", rate])
    memory = []
    for row in results["memory"]:
        between = f"{row['between_bytes'] / 1e6:,.0f}" if row["method"] in SPARSE else ""
        case = f"{row['model']}, {row['dtype']}, {row['tokens']} tokens"
        memory.append([case, LABELS[row["method"]], f"{row['peak_bytes'] / 1e6:,.0f}", between])
    header = ["case", "method", "peak above the weights, MB", "between selections, MB"]
    return "\n\n".join(
        [table(["case", "method", "step, ms", "/ full", "tokens/s"], times), table(header, memory)]
    )


class Measured:
    """Looks numbers up in the results; None where something was not measured."""

    def __init__(self, results: dict):
        self._results = results

    def ratio(self, case: tuple, one: tuple[str, int], other: str) -> float | None:
        row = self._row("times", case)
        if row is None or other not in row["ms"]:
            return None
        return step_ms(row, *one) / step_ms(row, other)

    def memory(self, case: tuple, one: str, other: str) -> float | None:
        rows = [self._row("memory", case, method) for method in (one, other)]
        return None if None in rows else rows[0]["peak_bytes"] / rows[1]["peak_bytes"]

    def _row(self, kind: str, case: tuple, method: str | None = None) -> dict | None:
        for row in self._results[kind]:
            if (row["model"], row["dtype"], row["tokens"]) == case and row.get("method") == method:
                return row
        return None


def bars_of(results: dict) -> list[dict]:
    """The promises about whole training steps, each with its measured number."""
    measured, bars = Measured(results), []
    k16 = ("sparse", 16)
    for tokens in (512, 2048):
        llama = ("Llama", "float32", tokens)
        where = f"Llama, {tokens} tokens"
        for other, limit in (("full", 0.72), ("lora8", 0.95), ("passes", 1.06)):
            ratio = measured.ratio(llama, k16, other)
            bars.append(Bar(f"sparse, K = 16 / {LABELS[other]}, {where}", limit, ratio))
        more = measured.ratio(llama, ("sparse_more", 16), "lora8")
        bars.append(Bar(f"sparse 1 %, K = 16 / {LABELS['lora8']}, {where}", 0.98, more))
        for model in ("MiniLM", "GPT-2"):
            ratio = measured.ratio((model, "float32", tokens), k16, "lora8")
            bars.append(Bar(f"sparse, K = 16 / {LABELS['lora8']}, {model}, {tokens} tokens", 1.0, ratio))
        once = measured.ratio(llama, ("sparse", 1), "released")
        bars.append(Bar(f"sparse, K = 1 / {LABELS['released']}, {where}", 1.02, once))
        for other in ("lora8", "released"):
            ratio = measured.memory(llama, "sparse", other)
            bars.append(Bar(f"peak memory, sparse / {LABELS[other]}, {where}", 1.0, ratio))
    return bar_rows(bars)


_ALT = "Times of a whole training step as shares of full fine-tuning's"


def _machine(results: dict) -> str:
    """The machine line; `renewed` of the results: what was measured later, and at which commit."""
    machine, renewed = results["machine"], results.get("renewed")
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    when = f"commit {machine['commit']}, {machine['date']}" + (f"; {renewed}" if renewed else "")
    return f"{where}; torch {machine['torch']} ({machine['simd']}); {when}."


def readme_block(results: dict, picture: str) -> str:
    """Picture, machine, the case that the bars are about, and every missed bar by name."""
    measured, llama = Measured(results), ("Llama", "float32", 512)
    entries = next(row["entries"] for row in results["times"] if row["model"] == "Llama") / 1e6
    full, lora, floor = (
        number(measured.ratio(llama, ("sparse", 16), other)) for other in ("full", "lora8", "passes")
    )
    dense = number(measured.ratio(llama, ("dense", 1), "full"))
    summary = (
        f"A Llama shape of {entries:.0f}M entries, 512 tokens, 0.17 % of the entries, sparse backward, "
        f"selection in every 16th step: a training step takes {full} of full fine-tuning's, {lora} of LoRA's "
        f"(r = 8 on all linear layers), and {floor} of the forward pass and the gradients of activations "
        f"alone. As it is by default, with dense gradients and selection in every step, it takes {dense} of "
        f"full fine-tuning's. {_machine(results)}"
    )
    return "\n\n".join([f"![{_ALT}]({picture})", summary, missed(results["bars"])])


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def page_block(results: dict, picture: str) -> str:
    """Every table."""
    rounds, processes = (
        _range([row.get(name, 1) for row in results["times"]]) for name in ("rounds", "processes")
    )
    return f"""![{_ALT}]({picture})

{_machine(results)}
Medians over {processes} processes of the medians of {rounds} interleaved rounds in each; forward, backward
and step; texts of 128 tokens, no dropout, random weights; half the budget active. K: entries join in every
K-th step; a step's time is the mean over K steps. Front-loaded: the first fifth of a run's steps select,
the rest do not. Memory: a process for each method; where steps with and without selection differ, both.

{missed(results["bars"])}

{bars_table(results["bars"])}

{tables(results)}"""


TRAINING_PAGES = Pages(TRAINING, readme_block, page_block)


def draw(results: dict, path: Path) -> None:
    """Time per method as a share of full fine-tuning's, a panel per model; the floor is a line."""
    from benchmarks.picture import FLOOR, OURS, RIVAL, finish, start

    rows = [row for row in results["times"] if row["dtype"] == "float32"]
    tokens = rows[0]["tokens"]
    rows = [row for row in rows if row["tokens"] == tokens]
    shares = [{label: ms / row["ms"]["full"] for label, ms in _lines(row).items()} for row in rows]
    every = max(shares, key=len)  # a method that one model lacks has an empty place there
    labels = [label for label in every if label != LABELS["passes"] and "K = 4" not in label]
    figure, axes = start(len(rows), 2.5 + 3.8 * len(rows), 5.6)
    for axis, row, share in zip(axes, rows, shares, strict=True):
        colours = [OURS if label.startswith(("ID3", "recipe")) else RIVAL for label in labels]
        axis.barh(range(len(labels)), [share.get(label, 0) for label in labels], color=colours, height=0.66)
        for place, label in enumerate(labels):
            axis.text(share.get(label, 0) + 0.01, place, number(share.get(label)), va="center", fontsize=9)
        axis.axvline(share[LABELS["passes"]], color=FLOOR, linestyle="--", linewidth=1.2)
        axis.set_yticks(range(len(labels)), labels if axis is axes[0] else [""] * len(labels))
        axis.set_title(f"{row['model']} ({row['entries'] / 1e6:.0f}M)", fontsize=11)
        axis.set_xlim(0, 1.25)
        axis.invert_yaxis()
        axis.spines[["top", "right", "left"]].set_visible(False)
    machine = results["machine"]
    where = f"{machine['cpu']}, {machine['threads']} threads; torch {machine['torch']}; medians."
    where += " Dashed: forward and dX alone."
    finish(figure, path, f"A whole training step over full fine-tuning's, {tokens} tokens", where)
