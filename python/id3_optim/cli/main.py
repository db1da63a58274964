"""The parser of `id3-optim`, and the command train.

A mistake in an argument or a file ends in one line on stderr and exit code 2; `--debug` shows the traceback.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import NoReturn

from ..extras import require
from ..plots import save_plots
from .delta import add_delta_commands
from .env import run_env
from .estimate import add_estimate
from .models import quiet_transformers
from .options import add_train, budget
from .output import check_paths, replacing
from .report import table, write_report
from .settings import Settings, check_settings, first_line

INTERRUPTED = 130  # the exit code of a shell for Ctrl-C


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as the commands' errors are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; each command sets `run`, a function of the parsed arguments."""
    whole = Parser(prog="id3-optim", description="Selective fine-tuning by step-by-step unmasking.")
    whole.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    train = commands.add_parser("train", help="fine-tune a model")
    train.set_defaults(run=run_train)
    add_train(train)
    add_delta_commands(commands)
    add_estimate(commands, budget)
    env = commands.add_parser("env", help="versions, and which backends can run here")
    env.set_defaults(run=run_env)
    return whole


def run_train(arguments: argparse.Namespace) -> None:
    """Trains, writes what the options name and prints the main numbers."""
    require("transformers", "accelerate", extra="hf")
    if arguments.save_plots:
        require("matplotlib", extra="plot")
    names = Settings.__dataclass_fields__
    options = {name: value for name, value in vars(arguments).items() if name in names}
    options |= {"text_column": tuple(arguments.text_column), "save_at": tuple(arguments.save_at)}
    settings = Settings(**options)
    check_settings(settings)
    check_paths(settings)
    # transformers is optional and takes seconds to import: only the commands that need it do.
    from ..estimate import memory_table
    from .train import train

    quiet_transformers()
    report, start, optimizer = train(settings)
    if settings.save_plots:
        with replacing(Path(settings.output) / "plots.png") as path:
            save_plots(path, {"loss": report["history"]}, start.model, optimizer)
    if settings.report:
        write_report(settings.report, report)
    print(table(report))
    if settings.memory_report:
        print(memory_table(report["memory"]))
    print(f"written to {settings.output}")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0, 2 for a mistake in the arguments or a file, 130 for Ctrl-C.

    argv: the words after the program's name; None: those of the process.
    """
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError, csv.Error) as error:
        if arguments.debug:
            raise
        print(f"id3-optim: error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if arguments.debug:
            raise
        print(f"id3-optim: interrupted{f'; {stop}' if str(stop) else ''}", file=sys.stderr)
        return INTERRUPTED
    return 0
