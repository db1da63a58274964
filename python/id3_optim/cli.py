"""The command `id3-optim`: train, inspect, apply, revert, estimate, env.

What a user got wrong (a file, a column, a number) ends in one line on stderr and exit code 2; `--debug` shows
where.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import sys
from pathlib import Path

from .cli_estimate import add_estimate


def budget(text: str) -> int | float:
    """`320000` counts entries; `0.5%` and `0.005` are shares."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100.0
        return int(text.replace("_", "")) if text.replace("_", "").isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected entries (320000) or a share (0.5%), got {text!r}"
        ) from None


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="id3-optim", description="Selective fine-tuning by step-by-step unmasking."
    )
    main.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = main.add_subparsers(dest="command", required=True, metavar="command")
    add_train(commands.add_parser("train", help="fine-tune a model", formatter_class=Defaults))
    add_rewrite(commands, "apply", "write the model that a sparse delta and its base make")
    add_rewrite(commands, "revert", "write the base again from a tuned model and a delta with originals")
    inspect = commands.add_parser("inspect", help="check a sparse delta and say what it holds")
    inspect.add_argument("delta", help="delta file, or the output directory of `train --delta-only`")
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.set_defaults(run=run_inspect)
    add_estimate(commands, budget)
    env = commands.add_parser("env", help="versions, and which backends can run here")
    env.set_defaults(run=run_env)
    return main


def add_rewrite(commands, name: str, help: str) -> None:
    command = commands.add_parser(name, help=help)
    command.add_argument("delta", help="delta file, or the output directory of `train --delta-only`")
    source = "the base" if name == "apply" else "the tuned model"
    command.add_argument("--model", required=True, help=f"{source}: local directory or hub name")
    command.add_argument("--output", required=True, help="directory for the result")
    command.set_defaults(run=run_rewrite)


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to every option's help but where there is none to tell."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def add_train(train: argparse.ArgumentParser) -> None:
    train.set_defaults(run=run_train)
    data = train.add_argument_group("data")
    add = data.add_argument
    add("--train", required=True, metavar="FILE", help="CSV or TSV (classification), JSONL (causal-lm)")
    add("--eval", required=True, metavar="FILE", help="the same, to measure on")
    add("--task", choices=("classification", "causal-lm"), help="default: by the file's ending")
    add("--text-column", nargs="+", default=["text"], metavar="NAME", help="one column, or two for pairs")
    add("--label-column", default="label", metavar="NAME", help="column of the class")
    add("--max-length", type=int, default=256, metavar="TOKENS", help="longer texts are cut")
    model = train.add_argument_group("model and output")
    add = model.add_argument
    add("--model", required=True, help="local directory or hub name")
    add("--output", required=True, metavar="DIR", help="where the tuned model or its delta goes")
    add("--delta-only", action="store_true", help="write the changed entries instead of the model")
    add("--originals", action="store_true", help="with --delta-only: also what was there before, for revert")
    add("--report", metavar="JSON", help="also write every number of the run to this file")
    add("--save-plots", action="store_true", help="also draw losses and allocation into the output directory")
    add_selection(train.add_argument_group("what is trained"))
    add_schedule(train.add_argument_group("how"))


def add_selection(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
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
        help="what is picked first",
    )
    add("--eps", type=float, default=1.0, help="D3's ε")
    add("--exp", type=float, default=2.0, help="D3's exponent: 0 is the gradient alone")
    add(
        "--strategy", choices=("increment", "static", "repeat"), default="increment", help="when it is picked"
    )
    add("--schedule", default="uniform", help="uniform, cosine, exponential:<a>, one-shot")
    add("--bias-correction", choices=("tensor", "entry"), default="tensor", help="whose steps Adam counts")
    add("--backend", help="kernels to use: reference, cpu, triton, cuda (default: the best for the device)")


