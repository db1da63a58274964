"""README's table and docs/evidence.md from the results of the grids; every cell that has none is named."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from benchmarks.quality.causal_table import causal_table
from benchmarks.quality.guide import GUIDE, MARKERS, guide_block, scores_table, shorter, undecided
from benchmarks.quality.parts import PARTS
from benchmarks.quality.rows import Reports, chosen_by_loss, read, row_of
from benchmarks.quality.time_table import time_table
from benchmarks.quality.toolkit_table import TITLE, toolkit_table
from benchmarks.render import README, RESULTS, ROOT, WIDTH, Markers, replace_block, table
from id3_optim.cli import budget
from id3_optim.cli.compare.statistics import Paired, paired

QUALITY: Markers = ("<!-- quality:begin -->", "<!-- quality:end -->")
QUALITY_RESULTS = RESULTS / "quality"
EVIDENCE = ROOT / "docs" / "evidence.md"
ROOM = 0.05  # a task counts where full fine-tuning is so much better than the head alone
# Table 1 of the paper: DeBERTa-v3-base, 320K entries (0.17 %), in per cent.
PAPER = {
    "full": {"cola": 71.43, "mrpc": 89.95, "sst2": 96.33},
    "random": {"cola": 66.19, "mrpc": 86.11, "sst2": 95.30},
    "fish": {"cola": 69.79, "mrpc": 90.69, "sst2": 95.60},
    "pafi": {"cola": 68.91, "mrpc": 90.52, "sst2": 96.14},
    "id3": {"cola": 72.07, "mrpc": 91.26, "sst2": 95.95},
}
NOTHING = "The main grid has not been run yet, so no score is shown: `python -m benchmarks quality` runs it."


def budgets_of(part: str) -> list[float]:
    return [budget(text) for text in PARTS[part].budgets]


def is_whole(part: str, row: dict | None) -> bool:
    """Whether all seeds of a cell have ended, with a finite loss or not."""
    return row is not None and len(row["scores"]) + row["diverged"] >= PARTS[part].seeds


def room(reports: Reports, task: str) -> float | None:
    """By how much full fine-tuning is better than the head alone, both tuned; None where one has no score."""
    rows = [row_of(reports, "main", task, method, None) for method in ("full", "head")]
    means = [row and row["mean"] for row in rows]
    return None if None in means else means[0] - means[1]


def with_room(reports: Reports, part: str) -> list[str]:
    """The part's tasks that count; all of them while their room is not known."""
    return [task for task in PARTS[part].tasks if (known := room(reports, task)) is None or known >= ROOM]


def opposite(reports: Reports, part: str, method: str, budget: float) -> bool:
    """Whether a method is better than ID3 on one task and worse on another, by more than what is equal."""
    each = [versus(reports, part, method, budget, [task]) for task in with_room(reports, part)]
    clear = [found.mean > 0 for found in each if found is not None and not _equal(found)]
    return len(set(clear)) > 1


def versus(
    reports: Reports, part: str, method: str, budget: float, tasks: list[str] | None = None
) -> Paired | None:
    """A method's paired differences to ID3, over the seeds that both have, of `tasks` or all with room."""
    scores: list[dict] = [{}, {}]
    for task in with_room(reports, part) if tasks is None else tasks:
        for found, name in zip(scores, (method, "id3"), strict=True):
            row = row_of(reports, part, task, name, budget)
            found.update({(task, seed): value for seed, value in (row["scores"] if row else {}).items()})
    return paired(*scores)


def part_table(reports: Reports, part: str, budget: float) -> str:
    """Mean ± standard deviation by method and task, in per cent; then all tasks together against ID3.

    Methods and tasks without a score have no row and no column.
    """
    every = {
        (t, m): row_of(reports, part, t, m, budget) for t in PARTS[part].tasks for m in PARTS[part].methods
    }
    tasks = [task for task in PARTS[part].tasks if any(every[task, m] for m in PARTS[part].methods)]
    header = ["method", *tasks, "mean", "− id3", "p", "won/lost/tied"]
    lines = []
    for method in (m for m in PARTS[part].methods if any(every[task, m] for task in tasks)):
        rows = {task: every[task, method] for task in tasks}
        counted = [rows[task] for task in with_room(reports, part) if task in tasks]
        means = [row and row["mean"] for row in counted]
        mean = "–" if None in means or not means else f"{100 * fmean(means):.2f}"
        against = ["", "", ""]
        if method != "id3" and (difference := versus(reports, part, method, budget)) is not None:
            against = _against(difference, opposite(reports, part, method, budget))
        lines.append([method, *(_cell(part, row) for row in rows.values()), mean, *against])
    return table(header, lines)


