"""The promises about speed on a CPU, each with its measured number."""

from dataclasses import asdict

from benchmarks.cases import DTYPES, Case
from benchmarks.growth import POINTS
from benchmarks.memory import step_bound_bytes
from benchmarks.render import Bar, bar_rows
from benchmarks.shapes import MODELS

SMALL, LARGE = MODELS
SAMPLED_LIMITS = {0.0017: 0.06, 0.01: 0.15}  # by the share of active entries


class Results:
    """Looks medians up in the rows of one run."""

    def __init__(self, rows: list[dict], memory: list[dict]):
        self.rows, self.memory = rows, memory

    def row(self, kind: str, model: str, **wanted) -> dict | None:
        if kind in ("growth", "delta", "windows"):
            wanted = {"model": model, **wanted}
        else:
            wanted = {**asdict(Case(model)), **wanted}
            del wanted["rivals"]
        matches = (row for row in self.rows if row["kind"] == kind and wanted.items() <= row["case"].items())
        return next(matches, None)

    def ratio(self, over: str, model: str, subject: str = "id3", **wanted) -> float | None:
        """Median of a whole step over the median of `over`, from the same rounds."""
        row = self.row("step", model, **wanted)
        if row is None or over not in row["methods"]:
            return None
        return row["methods"][subject]["median_ms"] / row["methods"][over]["median_ms"]

    def growth(self, parts: tuple[str, ...]) -> float | None:
        """Summed time of a growing run's `parts` over that of the static run's updates."""
        row = self.row("growth", LARGE) or self.row("growth", SMALL)
        if row is None:
            return None
        medians = {name: method["median_ms"] for name, method in row["methods"].items()}
        growing = sum(medians[f"{part}_{point}"] for part in parts for point in range(POINTS))
        return growing / POINTS / medians["static"]

    def windows(self, every: int) -> float | None:
        """Time of the optimizer with `select_every` over that of one that selects in each step."""
        row = self.row("windows", LARGE) or self.row("windows", SMALL)
        if row is None:
            return None
        return row["methods"][f"every_{every}"]["median_ms"] / row["methods"]["every_1"]["median_ms"]

    def delta_ms(self, what: str, dtype: str) -> float | None:
        """Median milliseconds to apply or revert a delta on the large model."""
        row = self.row("delta", LARGE, dtype=dtype)
        return None if row is None else row["methods"][what]["median_ms"]

    def sampled(self, dtype: str, share: float, cached: str) -> float | None:
        """The sampled weight gradient over the dense product, of the layer where that is the most."""
        rows = [row for row in self.rows if row["kind"] == "sampled"]
        medians = [
            [row["methods"][name + cached]["median_ms"] for name in ("sampled", "dense")]
            for row in rows
            if (row["case"]["dtype"], row["case"]["share"]) == (dtype, share)
        ]
        return max((sampled / dense for sampled, dense in medians), default=None)

    def step_memory(self, model: str) -> float | None:
        """Peak bytes of a step over the bound on them."""
        rows = (row for row in self.memory if (row["model"], row["method"]) == (model, "id3"))
        return next((row["peak_bytes"] / step_bound_bytes(model) for row in rows), None)


def bars_of(rows: list[dict], memory: list[dict]) -> list[dict]:
    """The bars of a results file, from its rows alone."""
    results = Results(rows, memory)
    return bar_rows(_measured(results) + _sampled(results))


def _sampled(results: Results) -> list[Bar]:
    """The bars of the sampled weight gradient that a run has measured; results up to 0.1.0 have none."""
    bars = []
    for share, limit in SAMPLED_LIMITS.items():
        for dtype in DTYPES:
            for cached, where in (("", "x from memory"), ("_cached", "x in the cache")):
                what = f"sampled / dense weight gradient, {share:.2%} active, {dtype}, {where}, worst layer"
                bars.append(Bar(what, limit, results.sampled(dtype, share, cached)))
    return [bar for bar in bars if bar.value is not None]


def _against(results: Results, what: str, over: str, limits: dict[str, float], **wanted) -> list[Bar]:
    """One bar per model: our step over the method `over`."""
    return [
        Bar(
            f"{what}, {model}",
            limit,
            results.ratio(over, model, **wanted),
            results.ratio(over, model, **wanted, active=1.0),
        )
        for model, limit in limits.items()
    ]


def _measured(results: Results) -> list[Bar]:
    both = "step / bare read of θ and g"
    same = tuple(MODELS)
    bars = []
    for exp in (1.0, 2.0):
        bars += _against(results, f"{both}, exp {exp:g}", "read_both", {SMALL: 1.35, LARGE: 1.25}, exp=exp)
    bars += _against(results, f"{both}, exp 0.7", "read_both", dict.fromkeys(same, 3.0), exp=0.7)
    bars += _against(results, "step / bare read of g, exp 0", "read_grad", dict.fromkeys(same, 1.4), exp=0.0)
    bars += _against(results, f"{both}, k = 0", "read_both", dict.fromkeys(same, 0.2), selects=False)
    bars += _against(results, "step / AdamW(fused=True)", "adamw", dict.fromkeys(same, 0.55))
    bars += _against(results, "step / dense masking done well", "dense", dict.fromkeys(same, 0.35))
    bars += _against(results, "step / dense masking, plain", "dense_plain", dict.fromkeys(same, 0.03))
    bars += _against(results, "step / the toolkit's step()", "toolkit", dict.fromkeys(same, 1 / 80))
    five = "step / AdamW(fused=True), B = 5 %"
    bars.append(Bar(f"{five}, |Λ| = B/2, {LARGE}", 0.85, results.ratio("adamw", LARGE, budget=0.05)))
    bars.append(Bar(f"{five}, |Λ| = B, {LARGE}", 1.0, results.ratio("adamw", LARGE, budget=0.05, active=1.0)))
    bars.append(Bar("increment / static, update alone", 0.55, results.growth(("update",))))
    bars.append(Bar("increment / static, update and join", 0.60, results.growth(("update", "join"))))
    every = Bar("optimizer's time over a run, select_every 16 / 1", 0.12, results.windows(16))
    bars += [every] if every.value is not None else []
    for what in ("apply", "revert"):
        for dtype in ("float32", "bfloat16"):
            label = f"{what} a delta of 320K entries, ms, {dtype}, {LARGE}"
            bars.append(Bar(label, 30.0, results.delta_ms(what, dtype)))
    for model in MODELS:
        bars.append(Bar(f"peak memory of a step / bound, {model}", 1.0, results.step_memory(model)))
        bf16 = results.ratio("id3_float32", model, dtype="bfloat16")
        bars.append(Bar(f"bf16 / float32, {model}", 0.75, bf16))
    return bars
