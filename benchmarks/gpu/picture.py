"""Time of a step against the number of entries, with the floor, and one bar per method at one size."""

from pathlib import Path

from benchmarks.gpu.pages import label, steps
from benchmarks.picture import finish, multiples, start

SHARE, DTYPE = 0.001, "bfloat16"
# Okabe-Ito, as in the CPU's picture; the order is that of the legend and of the bars.
STYLES = {
    "ID3AdamW, cuda": ("#D55E00", "o", "-"),
    "ID3AdamW, cuda, CUDA graph": ("#D55E00", "s", ":"),
    "ID3AdamW, triton": ("#E69F00", "o", "-"),
    "ID3AdamW, triton, CUDA graph": ("#E69F00", "s", ":"),
    "AdamW(fused=True)": ("#56B4E9", "^", "-"),
    "dense masking": ("#0072B2", "v", "-"),
    "toolkit": ("#666666", "D", "-"),
}


def _shown(results: dict) -> dict[str, list[dict]]:
    """Per method its rows of the base case, by number of entries."""
    found: dict[str, list[dict]] = {name: [] for name in STYLES}
    for row in steps(results):
        base = row["dtype"] == DTYPE and row["share"] == SHARE and row["active"] == 0.5
        if base and "over_floor" in row and label(row) in found:
            found[label(row)].append(row)
    return {name: sorted(rows, key=lambda row: row["n"]) for name, rows in found.items() if rows}


def _sizes(axis, methods: dict[str, list[dict]]) -> None:
    floor = sorted({(row["n"], row["floor_ms"]) for rows in methods.values() for row in rows})
    axis.plot(*zip(*floor, strict=True), "k--", linewidth=1.2, label="floor: θ and g read once")
    for name, rows in methods.items():
        colour, marker, line = STYLES[name]
        points = [row["n"] for row in rows], [row["median_ms"] for row in rows]
        axis.plot(*points, color=colour, marker=marker, linestyle=line, label=name, markersize=5)
    axis.set(xscale="log", yscale="log", xlabel="entries of the model", ylabel="milliseconds of a step")
    axis.set_xticks([n for n, _ in floor], [f"{n / 1e9:.2g}B" for n, _ in floor], minor=False)
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(color="#DDDDDD")
    axis.spines[["top", "right"]].set_visible(False)


def _bars(axis, methods: dict[str, list[dict]]) -> None:
    """The size that most methods were measured at, the largest of those."""
    sizes = [row["n"] for rows in methods.values() for row in rows]
    n = max(sizes, key=lambda size: (sizes.count(size), size))
    rows = {name: row for name, found in methods.items() for row in found if row["n"] == n}
    over_floor, ms = ([row[field] for row in rows.values()] for field in ("over_floor", "median_ms"))
    multiples(axis, list(rows), over_floor, ms, [STYLES[name][0] for name in rows])
    axis.set_xlabel(f"multiples of the floor at {n / 1e9:.2g}B")


def draw(results: dict, path: Path) -> None:
    """Writes the PNG. Raises ValueError where the base case was not measured."""
    methods, machine = _shown(results), results["machine"]
    if not methods:
        raise ValueError(f"results: expected steps in {DTYPE} with B = {SHARE:.1%}, got none")
    figure, axes = start(2, 12.5, 5.0)
    _sizes(axes[0], methods)
    _bars(axes[1], methods)
    figure.legend(*axes[0].get_legend_handles_labels(), ncol=4, loc=(0.08, 0.05), fontsize=9, frameon=False)
    where = f"{machine['gpu']}, torch {machine['torch']}, commit {machine['commit']}; medians, L2 flushed"
    finish(figure, path, f"One optimizer step, {DTYPE}, budget {SHARE:.1%}, half of it active", where, 0.13)
