"""The parser of `id3-optim`, and the commands train and env.

An error ends in one line on stderr and an exit status (`failures.run`); `--debug` shows the traceback.
"""

import argparse
import importlib.metadata
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

import id3_kernels

from ..extras import require
from ..plots import save_plots
from . import failures
from .delta import add_delta_commands
from .estimate import add_estimate
from .models import quiet_transformers
from .report import table, write_report


def budget(text: str) -> int | float:
    """Reads a budget: `320000` counts entries; `0.5%` and `0.005` are shares."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100.0
        return int(text.replace("_", "")) if text.replace("_", "").isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected entries (320000) or a share (0.5%), got {text!r}"
        ) from None


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; each command sets `run`, a function of the parsed arguments."""
    whole = argparse.ArgumentParser(
        prog="id3-optim", description="Selective fine-tuning by step-by-step unmasking."
    )
    whole.add_argument("--debug", action="store_true", help="show the traceback of an error")
    version = f"%(prog)s {version_of('id3-optim')}"
    whole.add_argument("--version", action="version", version=version, help="print the version")
    commands = whole.add_subparsers(dest="command", required=True, metavar="command")
    add_train(commands.add_parser("train", help="fine-tune a model"))
    add_delta_commands(commands)
    add_estimate(commands, budget)
    env = commands.add_parser("env", help="versions, and which backends can run here")
    env.set_defaults(run=run_env)
    return whole


def adder(group) -> Callable[..., None]:
    """`group.add_argument` that ends an option's help with its default, where the option has one."""

    def add(name: str, help: str, **options) -> None:
        shown = options.get("default") not in (None, [])
        group.add_argument(name, help=f"{help} (default: %(default)s)" if shown else help, **options)

    return add


def add_train(train: argparse.ArgumentParser) -> None:
    train.set_defaults(run=run_train)
    add = adder(train.add_argument_group("data"))
    add("--train", required=True, metavar="FILE", help="CSV or TSV (classification), JSONL (causal-lm)")
    add("--eval", required=True, metavar="FILE", help="the same, to measure on")
    add("--task", choices=("classification", "causal-lm"), help="default: by the file's ending")
    add("--text-column", nargs="+", default=["text"], metavar="NAME", help="one column, or two for pairs")
    add("--label-column", default="label", metavar="NAME", help="column of the class")
    add("--max-length", type=int, default=256, metavar="TOKENS", help="longer texts are truncated")
    add = adder(train.add_argument_group("model and output"))
    add("--model", required=True, help="local directory or hub name")
    add("--output", required=True, metavar="DIR", help="where the tuned model or its delta goes")
    add("--delta-only", action="store_true", help="write the changed entries instead of the model")
    add(
        "--originals",
        action="store_true",
        help="in deltas: also the values before training, for revert and merge",
    )
    add(
        "--save-every",
        type=int,
        metavar="STEPS",
        help="write checkpoints, each with its delta, to resume from",
    )
    add("--keep", type=int, metavar="N", help="with --save-every: only the newest N checkpoints")
    add("--resume", action="store_true", help="continue from the newest checkpoint in the output directory")
    add(
        "--save-at",
        nargs="+",
        type=budget,
        default=[],
        metavar="BUDGET",
        help="also a delta at these budgets",
    )
    add("--report", metavar="JSON", help="also write every number of the run to this file")
    add("--save-plots", action="store_true", help="also draw losses and allocation into the output directory")
    add_selection(train.add_argument_group("what is trained"))
    add_schedule(train.add_argument_group("how"))


def add_selection(group) -> None:
    add = adder(group)
    add(
        "--optimizer",
        choices=("id3", "adamw"),
        default="id3",
        help="adamw trains every entry, for comparison",
    )
    add("--budget", type=budget, default="0.5%", help="entries (320000) or a share of the model (0.5%%)")
    add(
        "--heuristic",
        choices=("d3", "magnitude", "random", "bias"),
        default="d3",
        help="which entries are selected first",
    )
    add("--eps", type=float, default=1.0, help="D3's ε")
    add("--exp", type=float, default=2.0, help="D3's exponent: 0 is the gradient alone")
    add(
        "--strategy",
        choices=("increment", "static", "repeat"),
        default="increment",
        help="when entries are selected",
    )
    add("--schedule", default="uniform", help="uniform, cosine, exponential:<a>, one-shot")
    add(
        "--bias-correction",
        choices=("tensor", "entry"),
        default="tensor",
        help="whether Adam counts the steps of a tensor or of each entry",
    )
    add("--backend", help="kernels to use: reference, cpu, triton, cuda (default: the best for the device)")


