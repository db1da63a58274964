"""Step times as multiples of the bare read: one panel per model, logarithmic."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.bars import Results
from benchmarks.shapes import MODELS

# Top to bottom, with the label in the picture.
METHODS = {
    "id3": "ID3AdamW",
    "adamw": "AdamW(fused=True),\nall entries",
    "dense": "dense masking,\ndone well",
    "dense_plain": "dense masking,\nplain topk",
    "toolkit": "the method's\nown toolkit",
}
# Okabe-Ito: told apart in every common form of colour blindness, and in grey.
_PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 1}
_OURS, _RIVAL, _FLOOR = "#D55E00", "#8FB8D8", "#000000"


def _milliseconds(value: float) -> str:
    if value >= 1e3:
        return f"{value / 1e3:.2f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms"


def _panel(axis, row: dict) -> None:
    methods = {name: row["methods"][name]["median_ms"] for name in METHODS if name in row["methods"]}
    read = row["methods"]["read_both"]["median_ms"]
    multiples = [median / read for median in methods.values()]
    colours = [_OURS if name == "id3" else _RIVAL for name in methods]
    axis.barh(range(len(methods)), multiples, color=colours, height=0.66, zorder=2)
    for place, (multiple, median) in enumerate(zip(multiples, methods.values(), strict=True)):
        label = f"{multiple:.3g}×   {_milliseconds(median)}"
        axis.text(max(multiple, 1.0) * 1.12, place, label, va="center", zorder=4, bbox=_PLAIN)
    axis.axvline(1.0, color=_FLOOR, linestyle="--", linewidth=1.2, zorder=3)
    axis.set(xscale="log", xlim=(0.5, max(multiples) * 14), yticks=range(len(methods)))
    axis.set_yticklabels([METHODS[name] for name in methods])
    axis.invert_yaxis()
    axis.set_title(f"{row['case']['model']}: {row['n'] / 1e6:.1f}M entries", loc="left", fontweight="bold")
    axis.set_xlabel(f"multiples of one bare read of θ and g ({_milliseconds(read)}, dashed)")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.grid(axis="x", color="#DDDDDD", zorder=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def draw(results: Results, machine: dict, path: Path) -> None:
    """Write the PNG: base case of each model that was measured."""
    rows = [row for row in (results.row("step", model) for model in MODELS) if row is not None]
    plt.rcParams.update({"font.size": 11, "font.family": "DejaVu Sans"})
    figure, axes = plt.subplots(1, len(rows), figsize=(6.6 * len(rows), 4.4), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        _panel(axis, row)
    for axis in axes[0][1:]:
        axis.set_yticklabels([])
    title = "One optimizer step, float32, budget 0.17 %, half of it active"
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    where = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; medians, interleaved"
    figure.text(0.01, 0.01, where, fontsize=9, color="#555555")
    figure.tight_layout(rect=(0, 0.04, 1, 0.98))
    figure.savefig(path, dpi=150)
    plt.close(figure)
