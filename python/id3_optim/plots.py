"""Pictures of a run and of a delta: losses, allocation, and the spread over the tensors (paper, figures 7-9).

matplotlib is optional: only the functions that write a file import it.
"""

import io
from pathlib import Path

import torch

from . import atomic
from .analysis import Allocation, allocation
from .ranks import writes_files


def loss_curve(history: list[dict]) -> tuple[list[int], list[float]]:
    """Steps and training losses of a Trainer's `state.log_history`."""
    logged = [entry for entry in history if "loss" in entry]
    return [entry["step"] for entry in logged], [entry["loss"] for entry in logged]


def plot_losses(axes, curves: dict[str, tuple[list[int], list[float]]], title: str = "training loss") -> None:
    """Draws (steps, losses) by label; later curves are dashed, so that curves that coincide stay visible."""
    for i, (label, (steps, losses)) in enumerate(curves.items()):
        style = {"linewidth": 2.6, "alpha": 0.75} if i == 0 else {"linewidth": 1.4, "linestyle": (0, (4, 2))}
        axes.plot(steps, losses, label=label, **style)
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(frameon=False)


def plot_allocation(axes, allocated: Allocation, title: str = "where the budget went") -> None:
    """Heat map as in figure 7: layers as columns, roles as rows, each cell's part of Λ in per cent."""
    share = 100.0 * allocated.share()
    present = allocated.entries > 0
    # One role can hold most of the budget: colours follow the square root, so that small shares stay visible.
    colour = (share / share.max().clamp(min=1e-9)).sqrt()
    axes.imshow(colour.where(present, torch.nan).numpy(), cmap="Blues", aspect="auto", vmin=0, vmax=1.1)
    axes.set_xticks(range(len(allocated.layers)), ["–" if n is None else str(n) for n in allocated.layers])
    axes.set_yticks(range(len(allocated.roles)), allocated.roles)
    for row, column in present.nonzero().tolist():
        value, dark = float(share[row, column]), bool(colour[row, column] > 0.6)
        text = "0" if value == 0 else "<0.1" if value < 0.05 else f"{value:.1f}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    outside = " (–: in no layer)" if None in allocated.layers else ""
    axes.set(xlabel=f"layer{outside}", title=f"{title}: % of {int(allocated.active.sum()):,} entries")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def plot_spread(axes, history: list[dict]) -> None:
    """Tensor sparsity (left scale) and sparsity entropy (right scale) over the run, as in figures 8 and 9."""
    logged = [entry for entry in history if "tensor_sparsity" in entry]
    steps = [entry["step"] for entry in logged]
    right = axes.twinx()
    axes.plot(steps, [entry["tensor_sparsity"] for entry in logged], color="tab:blue")
    right.plot(steps, [entry["sparsity_entropy"] for entry in logged], color="tab:orange")
    axes.set(xlabel="step", title="how the choice spread over the tensors", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("tensor sparsity", color="tab:blue")
    right.set_ylabel("sparsity entropy, nats", color="tab:orange")
    axes.grid(alpha=0.3)


def _save(figure, path: Path) -> None:
    """Writes the figure in the format of the file's ending, atomically, on the first of several processes.

    Makes the directory.
    """
    if not writes_files():
        return
    path = path if path.suffix else path.with_suffix(".png")
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:])
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, drawn.getvalue(), "a picture")


def save_plots(path: str | Path, curves: dict[str, list[dict]], model: torch.nn.Module, optimizer) -> None:
    """Writes one PNG: the loss curves, the allocation of `optimizer`, and the spread over the run.

    curves: a Trainer's log history by label; the first one is the run of `optimizer`. For an optimizer
    without a budget, such as torch's own, the picture shows the losses alone.
    """
    from matplotlib.figure import Figure  # optional

    selective = hasattr(optimizer, "touched")
    figure = Figure(figsize=(16 if selective else 6, 4.8), layout="constrained", dpi=110)
    panels = figure.subplots(1, 3 if selective else 1, squeeze=False)[0]
    plot_losses(panels[0], {label: loss_curve(history) for label, history in curves.items()})
    if selective:
        plot_allocation(panels[1], allocation(model, optimizer))
        plot_spread(panels[2], next(iter(curves.values())))
    _save(figure, Path(path))


def save_allocation(path: str | Path, allocated: Allocation, title: str) -> None:
    """Writes one PNG: the heat map by role and layer, totals of layers above it and of roles beside it."""
    from matplotlib.figure import Figure  # optional

    columns, rows = max(len(allocated.layers), 1), max(len(allocated.roles), 1)
    figure = Figure(figsize=(4.5 + 0.5 * columns, 2.5 + 0.4 * rows), layout="constrained", dpi=130)
    ratios = {"width_ratios": [columns, 3.5], "height_ratios": [2.5, rows]}
    (above, corner), (middle, beside) = figure.subplots(2, 2, sharex="col", sharey="row", gridspec_kw=ratios)
    corner.remove()
    plot_allocation(middle, allocated, "")
    middle.set_title("")
    share = 100.0 * allocated.share()
    layers = above.bar(range(len(allocated.layers)), share.sum(0).numpy(), color="tab:blue", width=0.7)
    roles = beside.barh(range(len(allocated.roles)), share.sum(1).numpy(), color="tab:blue", height=0.7)
    for axes, bars, side in ((above, layers, "bottom"), (beside, roles, "left")):
        axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        axes.spines[:].set_visible(False)
        axes.spines[side].set_visible(True)
        axes.tick_params(length=0, labelleft=False, labelbottom=False)
    above.margins(y=0.2)
    beside.margins(x=0.25)
    figure.suptitle(f"{title}: % of {int(allocated.active.sum()):,} changed entries", fontsize=11)
    _save(figure, Path(path))