def _cell(part: str, row: dict | None) -> str:
    if row is None:
        return "–"
    if row["mean"] is None or row["diverged"]:
        return f"{row['diverged']} diverged"
    sd = "" if row["sd"] is None else f" ± {100 * row['sd']:.2f}"
    count = "" if is_whole(part, row) else f" ({len(row['scores'])} of {PARTS[part].seeds})"
    return f"{100 * row['mean']:.2f}{sd}{'*' if row['at_edge'] else ''}{count}"


def _against(difference: Paired, mixed: bool) -> list[str]:
    said = " (opposite)" if mixed else " (equal)" if _equal(difference) else ""
    p = "" if difference.p is None else f"{difference.p:.3f}"
    counts = f"{difference.wins}/{difference.losses}/{difference.ties}"
    return [f"{100 * difference.mean:+.2f}{said}", p, counts]


def _equal(difference: Paired) -> bool:
    error = difference.standard_error
    return error is not None and abs(difference.mean) <= 2 * error


def empty(reports: Reports, part: str) -> Iterator[str]:
    """The cells without all their runs, by name: `fish on cola at 0.05 %`."""
    for task in PARTS[part].tasks:
        for share in budgets_of(part):
            for method in PARTS[part].methods:
                if not is_whole(part, row_of(reports, part, task, method, share)):
                    yield f"{method} on {task} at {100 * share:.3g} %"


def named(reports: Reports, part: str) -> str:
    """The cells without all their runs, by task and budget."""
    missing = list(empty(reports, part))
    if not missing:
        return "Every cell has all its runs."
    lines = []
    for task in PARTS[part].tasks:
        for share in budgets_of(part):
            end = f" on {task} at {100 * share:.3g} %"
            methods = [cell.removesuffix(end) for cell in missing if cell.endswith(end)]
            every = len(methods) == len(PARTS[part].methods)
            lines += [f"{'every method' if every else ', '.join(methods)}{end}"] if methods else []
    return f"Cells without all their runs: {'; '.join(lines)}."


MARKS = (
    "Scores on the development sets in per cent (CoLA: Matthews' correlation, else accuracy), mean ±\n"
    "standard deviation over seeds; –: not run; \\*: the best learning rate is at the edge of its grid.\n"
    "Against ID3: the mean difference by task and seed with p of an exact Wilcoxon signed-rank test;\n"
    "(equal): no more than two standard errors; (opposite): better on one task and worse on another, each\n"
    "by more than that. Of three pairs the smallest p is 0.25, of six 0.031: it says little of few seeds.\n"
    "The mean over tasks adds points of correlation and of accuracy. A task whose room is not known counts\n"
    "until it is."
)


def readme_block(reports: Reports) -> str:
    """The scores that there are, or that there are none."""
    if not any(part == "main" for part, _ in reports):
        return NOTHING
    about = (
        f"MiniLM-L6, {100 * budgets_of('main')[0]:.3g} % of the entries and 1000 steps where nothing else is "
        "said, every method tuned alike; mean ± standard deviation on the development set. Much of the grid "
        "has not been run: [Evidence](docs/evidence.md) names it."
    )
    texts = [textwrap.fill(text, WIDTH) for text in (about, *undecided(reports), *shorter(reports))]
    return "\n\n".join([scores_table(reports), *texts])


def page(reports: Reports) -> str:
    """The whole of docs/evidence.md."""
    compared = [report for (part, _), report in reports.items() if part == "toolkit"]
    toolkit = [f"## {TITLE}", *map(toolkit_table, compared or [None])]
    sections = [_INTRODUCTION, *(_part(reports, part) for part in PARTS), *toolkit, _paper(reports)]
    return "\n\n".join(sections) + "\n"


