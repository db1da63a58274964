"""`python -m benchmarks [COMMAND] [OPTIONS]`: one command per kind of measurement, `all` without one.

`python -m benchmarks COMMAND --help` has the options of a command.
"""

import functools
import importlib
import sys
from collections.abc import Callable


def _from(module: str, name: str = "main", *first: str) -> Callable[[list[str]], None]:
    """The function `name` of `module`, imported when it is called.

    A command needs its own packages alone: `release` transformers, a report matplotlib, `gpu` none of them.
    """

    def command(arguments: list[str]) -> None:
        function = getattr(importlib.import_module(f"benchmarks.{module}"), name)
        functools.partial(function, *first)(arguments)

    return command


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "all": _from("run", "run_all"),
    "step": _from("run", "run_kind", "step"),
    "parts": _from("run", "run_kind", "parts"),
    "growth": _from("run", "run_kind", "growth"),
    "windows": _from("run", "run_kind", "windows"),
    "deltas": _from("run", "run_kind", "deltas"),
    "many": _from("many"),
    "release": _from("release"),
    "training": _from("training"),
    "deploy": _from("deploy"),
    "reference": _from("reference"),
    "quantized": _from("quantized"),
    "ranks": _from("ranks"),
    "quality": _from("quality.run"),
    "toolkit": _from("quality.toolkit"),
    "against": _from("against"),
    "report": _from("report"),
    "gpu": _from("gpu.check"),
    "gpu-predicted": _from("gpu.predicted"),
    "gpu-report": _from("gpu.report"),
}


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        arguments = ["all", *arguments]
    name, *rest = arguments
    if name not in COMMANDS:
        sys.exit(f"command: expected one of {', '.join(COMMANDS)}, got {name!r}")
    COMMANDS[name](rest)


if __name__ == "__main__":
    main(sys.argv[1:])
