"""The command `id3-optim completion`: a script by which a shell completes commands, options and files."""

import argparse
from collections.abc import Iterator

from ..extras import require

_FILES, _FOLDERS = {"FILE", "JSON", "PNG", "delta", "summary"}, {"DIR", "DIR|NAME"}
_FOLDER_OPTIONS = {"--model", "--base", "--tuned"}  # or the name of a model on the hub


def add_completion(commands, whole: argparse.ArgumentParser) -> None:
    """Adds the command to the subparsers of `id3-optim`. whole: the parser that the script is for."""
    about = "print a script by which a shell completes the command line"
    command = commands.add_parser("completion", help=about, description=f"{about}: save it where it looks")
    command.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    command.set_defaults(run=run_completion, whole=whole)


def run_completion(arguments: argparse.Namespace) -> None:
    """Prints the script, as shtab makes it from the parser."""
    require("shtab", extra="completion")
    import shtab

    for action in actions(arguments.whole):
        if {str(action.metavar), action.dest} & _FILES:
            action.complete = shtab.FILE
        elif action.metavar in _FOLDERS or _FOLDER_OPTIONS & set(action.option_strings):
            action.complete = shtab.DIRECTORY
    print(shtab.complete(arguments.whole, arguments.shell))


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of its subcommands."""
    for action in vars(parser)["_actions"]:  # argparse has no public list of them
        yield action
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                yield from actions(command)
