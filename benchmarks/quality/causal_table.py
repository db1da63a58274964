"""The table of a causal model: its loss on the new task, and how much worse it got on what it knew."""

from __future__ import annotations

from benchmarks.render import table
from id3_optim.cli.compare import summary
from id3_optim.cli.compare.statistics import spread

_ABOUT = """`entries`: trained; LoRA has the largest rank that the budget holds. `loss`: nats a token on rows
of the new task kept aside, mean ± standard deviation over seeds. `forgotten`: by how much the loss on
texts of the kind that the base was trained on has grown from the base's {before}. The base has {entries:,}
entries and {base_steps:,} steps behind it, a run {steps:,}. Rates were chosen by the loss on the new task
alone. \\*: the best one is at the edge of its grid."""


def causal_table(report: dict) -> str:
    """Smaller is better in both columns."""
    lines = []
    for row in report["rows"]:
        losses, kept = list(row["scores"].values()), forgotten(report, row)
        star = "*" if row["at_edge"] else ""
        diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        entries = "–" if row["entries"] is None else f"{row['entries']:,.0f}"
        lines.append([row["method"], entries, f"{_spread(losses)}{star}{diverged}", _spread(kept)])
    base = report["base"]
    about = _ABOUT.format(
        before=_before(report), entries=base["entries"], base_steps=base["steps"], steps=report["steps"]
    )
    return "\n\n".join([table(["method", "entries", "loss", "forgotten"], lines), about])


def _before(report: dict) -> str:
    """The base's loss on what it knows, as the final runs have measured it before their first step."""
    found = {run["metrics"].get("before_token_loss") for run in report["runs"] if run["metrics"]} - {None}
    return " and ".join(f"{loss:.3f}" for loss in sorted(found)) or "own"


def forgotten(report: dict, row: dict) -> list[float]:
    """By seed, of the runs that made the row's scores."""
    runs = (run for run in report["runs"] if not run["tuning"] and run["lr"] == row["lr"])
    own = (run["metrics"] for run in runs if (run["method"], run["budget"]) == (row["method"], row["budget"]))
    return [lost for metrics in own if (lost := summary.forgotten(report["metric"], metrics)) is not None]


def _spread(values: list[float]) -> str:
    found = spread(values)
    if found is None:
        return "–"
    return f"{found.mean:.3f}" + ("" if found.sd is None else f" ± {found.sd:.3f}")
