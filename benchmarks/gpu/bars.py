"""The promises about speed on a GPU, each with its measured number; ratios within one run."""

from benchmarks.render import Bar, bar_rows

LARGE = ("1.3B bfloat16", "6.7B bfloat16")
SMALL = ("184M bfloat16", "184M float32")
BACKENDS = ("cuda", "triton")
ADAMW = "AdamW(fused=True)"
_WITH_FLOOR = ("select", "step", "graph")  # the measures that read θ and g


def copy_rate(rows: list[dict]) -> float | None:
    """Bytes per millisecond of the copy, read and written."""
    copied = next((row for row in rows if row.get("measure") == "copy"), None)
    return copied["bytes"] / copied["median_ms"] if copied else None


def with_ratios(rows: list[dict]) -> list[dict]:
    """The rows with GB/s, the share of the copy's, and multiples of the floor: θ and g read at its rate."""
    rate, ready = copy_rate(rows), []
    for row in rows:
        more = {}
        if "median_ms" in row and "bytes" in row:
            more["gb_per_s"] = round(row["bytes"] / row["median_ms"] / 1e6, 1)
            if rate:
                more["over_copy"] = round(row["bytes"] / row["median_ms"] / rate, 4)
        if row.get("measure") in _WITH_FLOOR and "median_ms" in row and rate:
            floor_ms = row["floor_bytes"] / rate
            more |= {"floor_ms": round(floor_ms, 5), "over_floor": round(row["median_ms"] / floor_ms, 4)}
        if "sectors" in row and "median_ms" in row:
            more["sectors_per_us"] = round(row["sectors"] / row["median_ms"] / 1e3, 1)
        ready.append(row | more)
    return ready


class Results:
    """Looks rows up. A lookup of what was not measured returns None."""

    def __init__(self, rows: list[dict]):
        self.rows, self.rate = rows, copy_rate(rows)

    def row(self, measure: str, method: str, model: str, share: float = 0.001, active: float = 0.5):
        wanted = {"measure": measure, "method": method, "model": model, "share": share, "active": active}
        found = (row for row in self.rows if wanted.items() <= row.items() and "median_ms" in row)
        return next(found, None)

    def ms(self, measure: str, method: str, model: str, share: float = 0.001) -> float | None:
        row = self.row(measure, method, model, share)
        return row and row["median_ms"]

    def of_copy(self, method: str, model: str) -> float | None:
        """The rate at which selection reads θ and g, over the copy's."""
        row = self.row("select", method, model)
        return row and self.rate and row["floor_bytes"] / row["median_ms"] / self.rate

    def over_floor(self, measure: str, method: str, model: str) -> float | None:
        row = self.row(measure, method, model)
        return row and self.rate and row["median_ms"] * self.rate / row["floor_bytes"]

    def faster(self, rival: str, method: str, model: str, share: float = 0.001) -> float | None:
        """The rival's step over ours. AdamW's has no budget."""
        theirs = self.ms("step", rival, model, 0.001 if rival == ADAMW else share)
        ours = self.ms("step", method, model, share)
        return theirs / ours if theirs and ours else None


def bars_of(rows: list[dict]) -> list[dict]:
    """The bars of a results file, from its rows alone."""
    results = Results(rows)
    return bar_rows([bar for backend in BACKENDS for bar in _of_backend(results, backend)])


def _of_backend(results: Results, backend: str) -> list[Bar]:
    def bar(what: str, sense: str, limit: float, value: float | None) -> Bar:
        return Bar(f"{backend}: {what}", limit, value, sense=sense)

    bars = []
    for model in LARGE:
        bars.append(bar(f"selection / copy rate, {model}", "≥", 0.88, results.of_copy(backend, model)))
        bars.append(bar(f"step / floor, {model}", "≤", 1.2, results.over_floor("step", backend, model)))
    for model in SMALL:
        bars.append(bar(f"step / floor, {model}", "≤", 1.5, results.over_floor("step", backend, model)))
        in_graph = results.over_floor("graph", backend, model)
        bars.append(bar(f"step in a CUDA graph / floor, {model}", "≤", 1.3, in_graph))
    for model in (SMALL[1], LARGE[0]):
        faster = results.faster("toolkit", backend, model)
        bars.append(bar(f"the toolkit's step() / step, {model}", "≥", 30, faster))
    for share, limit in ((0.001, 7.5), (0.01, 5)):
        faster = results.faster("dense masking", backend, LARGE[0], share)
        bars.append(bar(f"dense masking done well / step, B = {share:.1%}, {LARGE[0]}", "≥", limit, faster))
    for model in LARGE:
        bars.append(bar(f"{ADAMW} / step, {model}", "≥", 3, results.faster(ADAMW, backend, model)))
    bars.append(bar("host ms of a step, 300 tensors", "≤", 0.2, results.ms("host", backend, "300 tensors")))
    for parts, limit in (("update", 0.55), ("update and join", 0.60)):
        row = results.row(f"growth, {parts}", backend, LARGE[0], 0.01)
        bars.append(bar(f"increment / static, {parts}, B = 1 %", "≤", limit, row and row["ratio"]))
    if backend == "cuda":
        row = results.row("hook", backend, "300 tensors")
        bars.append(bar("host µs per hook of released gradients", "≤", 25, row and row["hook_us"]))
    return bars
