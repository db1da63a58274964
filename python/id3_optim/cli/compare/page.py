"""The page of a comparison: one HTML file that opens without a network, plotly.js within it."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from . import curves, maps
from .grid import Plan, Results
from .looks import colour
from .maps import ActiveOf
from .summary import notes, table


@dataclass(frozen=True)
class Section:
    """A figure: its heading, what it shows, and the function that draws it."""

    heading: str
    caption: str
    draw: Callable[[Plan, Results, ActiveOf], go.Figure]


def _of_results(draw: Callable[[Plan, Results], go.Figure]) -> Callable[..., go.Figure]:
    """A drawing that needs no active sets."""
    return lambda plan, results, active: draw(plan, results)


def _logged(name: str, title: str, logarithmic: bool = False) -> Callable[..., go.Figure]:
    return lambda plan, results, active: curves.along_training(plan, results, name, title, logarithmic)


SECTIONS = {
    "score-budget": Section(
        "Score against budget",
        "Mean over seeds; bars: one standard deviation. Methods without a budget are levels.",
        _of_results(curves.score_against_budget),
    ),
    "score-entries": Section(
        "Score against entries updated",
        "Along the runs, the mean over seeds (paper, figure 5): what --eval-every measures, and the end.",
        _of_results(curves.score_against_entries),
    ),
    "learning-curves": Section(
        "Learning curves",
        "Training loss, the mean over seeds.",
        _logged("loss", "training loss"),
    ),
    "learning-rates": Section(
        "Learning rates",
        "What tuning saw: one seed, rows kept aside from training. Pale: the shorter rungs.",
        _of_results(curves.learning_rates),
    ),
    "time": Section(
        "Time of a step",
        "Means of the final runs. On a GPU the phases are not told apart.",
        _of_results(curves.cost),
    ),
    "memory": Section(
        "Memory",
        "What the optimizer keeps between steps; on a GPU also the run's peak.",
        _of_results(curves.memory),
    ),
    "allocation": Section(
        "Where the budget went",
        "Per cent of the active entries by role and layer at the end (figure 7), the mean over seeds.",
        _of_results(maps.allocation),
    ),
    "tensor-sparsity": Section(
        "Tensor sparsity",
        "The share of tensors without an active entry, along training (figure 8).",
        _logged("tensor_sparsity", "tensor sparsity"),
    ),
    "entropy": Section(
        "Sparsity entropy",
        "How evenly the active entries spread over the tensors, along training (figure 9).",
        _logged("sparsity_entropy", "sparsity entropy, nats"),
    ),
    "overlap": Section(
        "Shared entries",
        "Per cent of the smaller run's entries that both runs trained, at the largest budget.",
        maps.overlap,
    ),
    "thresholds": Section(
        "Thresholds",
        "The smallest score that joined in a selection, along training.",
        _logged("threshold", "smallest score that joined", logarithmic=True),
    ),
    "eps-exp": Section(
        "Effect of ε and exp",
        "Mean score of ID3 with other settings of D3 (figure 4), at the largest budget.",
        _of_results(maps.eps_and_exp),
    ),
}

_STYLE = """
:root { color-scheme: light; font-family: system-ui, sans-serif; line-height: 1.45; color: #1b1f24; }
body { margin: 0 auto; max-width: 72rem; padding: 0 1rem 3rem; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
p, li { color: #4a5159; margin: .2rem 0; }
nav, fieldset { display: flex; flex-wrap: wrap; gap: .3rem 1rem; border: 0; padding: .4rem 0; margin: 0; }
nav a { color: #0b57d0; } label { padding: .35rem 0; } legend { color: #4a5159; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #e3e6ea; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.plot { width: 100%; min-height: 440px; }
"""

_SCRIPT = """
for (const [name, figure] of Object.entries(FIGURES)) {
  Plotly.newPlot(name, figure.data, figure.layout, {responsive: true, displaylogo: false});
}
document.querySelectorAll('input[data-method]').forEach(box => box.addEventListener('change', () => {
  for (const name of Object.keys(FIGURES)) {
    const plot = document.getElementById(name);
    const traces = [...plot.data.keys()].filter(i => plot.data[i].meta === box.dataset.method);
    if (traces.length) Plotly.restyle(name, {visible: box.checked}, traces);
  }
}));
"""
# No request can leave the page, whatever a library inside it tries.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page(plan: Plan, results: Results, active_of: ActiveOf, names: list[str] | None = None) -> str:
    """The page. active_of: a run's trained entries. names: of SECTIONS; None: all that have data.

    Raises ValueError for a name that there is not, and for a figure by name that has no data.
    """
    for name in names or ():
        if name not in SECTIONS:
            raise ValueError(f"--figure: expected names of {', '.join(SECTIONS)}, got {name}")
    drawn = {name: SECTIONS[name].draw(plan, results, active_of) for name in names or SECTIONS}
    for name in names or ():
        if not drawn[name].data:
            raise ValueError(f"--figure: expected a figure of which the results have data, got {name}")
    return _html(plan, results, {name: figure for name, figure in drawn.items() if figure.data})


def _html(plan: Plan, results: Results, drawn: dict[str, go.Figure]) -> str:
    figures = json.dumps({name: json.loads(figure.to_json()) for name, figure in drawn.items()})
    figures = figures.replace("</", "<\\/")  # no text in them ends the script
    links = "".join(f'<a href="#{name}-section">{SECTIONS[name].heading}</a>' for name in drawn)
    sections = "".join(_section(name) for name in drawn)
    boxes = "".join(_box(plan, method.name) for method in plan.methods)
    lines = "".join(f"<p>{html.escape(note)}</p>" for note in notes(plan, results))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{html.escape(_title(plan))}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(_title(plan))}</h1>
<div class="scroll">{_table(plan, results)}</div>{lines}
<nav aria-label="figures">{links}</nav>
<fieldset><legend>Show</legend>{boxes}</fieldset>
{sections}
<script>{get_plotlyjs()}</script>
<script>const FIGURES = {figures};{_SCRIPT}</script>
</body></html>
"""


def _title(plan: Plan) -> str:
    return f"{len(plan.methods)} methods, {len(plan.seeds)} seeds, {plan.settings.steps} steps"


def _section(name: str) -> str:
    section = SECTIONS[name]
    heading = f'<h2 id="{name}-section">{section.heading}</h2><p>{section.caption}</p>'
    return f'<section>{heading}<div class="plot" id="{name}"></div></section>\n'


def _box(plan: Plan, method: str) -> str:
    name = html.escape(method, quote=True)
    mark = f'<span style="color:{colour(plan, method)}">●</span>'
    return f'<label><input type="checkbox" checked data-method="{name}"> {mark} {name}</label>'


def _table(plan: Plan, results: Results) -> str:
    header, *lines = ([html.escape(cell) for cell in line] for line in table(plan, results))
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
