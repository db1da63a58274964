"""The table of README and docs/guide/budgets.md: what the evidence has for the choice of a method."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from statistics import fmean

from benchmarks.quality.parts import MAIN_BUDGET, RECIPE
from benchmarks.quality.rows import Reports, chosen_by_loss, row_of
from benchmarks.render import ROOT, WIDTH, Markers, table
from id3_optim.cli import budget

GUIDE = ROOT / "docs" / "guide" / "budgets.md"
MARKERS: Markers = ("<!-- quality:begin -->", "<!-- quality:end -->")
NOTHING = "Nothing has been measured yet."
_FRONT_LOADED = "id3:schedule=front-loaded:0.1,leave_out=embeddings,head_lr=0.008"
_CAUSAL_WORDS = {
    "full": "full fine-tuning",
    "random": "random mask",
    "id3": "ID3",
    "fish": "Fish mask",
    "lora": "LoRA of {:,.0f} entries",
}
# (part, method, budget): what the guide calls it.
_SHOWN = {
    ("main", "full", MAIN_BUDGET): "full fine-tuning",
    ("longer", "full", MAIN_BUDGET): "full fine-tuning, 2000 steps",
    ("budgets", RECIPE, "1%"): "random mask outside the embeddings, of 1 %",
    ("main", RECIPE, MAIN_BUDGET): "random mask outside the embeddings",
    ("longer", RECIPE, MAIN_BUDGET): "that mask, 2000 steps",
    ("main", "random", MAIN_BUDGET): "random mask",
    ("main", "lora", MAIN_BUDGET): "LoRA with as many entries, rank 4 on query and value",
    ("longer", "lora", MAIN_BUDGET): "that LoRA, 2000 steps",
    ("main", "fish", MAIN_BUDGET): "Fish mask",
    (
        "why",
        _FRONT_LOADED,
        MAIN_BUDGET,
    ): "ID3 outside the embeddings, its budget spent in a tenth of the run, a head with a rate of its own",
    ("main", "id3", MAIN_BUDGET): "ID3, the paper's settings",
    ("longer", "id3", MAIN_BUDGET): "ID3, the paper's settings, 2000 steps",
    ("main", "head", MAIN_BUDGET): "the new head alone",
}


def scores_table(reports: Reports) -> str:
    """A row for each method that has scores, with its tuned learning rate, by task; empty without any."""
    tasks, lines = _tasks(reports), []
    for (part, method, share), words in _SHOWN.items():
        rows = [_scored(row_of(reports, part, task, method, budget(share))) for task in tasks]
        if any(rows):
            lines.append([words, *(cell for row in rows for cell in _cells(row))])
    header = ["trained", *(column for task in tasks for column in (f"{task}, %", "at rate"))]
    return table(header, lines) if lines else ""


def _tasks(reports: Reports) -> list[str]:
    return sorted({task for part, task in reports if part == "main"})


def guide_block(reports: Reports) -> str:
    """The scores, where ID3's entries lay, and what is not tuned."""
    scores = scores_table(reports)
    if not scores:
        return NOTHING
    texts = [_allocation(reports["main", task], task) for task in _tasks(reports)]
    texts += [*undecided(reports), *shorter(reports)]
    parts = {task: part for part in ("recipe", "untuned") for name, task in reports if name == part}
    texts += [_untuned(reports[part, task], task) for task, part in sorted(parts.items())]
    texts += [causal(report, task) for (part, task), report in reports.items() if part == "causal"]
    return "\n\n".join([scores, *(textwrap.fill(text, WIDTH) for text in texts)])


def undecided(reports: Reports) -> Iterator[str]:
    """For each task, the methods whose rates the loss has helped to choose, since no scores differ."""
    for task in _tasks(reports):
        tied = chosen_by_loss(reports["main", task])
        names = [words for (part, method, _), words in _SHOWN.items() if part == "main" and method in tied]
        if names:
            yield (
                f"On {task} the loss decided a round of tuning, in which all runs scored alike, of these: "
                f"{'; '.join(names)}."
            )


def shorter(reports: Reports) -> Iterator[str]:
    """The methods that were tuned by shorter runs than the main part's on the same task."""
    for (part, method, share), words in _SHOWN.items():
        for task in _tasks(reports):
            row, main = row_of(reports, part, task, method, budget(share)), reports["main", task]
            if _scored(row) and (steps := reports[part, task]["tune_steps"]) < main["tune_steps"]:
                yield (
                    f"Tuned on {task} by runs of {steps} steps, where the main part's methods were tuned by "
                    f"{main['tune_steps']}: {words}."
                )


def _untuned(report: dict, task: str) -> str:
    """What each method reaches on a task where its learning rate is a default."""
    words = {method: text for (part, method, _), text in _SHOWN.items() if part == "main"}
    words |= {"id3": "ID3 with the paper's settings", RECIPE: "the recipe"}
    scored = sorted((row for row in report["rows"] if row["scores"]), key=lambda row: -(row["mean"] or 0.0))
    rows = [(row, words.get(row["method"], row["method"])) for row in scored]
    found = [f"{whose} {_cells(row)[0]}, at {_cells(row)[1]}" for row, whose in rows]
    return f"Not tuned, on {task} ({report['metric']}, %): {'; '.join(found)}."


def causal(report: dict, task: str) -> str:
    """What each method reaches and forgets, the best loss first."""
    rows = [row for row in report["rows"] if row.get("forgotten") is not None]
    found = [
        f"{_CAUSAL_WORDS[row['method']].format(row['entries'])} {row['mean']:.2f}, {row['forgotten']:+.2f}, "
        f"at {_cells(row)[1]}"
        for row in sorted(rows, key=lambda row: row["mean"])
    ]
    budgets = {f"{100 * row['budget']:.2g} %" for row in report["rows"] if row["budget"]}
    return (
        f"A causal model of {report['base']['entries']:,} entries, {report['steps']} steps of {task}, a "
        f"budget of {' and '.join(sorted(budgets))} of them, rates tuned by the loss on {task} alone. "
        "The loss of a token, and by how much that on texts of the kind it was made from has grown: "
        f"{'; '.join(found) or 'not measured yet'}."
    )


def _scored(row: dict | None) -> dict | None:
    return row if row and row["scores"] else None


def _cells(row: dict | None) -> tuple[str, str]:
    if row is None:
        return "–", "–"
    sd = "" if row["sd"] is None else f" ± {100 * row['sd']:.1f}"
    rate = f"{row['lr']:.2g}{' (edge)' if row['at_edge'] else ''}"
    if row["diverged"]:
        return f"{row['diverged']} diverged", rate
    return f"{100 * row['mean']:.1f}{sd} ({len(row['scores'])} seeds)", rate


def _allocation(report: dict, task: str) -> str:
    """How much of ID3's budget the embeddings got."""
    maps = [
        run["allocation"]
        for run in report["runs"]
        if run["method"] == "id3" and not run["tuning"] and "allocation" in run
    ]
    if not maps:
        return f"On {task} it is not recorded where ID3's entries lay."
    shares = [sum(found["active"][found["roles"].index("embeddings")]) for found in maps]
    totals = [sum(map(sum, found["active"])) for found in maps]
    share = fmean(part / whole for part, whole in zip(shares, totals, strict=True))
    whose = "the entries that ID3 chose with the paper's settings"
    return f"On {task}, {100 * share:.0f} % of {whose} lay in embeddings."
