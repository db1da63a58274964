"""The command `id3-optim estimate`: predicts the peak memory of a training step."""

import argparse
import json

from .. import method_table
from .models import load_config, quiet_transformers, reading
from .settings import Settings, naming_options, option


def add_estimate(commands, budget) -> None:
    """Adds the command to the subparsers of `id3-optim`. budget: parses `320000` or `0.5%`."""
    command = commands.add_parser("estimate", help="predict the peak memory of a training step")
    add = command.add_argument
    add("--model", required=True, help="configuration: local directory, config.json or hub name")
    add("--budget", type=budget, default="0.5%", help="entries (320000) or a share of the model (0.5%%)")
    add("--batch", type=int, default=1, help="texts of one forward pass")
    add("--length", type=int, default=512, help="tokens of each text")
    add("--steps", type=int, default=1000, help="optimizer steps over which the budget is spent")
    add("--select-every", type=int, default=1, metavar="STEPS", help="entries join in every such step alone")
    add("--static", action="store_true", help="the whole budget at the first step")
    add("--bf16", action="store_true", help="bfloat16 weights")
    add("--checkpointing", action="store_true", help="with gradient checkpointing")
    add("--json", action="store_true", help="bytes, as JSON")
    command.set_defaults(run=run_estimate)


def run_estimate(arguments: argparse.Namespace) -> None:
    """Prints the prediction as a table or as JSON."""
    for name in ("batch", "length", "steps", "select_every"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{option(name)}: expected at least 1, got {getattr(arguments, name)}")
    quiet_transformers()
    from ..estimate import estimate_from_config, memory_table  # needs transformers

    names = ("budget", "batch", "length", "steps", "select_every", "static", "bf16", "checkpointing")
    options = {name: getattr(arguments, name) for name in names}
    config = load_config(arguments.model)  # its errors name the option
    runs = reading("--model", f"a configuration of a model that can run in {arguments.model}")
    with naming_options("budget", "length"), runs:
        report = estimate_from_config(config, **options)
    print(json.dumps(report, indent=2) if arguments.json else memory_table(report))


def predicted_memory(settings: Settings, steps: int) -> dict[str, int]:
    """Bytes by kind for a run of `train` with as many steps, from the model's configuration alone.

    Its batches are of texts of `max_length`, or of as many tokens as the model has positions.
    Raises ValueError for a method that trains whole tensors, or in an adapter.
    """
    if not method_table.trains_entries(settings.method):
        raise ValueError(f"--memory-report: does not apply to --method {settings.method}: it predicts what "
                         "entries of the model's own weights take")  # fmt: skip
    from ..estimate import estimate_from_config  # needs transformers

    config = load_config(settings.model)
    positions = getattr(config, "max_position_embeddings", None)
    length = min(settings.max_length, positions or settings.max_length)
    options = {"batch": settings.batch_size, "length": length}
    options |= {"bf16": settings.bf16, "checkpointing": settings.checkpointing}
    options |= {"static": _is_static(settings), "select_every": settings.select_every, "steps": steps}
    options["entry_ages"] = bool(
        settings.bias_correction == "entry" or settings.entry_warmup or settings.prune
    )
    with naming_options("budget"):
        report = estimate_from_config(config, settings.budget, **options)
    released = "released" if settings.release_gradients else "dense"
    return report["sparse" if settings.sparse_backward else released]


def _is_static(settings: Settings) -> bool:
    """Whether the whole budget joins at once."""
    if settings.method is not None:
        return method_table.SELECTIVE[settings.method][1] != "increment"
    return bool(settings.strategy != "increment" or settings.mask or settings.reuse_mask)
