"""The parser of `id3-optim`, and the command train.

An error ends in one line on stderr and an exit status (`failures.run`); `--debug` shows the traceback.
"""

import argparse
import difflib
import re
from pathlib import Path
from typing import NoReturn

from ..extras import require
from ..methods import default_rate
from ..plots import save_plots
from ..ranks import writes_files
from . import failures, processes
from .compare.command import add_compare
from .completion import actions, add_completion
from .delta import add_delta_commands
from .env import run_env, version_of
from .estimate import add_estimate
from .models import quiet_transformers
from .options import add_train, budget
from .output import check_paths, first_prints
from .report import table, write_report
from .settings import Settings, check_settings


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as the commands' errors are, and name what was probably meant."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"(?:unrecognized arguments: |invalid choice: ')([\w-]+)", message)
        known = [
            word for action in actions(self) for word in (*action.option_strings, *(action.choices or ()))
        ]
        near = difflib.get_close_matches(found[1], map(str, known), 1) if found else []
        hint = f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: error: {message}{hint} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; each command sets `run`, a function of the parsed arguments."""
    whole = Parser(prog="id3-optim", description="Selective fine-tuning by step-by-step unmasking.")
    whole.add_argument("--debug", action="store_true", help="show the traceback of an error")
    version = f"%(prog)s {version_of('id3-optim')}"
    whole.add_argument("--version", action="version", version=version, help="print the version")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    train = commands.add_parser("train", help="fine-tune a model")
    train.set_defaults(run=run_train)
    add_train(train)
    add_compare(commands)
    add_delta_commands(commands)
    add_estimate(commands, budget)
    env = commands.add_parser("env", help="versions, and which backends can run here")
    env.set_defaults(run=run_env)
    add_completion(commands, whole)
    return whole


def run_train(arguments: argparse.Namespace) -> None:
    """Trains, writes what the options name and prints the main numbers."""
    require("transformers", "accelerate", extra="hf")
    if arguments.save_plots:
        require("matplotlib", extra="plot")
    names = Settings.__dataclass_fields__
    options = {name: value for name, value in vars(arguments).items() if name in names}
    options |= {name: tuple(options[name]) for name in ("text_column", "save_at", "report_to", "leave_out")}
    if options["lr"] is None:
        options["lr"] = default_rate(options["method"])
    settings = Settings(**options)
    check_settings(settings)
    check_paths(settings)
    quiet_transformers()
    with first_prints():
        _train(settings)


def _train(settings: Settings) -> None:
    # transformers is optional and takes seconds to import: only the commands that need it do.
    from ..estimate import memory_table
    from .train import train

    report, start, optimizer = train(settings)
    if settings.save_plots:
        path = Path(settings.output) / "plots.png"
        save_plots(path, {"loss": report["history"]}, start.model, optimizer)
    if settings.report and writes_files():
        write_report(settings.report, report)
    print(table(report))
    if settings.memory_report:
        print(memory_table(report["memory"]))
    print(f"written to {settings.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status of `failures.run`, and 2 for arguments that do not parse.

    argv: the words after the program's name; None: those of the process.
    """
    return failures.run(parser().parse_args(argv))


def command(argv: list[str] | None = None) -> int:
    """What the process `id3-optim` does: `main`, then the end of its part in what a launcher started."""
    status = main(argv)
    processes.leave(status)
    return status
