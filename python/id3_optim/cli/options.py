"""The options of `id3-optim train`, as its parser shows them."""

import argparse
from collections.abc import Callable

from .settings import HEURISTICS


def budget(text: str) -> int | float:
    """Reads a budget: `320000` counts entries; `0.5%` and `0.005` are shares of the model.

    Raises ArgumentTypeError, with the text as typed, for anything else and for shares out of range.
    """
    expected = "expected entries (320000) or a share of more than 0 and at most 100% (0.5%)"
    try:
        if text.replace("_", "").isdecimal():
            return int(text.replace("_", ""))
        share = float(text[:-1]) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}") from None
    if not 0.0 < share <= 1.0:
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    return share


def delimiter(text: str) -> str:
    """Reads a delimiter: `tab` and `\\t` are the tab, which a shell makes hard to type."""
    return "\t" if text in ("tab", "\\t") else text


def adder(group) -> Callable[..., None]:
    """`group.add_argument` that ends an option's help with its default, where the option has one."""

    def add(name: str, help: str, **options) -> None:
        shown = options.get("default") not in (None, [])
        group.add_argument(name, help=f"{help} (default: %(default)s)" if shown else help, **options)

    return add


def add_train(train: argparse.ArgumentParser) -> None:
    """Adds the options to the subparser of the command."""
    add_data(train.add_argument_group("data"))
    add_output(train.add_argument_group("model and output"))
    trained = train.add_argument_group("what is trained")
    add_methods(trained)
    add_selection(trained)
    add_schedule(train.add_argument_group("how"))


def add_data(group) -> None:
    add = adder(group)
    add(
        "--train", required=True, metavar="FILE", help="CSV or TSV (classification), JSONL (causal-lm), CoNLL"
    )
    add("--eval", required=True, metavar="FILE", help="the same, to measure on")
    add(
        "--also-eval",
        metavar="FILE",
        help="the same, to measure on before and after: what not to forget",
    )
    add(
        "--task",
        choices=("classification", "regression", "token-classification", "causal-lm"),
        help="default: by the file's ending; classification: labels that look like scores too are classes; "
        "regression: labels are numbers",
    )
    add("--text-column", nargs="+", default=["text"], metavar="NAME", help="one column, or two for pairs")
    add("--label-column", default="label", metavar="NAME", help="column of the class")
    add("--encoding", default="utf-8", metavar="NAME", help="of all files of rows, such as latin-1 or utf-16")
    add(
        "--delimiter",
        type=delimiter,
        metavar="CHAR",
        help="between columns: ';', tab (default: by the ending)",
    )
    add("--max-length", type=int, default=256, metavar="TOKENS", help="longer texts are truncated")
    add(
        "--pooling",
        choices=("first", "mean"),
        default="first",
        help="of a text classifier: the model's own head, or a head on the mean of the last states",
    )


def add_output(group) -> None:
    add = adder(group)
    add("--model", required=True, help="local directory or hub name")
    add("--output", required=True, metavar="DIR", help="new or empty folder for the tuned model or its delta")
    add(
        "--overwrite", action="store_true", help="replace the results and checkpoints of an earlier run there"
    )
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
    add("--resume", action="store_true", help="continue from the newest whole checkpoint in --output")
    add(
        "--save-at",
        nargs="+",
        type=budget,
        default=[],
        metavar="BUDGET",
        help="also a delta at these budgets",
    )
    add("--report", metavar="JSON", help="also write every number of the run to this file")
    add(
        "--report-to",
        nargs="+",
        choices=("tensorboard", "wandb"),
        default=[],
        metavar="NAME",
        help="also send the numbers to tensorboard (files in runs/ of --output) or to wandb",
    )
    add("--save-plots", action="store_true", help="also draw losses and allocation into the output directory")


def add_methods(group) -> None:
    add = adder(group)
    add(
        "--method",
        metavar="NAME",
        help="a method of id3_optim.methods, such as fish, bitfit, lora, id3+lora, in place of --optimizer, "
        "--heuristic and --strategy",
    )
    add(
        "--leave-out",
        nargs="+",
        default=[],
        metavar="PART",
        help="parts of parameter names, such as embeddings, that stay frozen",
    )