_INTRODUCTION = f"""# Evidence

Which method pays, at which budget and learning rate. This page is generated from
`benchmarks/results/quality`; [Benchmarks](benchmarks.md) has times and memory. To run or to go on with the
grids:

```bash
python -m benchmarks quality --model MINILM --data FOLDER
python -m benchmarks quality --export
```

The folder has CoLA, MRPC and SST-2 as GLUE's files and `math/gsm8k.train.jsonl`; banking77 is part of this
project. Stop the first command at any moment: it goes on where it was, on another machine from the committed
JSON. The second writes what has ended so far.

**How.** All methods run through [`id3-optim compare`](guide/command-line.md#compare): the same batches
(rows of similar length in one, in random order), steps and schedule of the learning rate, and as many
learning rates for each; classifiers pool by the mean. Successive halving chooses the learning rate on one
seed and on a tenth of the training rows, which tuning does not train on. The final runs train on all of them.
A task counts where full fine-tuning is {100 * ROOM:.0f} points or more better than the head alone.

{MARKS}"""


def _part(reports: Reports, part: str) -> str:
    lines = [f"## {PARTS[part].about}"]
    present = [task for task in PARTS[part].tasks if (part, task) in reports]
    if part == "main":
        lines += [_rooms(reports)]
    if present and (PARTS[part].causal or PARTS[part].timed):
        own_table = causal_table if PARTS[part].causal else time_table
        lines += [own_table(reports[part, task]) for task in present]
        lines += [_how(reports, part, present)]
    elif present:
        for budget in budgets_of(part):
            if any(row["scores"] for task in present for row in _rows_at(reports[part, task], budget)):
                lines += [f"{100 * budget:.3g} % of the entries:", part_table(reports, part, budget)]
        lines += [_how(reports, part, present)]
    return "\n\n".join([*lines, named(reports, part)])


def _rows_at(report: dict, budget: float) -> list[dict]:
    return [row for row in report["rows"] if row["budget"] in (budget, None)]


def _rooms(reports: Reports) -> str:
    rooms = {task: room(reports, task) for task in PARTS["main"].tasks}
    shown = {t: "not known" if r is None else f"{100 * r:+.1f} points" for t, r in rooms.items()}
    return "Room, full fine-tuning against the head alone: " + ", ".join(
        f"{task} {text}{'' if rooms[task] is None or rooms[task] >= ROOM else ' (does not count)'}"
        for task, text in shown.items()
    )


def _how(reports: Reports, part: str, tasks: list[str]) -> str:
    """Steps, chosen learning rates and versions of the runs."""
    lines = []
    for task in tasks:
        report = reports[part, task]
        rates = [f"{row['method']} {row['lr']:.2g}" for row in report["rows"] if row["lr"] is not None]
        subset = report.get("rows_subset") and f" on {report['rows_subset']:,} of its training rows"
        tied = ", ".join(chosen_by_loss(report))
        loss = f" The loss decided a round of tuning, in which all runs scored alike, of {tied}." * bool(tied)
        how = f"tuned with {report['tune_steps']}" if PARTS[part].tuned else "not tuned"
        versions = sorted({run["versions"] for run in report["runs"] if run.get("versions")})
        lines.append(
            f"- {task}: {report['steps']} steps{subset or ''}, {how}; "
            f"{'; '.join(versions)}. Learning rates: {', '.join(rates) or 'none chosen yet'}.{loss}"
        )
    return "\n".join(lines)


def _paper(reports: Reports) -> str:
    """The paper's table beside this one: another model, so orders are comparable and scores are not."""
    budget, tasks = budgets_of("main")[0], ("cola", "mrpc", "sst2")
    lines = []
    for method, scores in PAPER.items():
        ours = [_cell("main", row_of(reports, "main", task, method, budget)) for task in tasks]
        lines.append([method, *(f"{scores[task]:.2f}" for task in tasks), *ours])
    header = ["method", *(f"{task}, paper" for task in tasks), *(f"{task}, here" for task in tasks)]
    about = (
        "Table 1 of the paper has DeBERTa-v3-base with 320K entries (0.17 %) and many more steps: scores "
        "cannot be compared, and the order of methods changes with the number of steps here, too."
    )
    return "\n\n".join(["## Beside the paper", about, table(header, lines)])


def write_pages(
    folder: Path = QUALITY_RESULTS, readme: Path = README, evidence: Path = EVIDENCE, guide: Path = GUIDE
) -> None:
    """Writes README's block, that of the guide, and the page from the results in a folder."""
    reports = read(folder)
    replace_block(readme, QUALITY, readme_block(reports))
    replace_block(guide, MARKERS, guide_block(reports))
    evidence.write_text(page(reports))