def add_schedule(group) -> None:
    add = adder(group)
    add("--epochs", type=float, default=3.0, help="passes over the training file")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=int, default=16, help="rows of one forward pass")
    add("--accumulate", type=int, default=1, metavar="BATCHES", help="batches of one optimizer step")
    add("--lr", type=float, default=1e-3, help="learning rate, decaying linearly to 0")
    add("--head-lr", type=float, help="learning rate of a new head (default: --lr)")
    add("--warmup", type=float, default=0.05, help="steps, or a share of them, before the full learning rate")
    add("--weight-decay", type=float, default=0.0, help="on active entries alone, decoupled")
    add(
        "--max-grad-norm",
        type=float,
        default=1.0,
        help="clips the gradients of active entries; 0: no clipping",
    )
    add("--seed", type=int, default=42, help="the same seed gives the same run")
    add("--bf16", action="store_true", help="bfloat16 weights, with float32 masters for active entries alone")
    add("--release-gradients", action="store_true", help="free each gradient during the backward pass")
    add("--memory-report", action="store_true", help="also print predicted and measured memory")
    add("--cpu", action="store_true", help="use the CPU, even if there is a GPU")
    add(
        "--log-every",
        type=int,
        default=10,
        metavar="STEPS",
        help="steps between two values of the loss curve",
    )


def run_train(arguments: argparse.Namespace) -> None:
    require("transformers", "accelerate", extra="hf")
    if arguments.save_plots:
        require("matplotlib", extra="plot")
    check_ranges(arguments)
    # transformers is optional and takes seconds to import: only the commands that need it do.
    from ..estimate import memory_table
    from .train import Settings, train

    quiet_transformers()
    names = Settings.__dataclass_fields__
    options = {name: value for name, value in vars(arguments).items() if name in names}
    options |= {"text_column": tuple(arguments.text_column), "save_at": tuple(arguments.save_at)}
    report, start, optimizer = train(Settings(**options))
    if arguments.save_plots:
        path = Path(arguments.output) / "plots.png"
        save_plots(path, {"loss": report["history"]}, start.model, optimizer)
    if arguments.report:
        write_report(arguments.report, report)
    print(table(report))
    if arguments.memory_report:
        print(memory_table(report["memory"]))
    print(f"written to {arguments.output}")


def check_ranges(arguments: argparse.Namespace) -> None:
    """Raises ValueError or FileNotFoundError for arguments that would fail late, or not at all, in training.

    Makes the directory of `--report`: training must not end with a report that cannot be written.
    """
    least = {"steps": 1, "batch_size": 1, "accumulate": 1, "log_every": 1, "max_length": 2, "warmup": 0}
    least |= {"save_every": 1, "keep": 1}
    least |= {"weight_decay": 0, "max_grad_norm": 0}
    for name, lowest in least.items():
        value = getattr(arguments, name)
        if value is not None and not value >= lowest:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least {lowest}, got {value}")
    for name in ("epochs", "lr", "head_lr"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')}: expected more than 0, got {value}")
    if len(arguments.text_column) > 2:
        raise ValueError(f"--text-column: expected one or two columns, got {len(arguments.text_column)}")
    for name in ("release_gradients", "memory_report"):
        if getattr(arguments, name) and arguments.optimizer != "id3":
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"--optimizer: expected id3 with {option}, got {arguments.optimizer}")
    if arguments.originals and not (arguments.delta_only or arguments.save_at or arguments.save_every):
        raise ValueError("--originals: expected --delta-only, --save-at or --save-every with it, got none")
    if arguments.keep and not arguments.save_every:
        raise ValueError("--keep: expected --save-every with it, got none")
    if arguments.report:
        Path(arguments.report).parent.mkdir(parents=True, exist_ok=True)
    for option, path in (("--train", arguments.train), ("--eval", arguments.eval)):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{option}: expected a file, got {path}, which is none")


def run_env(arguments: argparse.Namespace) -> None:
    """Prints versions, devices and backends. arguments: none are read."""
    print(f"python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in (
        "id3-optim",
        "torch",
        "triton",
        "transformers",
        "accelerate",
        "peft",
        "trl",
        "lightning",
        "safetensors",
        "matplotlib",
    ):
        print(f"{package} {version_of(package)}")
    print(f"threads {torch.get_num_threads()} of {os.cpu_count()} cores")
    for device in range(torch.cuda.device_count()):
        print(f"cuda:{device} {torch.cuda.get_device_name(device)}")
    for name, obstacle in id3_kernels.available_backends().items():
        print(f"backend {name}: {'available' if obstacle is None else obstacle}")


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status of `failures.run`, and 2 for arguments that do not parse.

    argv: the words after the program's name; None: those of the process.
    """
    return failures.run(parser().parse_args(argv))
