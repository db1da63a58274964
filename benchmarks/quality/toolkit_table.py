"""The table of ID3AdamW beside the method's own toolkit, from `python -m benchmarks toolkit`."""

from __future__ import annotations

from benchmarks.render import table

TITLE = "Beside the method's own toolkit"
NOTHING = "It has not been run yet: `python -m benchmarks toolkit` does."
SAME = 0.999  # of the active set's entries: the same set
_ABOUT = """Scores on {task} ({metric}, %) after {steps} steps with {budget:,} entries, a learning rate of
{lr:g}, ε = {eps:g} and exp = {exp:g}; the same head, batches and dropout, no clipping; each score is of its
own run. `shared`: the part of ID3AdamW's active entries that the toolkit's set has too, after a quarter, half
and all of the steps; `same until`: the last step up to which {same:.1%} or more are shared. Rounding may part
the runs: the toolkit's step is torch's default AdamW."""
_CHOICES = """At equal weights, gradients and masks ({n} steps of seed {seed}) {differing} of {chosen:,}
entries differ{surplus}. {versions}."""


def same_until(shared: list[float]) -> int:
    """The last step up to which the sets are the same but for a thousandth."""
    return next((step for step, share in enumerate(shared) if share < SAME), len(shared))


def toolkit_table(report: dict | None) -> str:
    """A row for each seed, and what the choices at equal weights came to."""
    if report is None:
        return NOTHING
    header = ["seed", "ID3AdamW", "the toolkit", "shared at 1/4", "at 1/2", "at the end", "same until"]
    lines = []
    for run in report["runs"]:
        shared = run["shared"]
        at = [shared[len(shared) // 4 - 1], shared[len(shared) // 2 - 1], shared[-1]]
        scores = [f"{100 * run[kind]:.2f}" for kind in ("id3", "toolkit")]
        lines.append([str(run["seed"]), *scores, *(f"{s:.2%}" for s in at), str(same_until(shared))])
    about = _ABOUT.format(**report, same=SAME)
    chosen = [_choices(run, report) for run in report["runs"] if run["choices"]]
    return "\n\n".join([table(header, lines), about, *chosen])


def _choices(run: dict, report: dict) -> str:
    choices = run["choices"]
    surplus = sum(choice["surplus"] for choice in choices)
    return _CHOICES.format(
        n=len(choices),
        seed=run["seed"],
        differing=sum(choice["differing"] for choice in choices),
        chosen=report["budget"],
        surplus=f"; the toolkit chose {surplus} more than the schedule has" if surplus else "",
        versions=report["versions"],
    )