def add_selection(group) -> None:
    add = adder(group)
    add(
        "--optimizer",
        choices=("id3", "adamw"),
        default="id3",
        help="adamw trains every entry, for comparison; not with --method",
    )
    add("--budget", type=budget, default="0.5%", help="entries (320000) or a share of the model (0.5%%)")
    add(
        "--heuristic",
        choices=HEURISTICS,
        default="d3",
        help="which entries are selected first; d3-relative: D3 over its mean in each tensor",
    )
    add("--eps", type=float, default=1.0, help="D3's ε")
    add("--exp", type=float, default=2.0, help="D3's exponent: 0 is the gradient alone")
    add(
        "--strategy",
        choices=("increment", "static", "repeat"),
        default="increment",
        help="when entries are selected",
    )
    add(
        "--schedule",
        default="uniform",
        help="uniform, cosine, exponential:<a>, front-loaded:<share>, after:<share>, one-shot",
    )
    add("--select-every", type=int, default=1, metavar="STEPS", help="entries join in every such step alone")
    add(
        "--bias-correction",
        choices=("tensor", "entry"),
        default="tensor",
        help="whether Adam counts the steps of a tensor or of each entry",
    )
    add_variants(add)
    add("--backend", help="kernels to use: reference, cpu, triton, cuda (default: the best for the device)")


def add_variants(add: Callable[..., None]) -> None:
    add(
        "--entry-warmup",
        type=int,
        default=0,
        metavar="STEPS",
        help="an entry's learning rate grows from 0 over so many steps after it joins",
    )
    add("--tensor-cap", type=float, metavar="SHARE", help="the most of the budget that one tensor gets")
    add(
        "--prune",
        type=int,
        metavar="STEPS",
        help="in every such step the entries that moved least give their place to new ones",
    )
    add("--prune-share", type=float, default=0.1, metavar="SHARE", help="of the active entries, with --prune")
    add("--mask", metavar="DELTA", help="train the entries that this delta changes, from the first step on")
    add("--reuse-mask", action="store_true", help="train twice: anew with the first run's entries at once")


def add_schedule(group) -> None:
    add = adder(group)
    either = adder(group.add_mutually_exclusive_group())
    either("--epochs", type=float, default=3.0, help="passes over the training file")
    either("--steps", type=int, help="optimizer steps, instead of --epochs")
    about = "learning rate (default: 1e-3; 1e-2 with --method recipe, random or head, 2e-5 with full)"
    add("--lr", type=float, help=about)
    add("--seed", type=int, default=42, help="the same seed gives the same run")
    add_batches(group)
    add("--release-gradients", action="store_true", help="free each gradient during the backward pass")
    add(
        "--sparse-backward",
        action="store_true",
        help="compute weight gradients where entries are active; fastest with --select-every 16 or more",
    )
    add(
        "--fsdp",
        action="store_true",
        help="under torchrun: split weights, gradients and state over the processes (FSDP2)",
    )
    add("--memory-report", action="store_true", help="also print predicted and measured memory")


def add_batches(group) -> None:
    """Adds the options that `compare` has too: the same for each run of a grid."""
    add = adder(group)
    add("--batch-size", type=int, default=16, help="rows of one forward pass")
    add("--accumulate", type=int, default=1, metavar="BATCHES", help="batches of one optimizer step")
    add("--group-by-length", action="store_true", help="batches of texts of similar length: less padding")
    add("--head-lr", type=float, help="learning rate of a new head (default: that of all entries)")
    add("--warmup", type=float, default=0.05, help="steps, or a share of them, before the full learning rate")
    add(
        "--lr-scheduler",
        choices=("linear", "cosine", "constant"),
        default="linear",
        help="how the learning rate falls to 0 after the warm-up, or that it does not",
    )
    add("--weight-decay", type=float, default=0.0, help="on active entries alone, decoupled")
    add(
        "--max-grad-norm",
        type=float,
        default=1.0,
        help="clips the gradients of active entries; 0: no clipping",
    )
    add("--bf16", action="store_true", help="bfloat16 weights, with float32 masters for active entries alone")
    about = "compute activations again in the backward pass (gradient checkpointing): less memory, more time"
    add("--checkpointing", action="store_true", help=about)
    add("--cpu", action="store_true", help="use the CPU, even if there is a GPU")
    add(
        "--log-every",
        type=int,
        default=10,
        metavar="STEPS",
        help="steps between two values of the loss curve",
    )
    add("--eval-every", type=int, metavar="STEPS", help="measure on --eval along the way too")