def add_schedule(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--epochs", type=float, default=3.0, help="passes over the training file")
    add("--steps", type=int, help="optimizer steps, instead of --epochs")
    add("--batch-size", type=int, default=16, help="rows of one forward pass")
    add("--accumulate", type=int, default=1, metavar="BATCHES", help="batches of one optimizer step")
    add("--lr", type=float, default=1e-3, help="learning rate, decaying linearly to 0")
    add("--head-lr", type=float, help="learning rate of a new head (default: --lr)")
    add("--warmup", type=float, default=0.05, help="steps, or a share of them, before the full learning rate")
    add("--weight-decay", type=float, default=0.0, help="on active entries alone")
    add("--max-grad-norm", type=float, default=1.0, help="clip the active entries' gradients; 0: do not")
    add("--seed", type=int, default=42, help="the same seed gives the same run")
    add("--bf16", action="store_true", help="bfloat16 weights, with float32 masters for active entries alone")
    add("--release-gradients", action="store_true", help="drop each gradient as the backward pass makes it")
    add("--memory-report", action="store_true", help="also print predicted and measured memory")
    add("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    add(
        "--log-every",
        type=int,
        default=10,
        metavar="STEPS",
        help="steps between two numbers of the loss curve",
    )


def run_train(arguments: argparse.Namespace) -> None:
    require("transformers", "accelerate", extra="hf")
    if arguments.save_plots:
        require("matplotlib", extra="plot")
    check_ranges(arguments)
    import transformers

    from . import report, train

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    names = train.Settings.__dataclass_fields__
    options = {name: value for name, value in vars(arguments).items() if name in names}
    options["text_column"] = tuple(arguments.text_column)
    numbers, start, optimizer = train.train(train.Settings(**options))
    if arguments.save_plots:
        from . import analysis

        analysis.save_plots(
            Path(arguments.output) / "plots.png", {"loss": numbers["history"]}, start.model, optimizer
        )
    if arguments.report:
        report.write_report(arguments.report, numbers)
    print(report.table(numbers))
    if arguments.memory_report:
        from .estimate import table

        print(table(numbers["memory"]))
    print(f"written to {arguments.output}")


def check_ranges(arguments: argparse.Namespace) -> None:
    """What the Trainer would answer with a traceback, or take without a word."""
    least = {"steps": 1, "batch_size": 1, "accumulate": 1, "log_every": 1, "max_length": 2, "warmup": 0}
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
            raise ValueError(f"--{name.replace('_', '-')}: needs --optimizer id3")
    if arguments.originals and not arguments.delta_only:
        raise ValueError("--originals: needs --delta-only")
    if arguments.report:  # after hours of training would be late to learn that it can not be written
        Path(arguments.report).parent.mkdir(parents=True, exist_ok=True)
    for path in (arguments.train, arguments.eval):
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file: {path}")


def delta_file(path: str) -> Path:
    """The delta itself, where its directory was given."""
    return Path(path) / "delta.safetensors" if Path(path).is_dir() else Path(path)


def run_rewrite(arguments: argparse.Namespace) -> None:
    """`apply` and `revert`."""
    require("transformers", extra="hf")
    import transformers

    from .delta import load_delta
    from .train import load_base

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = delta_file(arguments.delta)
    delta = load_delta(path)
    model = load_base(path, arguments.model)
    if arguments.command == "apply":
        delta.apply(model, strict=True)
    else:
        delta.revert(model)
    model.save_pretrained(arguments.output)
    transformers.AutoTokenizer.from_pretrained(path.parent).save_pretrained(arguments.output)
    print(f"written to {arguments.output}")


def run_inspect(arguments: argparse.Namespace) -> None:
    from .delta import load_delta

    report = load_delta(delta_file(arguments.delta)).inspect()
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    tensors = report.pop("tensors")
    for name, value in report.items():
        print(f"{name}: {json.dumps(value)}")
    for name, tensor in tensors.items():
        shape = "×".join(map(str, tensor["shape"]))
        print(f"  {name} ({tensor['dtype']}, {shape}): {tensor['entries']:,} {tensor['kind']}")


def run_env(arguments: argparse.Namespace) -> None:
    import torch

    import id3_kernels

    print(f"python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for package in (
        "id3-optim",
        "torch",
        "triton",
        "transformers",
        "accelerate",
        "safetensors",
        "matplotlib",
    ):
        try:
            print(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package} not installed")
    print(f"threads {torch.get_num_threads()} of {os.cpu_count()} cores")
    for device in range(torch.cuda.device_count()):
        print(f"cuda:{device} {torch.cuda.get_device_name(device)}")
    for name, obstacle in id3_kernels.available_backends().items():
        print(f"backend {name}: {'available' if obstacle is None else obstacle}")


def require(*packages: str, extra: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"this needs the package {package}: pip install 'id3-optim[{extra}]'")


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, or 2 for a mistake in what was asked."""
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError, csv.Error) as error:
        if arguments.debug:
            raise
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        print(f"id3-optim: error: {line}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
