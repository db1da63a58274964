"""The commands `id3-optim compare` and `id3-optim plot`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ...extras import require
from ..options import add_batches, add_data, adder, budget
from ..output import check_writable, write_text
from ..settings import Settings, check_settings, option
from .grid import Plan, possible, settings_of
from .methods import read_method, read_rates
from .store import Store


def add_compare(commands) -> None:
    """Adds `compare` and `plot` to the subparsers of `id3-optim`."""
    about = "train by several methods, budgets, learning rates and seeds, and compare them"
    compare = commands.add_parser("compare", help=about, description=about)
    compare.set_defaults(run=run_compare)
    add_data(compare.add_argument_group("data"))
    _add_results(compare.add_argument_group("model and results"))
    _add_grid(compare.add_argument_group("grid"))
    add_batches(compare.add_argument_group("how"))
    about = "draw the results of compare as a page that opens without a network"
    plot = commands.add_parser("plot", help=about, description=about)
    plot.set_defaults(run=run_plot)
    plot.add_argument("results", help="the file of compare --results")
    plot.add_argument("--output", required=True, metavar="HTML", help="the page to write")
    about = "only these, by the names that the page's links show (default: all)"
    plot.add_argument("--figure", nargs="+", metavar="NAME", help=about)


def _add_results(group) -> None:
    add = adder(group)
    add("--model", required=True, help="local directory or hub name")
    add("--results", required=True, metavar="FILE", help="SQLite; runs that it has are not run again")
    add("--page", metavar="HTML", help="also draw the results (needs the extra plot)")
    add("--report", metavar="JSON", help="also write the table and every run's numbers")


def _add_grid(group) -> None:
    add = adder(group)
    about = "each NAME or NAME:SETTING=VALUE,… with settings of train; names: those of id3_optim.methods"
    add("--methods", nargs="+", type=read_method, required=True, metavar="METHOD", help=about)
    add("--budgets", nargs="+", type=budget, default=[0.005], metavar="BUDGET", help="entries or shares")
    about = "learning rates to tune over; 1e-4:1.6e-3 doubles from the first to the second"
    add("--lr", nargs="+", type=read_rates, default=[(1e-3,)], metavar="LR", help=about)
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="N", help="the first one tunes too")
    add("--steps", type=int, default=1000, help="optimizer steps of a run")
    add("--tune-steps", type=int, help="of the longest runs that tune (default: half of --steps)")
    add("--held-out", type=float, default=0.1, help="share of the training rows that tuning measures on")
    add("--metric", help="orders the runs (default: accuracy, pearson, f1 or token_loss, by the task)")
    add("--against", metavar="METHOD", help="what all are compared with (default: the first method)")
    add("--jobs", type=int, default=1, help="runs at a time, each in its own process")
    add("--threads", type=int, help="of each run (default: as before, at first the cores divided by --jobs)")


def run_compare(arguments: argparse.Namespace) -> None:
    """Runs what is missing of the grid, then writes and prints its results."""
    require("transformers", "accelerate", extra="hf")
    if arguments.page:
        require("plotly", extra="plot")
    settings = _settings(arguments)
    check_settings(settings)
    _check_grid(arguments)
    _check_targets(arguments, ("page", "report"))
    from ..models import quiet_transformers  # transformers takes seconds to import
    from ..report import write_report
    from .running import plan_of, run_missing
    from .summary import exported, text

    quiet_transformers()
    with Store(arguments.results) as store:
        plan, task = plan_of(arguments, settings, store)
        for trial in possible(plan):
            check_settings(settings_of(plan, trial))
        store.remember(plan)
        results = run_missing(plan, task, store, arguments.jobs)
        if arguments.report:
            write_report(arguments.report, exported(plan, results))
        if arguments.page:
            _write_page(arguments.page, store, plan)
    print(text(plan, results))


def run_plot(arguments: argparse.Namespace) -> None:
    """Draws the newest grid of a file, with the runs that have ended so far."""
    require("plotly", extra="plot")
    _check_targets(arguments, ("output",))
    with Store(arguments.results, create=False) as store:
        _write_page(arguments.output, store, store.plan(), arguments.figure)
    print(f"written to {arguments.output}")


def _write_page(path: str, store: Store, plan: Plan, names: list[str] | None = None) -> None:
    from .page import page  # needs plotly

    write_text(path, page(plan, store.results(plan), lambda trial: store.active(plan, trial), names))


def _settings(arguments: argparse.Namespace) -> Settings:
    """What all runs share; methods, budgets, learning rates and seeds replace the rest."""
    names = Settings.__dataclass_fields__.keys() - {"lr", "report"}
    options = {name: value for name, value in vars(arguments).items() if name in names}
    return Settings(**options | {"text_column": tuple(arguments.text_column), "output": ""})


def _check_grid(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a grid that names something twice, or treats methods unlike."""
    for name in ("methods", "budgets", "seeds"):
        values = [getattr(value, "name", value) for value in getattr(arguments, name)]
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"--{name}: expected each once, got {twice[0]} twice")
    for name in ("jobs", "threads", "tune_steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if not 0.0 < arguments.held_out < 1.0:
        raise ValueError(f"--held-out: expected a share between 0 and 1, got {arguments.held_out}")
    shared = [rate for rates in arguments.lr for rate in rates]
    if len(set(shared)) < len(shared):
        raise ValueError(f"--lr: expected each once, got {', '.join(map(str, shared))}")
    counts = {method.name: len(method.rates or shared) for method in arguments.methods}
    if len(set(counts.values())) > 1:
        got = ", ".join(f"{n} for {name}" for name, n in counts.items())
        raise ValueError(f"--methods: expected as many learning rates for each method, got {got}")
    if arguments.against is not None and arguments.against not in counts:
        raise ValueError(f"--against: expected one of {', '.join(counts)}, got {arguments.against}")


def _check_targets(arguments: argparse.Namespace, names: tuple[str, ...]) -> None:
    """Raises ValueError or OSError for a file to write that is a folder, cannot be made, or is another of the
    command's files."""
    taken = {"the results": arguments.results}
    taken |= {option(name): getattr(arguments, name, None) for name in ("train", "eval", "also_eval")}
    for name in names:
        if (target := getattr(arguments, name)) is None:
            continue
        if not target or Path(target).is_dir():
            raise ValueError(f"{option(name)}: expected a file name, got {target!r}")
        for other, path in taken.items():
            if path and os.path.realpath(target) == os.path.realpath(path):
                raise ValueError(f"{option(name)}: expected another file than {other}, got {target}")
        check_writable(option(name), Path(target).parent)
        taken[option(name)] = target
