"""Step times as multiples of a floor: bars on a logarithmic axis, one panel per model for the CPU."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.bars import Results
from benchmarks.pages import METHODS
from benchmarks.render import duration
from benchmarks.shapes import MODELS

# Okabe-Ito: distinct in every common form of colour blindness, and in grey.
OURS, RIVAL, FLOOR = "#D55E00", "#8FB8D8", "#000000"
_GRID, _SMALL = "#DDDDDD", "#555555"
_LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1}


def multiples(axis, labels: list[str], over_floor: list[float], ms: list[float], colours: list[str]) -> None:
    """One horizontal bar per method, top to bottom, with its multiple of the floor and its time."""
    axis.barh(range(len(labels)), over_floor, color=colours, height=0.66, zorder=2)
    for place, (multiple, time) in enumerate(zip(over_floor, ms, strict=True)):
        text = f"{multiple:.3g}×   {duration(time)}"
        axis.text(max(multiple, 1.0) * 1.12, place, text, va="center", zorder=4, bbox=_LABEL_BOX)
    axis.axvline(1.0, color=FLOOR, linestyle="--", linewidth=1.2, zorder=3)
    axis.set(xscale="log", xlim=(0.5, max(over_floor) * 14))
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.grid(axis="x", color=_GRID, zorder=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def start(panels: int, width: float, height: float):
    """(figure, axes) in the style of every picture; sizes in inches."""
    plt.rcParams.update({"font.size": 11, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(1, panels, figsize=(width, height), squeeze=False)
    return figure, axes[0]


def finish(figure, path: Path, title: str, where: str, bottom: float = 0.04) -> None:
    """Title, machine in small print, and the PNG. bottom: share of the height that panels leave free."""
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    figure.text(0.01, 0.01, where, fontsize=9, color=_SMALL)
    figure.tight_layout(rect=(0, bottom, 1, 0.98))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axis, row: dict) -> None:
    methods = {name: row["methods"][name]["median_ms"] for name in METHODS if name in row["methods"]}
    read = row["methods"]["read_both"]["median_ms"]
    colours = [OURS if name == "id3" else RIVAL for name in methods]
    times = list(methods.values())
    multiples(axis, [METHODS[name] for name in methods], [ms / read for ms in times], times, colours)
    axis.set_title(f"{row['case']['model']}: {row['n'] / 1e6:.1f}M entries", loc="left", fontweight="bold")
    axis.set_xlabel(f"multiples of one bare read of θ and g ({duration(read)}, dashed)")


def draw(results_file: dict, path: Path) -> None:
    """Write the PNG: base case of each model that was measured."""
    results, machine = Results(results_file["rows"], results_file["memory"]), results_file["machine"]
    rows = [row for row in (results.row("step", model) for model in MODELS) if row is not None]
    figure, axes = start(len(rows), 6.6 * len(rows), 4.4)
    for axis, row in zip(axes, rows, strict=True):
        _panel(axis, row)
    for axis in axes[1:]:
        axis.set_yticklabels([])
    title = "One optimizer step, float32, budget 0.17 %, half of it active"
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; medians, interleaved"
    finish(figure, path, title, where)
