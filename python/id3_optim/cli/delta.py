"""The commands on deltas: `id3-optim inspect | apply | revert | merge | diff | convert`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..analysis import Allocation, allocation_table, delta_allocation, delta_experts
from ..delta import Delta, DeltaError
from ..delta.diff import diff
from ..delta.facts import model_facts
from ..delta.toolkit import load_toolkit_summary
from ..extras import require
from ..plots import save_allocation
from ..wrappers import plain_parameters
from .alike import differing, load_alike, load_as_stored
from .delta_files import delta_path, read_delta
from .merge import run_merge
from .models import check_held, load, load_config, load_model, load_tokenizer, quiet_transformers
from .results import (
    check_new_directory,
    check_new_file,
    print_summary,
    save_delta,
    save_model,
    written,
)

_DELTA_HELP = "delta file, or the output directory of `train --delta-only`"


def add_delta_commands(commands) -> None:
    """Adds the commands to the subparsers of `id3-optim`."""
    inspect = _add(commands, "inspect", run_inspect, "check a sparse delta and print its contents")
    inspect.add_argument("delta", help=_DELTA_HELP)
    inspect.add_argument("--plot", metavar="PNG", help="also draw the entries by layer and role")
    about = "put a sparse delta on its base and write the model"
    apply = _add_rewrite(commands, "apply", about, "the base")
    about = "keep the dtype that the base is stored in, and round the delta's values to it"
    apply.add_argument(
        "--cast", action="store_true", help=f"{about} (default: the base in the delta's dtype)"
    )
    about = "take a delta with originals off a tuned model and write the base"
    _add_rewrite(commands, "revert", about, "the tuned model")
    combine = _add(commands, "merge", run_merge, "add up what several deltas with originals changed")
    combine.add_argument("deltas", nargs="+", metavar="delta", help=f"{_DELTA_HELP}; each once")
    combine.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one for each delta (default: 1)"
    )
    about = "parameters stored whole, such as new heads: they must agree (default), come from the first "
    about += "delta that has them, or are left out"
    combine.add_argument("--whole", choices=("agree", "first", "drop"), default="agree", help=about)
    compare = _add(commands, "diff", run_diff, "write the delta between a base and a tuned model")
    compare.add_argument("--base", required=True, help="local directory or hub name")
    compare.add_argument("--tuned", required=True, help="local directory or hub name")
    about = "a smaller file, which revert and merge cannot use"
    compare.add_argument("--no-originals", action="store_true", help=about)
    about = "write the delta of a summary that the method's toolkit saved"
    convert = _add(commands, "convert", run_convert, about)
    convert.add_argument("summary", help="file of the toolkit's write_summary_to_disk")
    convert.add_argument("--model", required=True, help="the base: local directory or hub name")
    _add_config(convert)
    for command in (combine, compare, convert):
        command.add_argument("--output", required=True, metavar="FILE", help="the delta file to write")
        about = "indices as gaps: about 2 bytes less per entry"
        command.add_argument("--compact", action="store_true", help=about)
    for command in (apply, combine, compare, convert):
        about = "take values that are NaN or infinite, which are refused otherwise"
        command.add_argument("--allow-nonfinite", action="store_true", help=about)


def _add_rewrite(commands, name: str, about: str, source: str) -> argparse.ArgumentParser:
    command = _add(commands, name, run_rewrite, about)
    command.add_argument("delta", help=_DELTA_HELP)
    command.add_argument("--model", required=True, help=f"{source}: local directory or hub name")
    command.add_argument("--output", required=True, metavar="DIR", help="new or empty folder for the result")
    _add_config(command)
    return command


def _add_config(command: argparse.ArgumentParser) -> None:
    about = "directory or hub name of the configuration with the model's class (default: as recorded)"
    command.add_argument("--config", metavar="DIR|NAME", help=about)


def _add(commands, name: str, run, about: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=about, description=about)
    command.add_argument("--json", action="store_true", help="print a summary as JSON and nothing else")
    command.set_defaults(run=run)
    return command


def run_inspect(arguments: argparse.Namespace) -> None:
    """Prints counts, settings and the allocation of a delta."""
    if arguments.plot:
        require("matplotlib", extra="plot")
    path = delta_path(arguments.delta)
    delta = read_delta(path)
    report = {"path": str(path), "bytes": path.stat().st_size, **delta.inspect()}
    report["nonfinite"] = delta.nonfinite()
    allocated = delta_allocation(delta)
    if arguments.plot and not allocated.roles:
        raise ValueError(f"--plot: expected entries in the delta, got none in {path}")
    if arguments.plot:
        save_allocation(arguments.plot, allocated, path.name)
    report["allocation"] = _as_json(allocated)
    experts = delta_experts(delta).items()
    report["experts"] = {"–" if layer is None else str(layer): counts for layer, counts in experts}
    print_summary(arguments, report, *_inspected(arguments, delta, report))


def _as_json(allocated: Allocation) -> dict[str, Any]:
    return {
        "roles": allocated.roles,
        "layers": allocated.layers,
        "changed": allocated.active.tolist(),
        "entries": allocated.entries.tolist(),
    }


def _inspected(arguments: argparse.Namespace, delta: Delta, report: dict[str, Any]) -> list[str]:
    """The lines that `inspect` prints."""
    sparse = sum(tensor["kind"] == "sparse" for tensor in report["tensors"].values())
    lines = [
        f"{report['path']}: {report['bytes']:,} bytes, {report['entries']:,} entries of {sparse} parameters"
    ]
    fingerprint, originals = report["fingerprint"] or "none", "with" if report["originals"] else "without"
    lines += [f"{originals} originals, fingerprint of the base: {fingerprint}"]
    if bad := report["nonfinite"]:
        lines += [f"{sum(bad.values()):,} values are NaN or infinite, first in {next(iter(bad))}"]
    if isinstance(model := delta.settings.get("config"), dict):
        lines += [f"model: {json.dumps(model.get('architectures'))}"]
    shown = {name: value for name, value in delta.settings.items() if name not in ("merged", "config")}
    lines += [f"{name}: {json.dumps(value)}" for name, value in shown.items()]
    if sparse:
        lines += ["", "changed entries by layer and role", *allocation_table(delta_allocation(delta))]
    if report["experts"]:
        lines += ["", "changed entries by layer and expert", *_by_expert(report["experts"])]
    whole = {name: tensor for name, tensor in report["tensors"].items() if tensor["kind"] == "dense"}
    lines += ["", "stored whole"] if whole else []
    lines += [f"  {name}: {'×'.join(map(str, t['shape']))} {t['dtype']}" for name, t in whole.items()]
    return lines + ([f"picture: {arguments.plot}"] if arguments.plot else [])


def _by_expert(experts: dict[str, dict[int, int]]) -> list[str]:
    """A line for each layer: the number of experts with entries, and the experts with the most entries."""
    lines = []
    for layer, counts in experts.items():
        most = sorted(counts, key=lambda expert: (-counts[expert], expert))[:8]
        shown = ", ".join(f"{expert}: {counts[expert]:,}" for expert in most)
        used = sum(count > 0 for count in counts.values())
        lines.append(
            f"  {layer}: {used} of {len(counts)} experts; {shown}{', …' if used > len(most) else ''}"
        )
    return lines


def run_rewrite(arguments: argparse.Namespace) -> None:
    """Runs `apply` and `revert`: puts a delta on a model or takes it off, and writes the model."""
    quiet_transformers()
    if Path(arguments.output).resolve() == Path(arguments.model).resolve():
        raise ValueError(f"--output: expected another folder than --model, got {arguments.output}")
    check_new_directory(arguments.output)
    path, applies = delta_path(arguments.delta), arguments.command == "apply"
    _check_no_adapter(path.parent)
    delta = read_delta(path)
    cast = applies and arguments.cast
    model = load_model(delta, path.parent, arguments.model, arguments.config, applies, cast)
    tokenizer = load_tokenizer({"delta": str(path.parent), "--model": arguments.model})
    if applies:
        _apply(delta, model, arguments)
    else:
        delta.revert(model)
    save_model(model, tokenizer, arguments.output)
    counts = {name: delta.inspect()[name] for name in ("entries", "dense_entries")}
    summary = {"command": arguments.command, "output": arguments.output, **counts}
    summary["tokenizer"] = tokenizer is not None
    lines = [f"written to {arguments.output}{'' if tokenizer else ', without a tokenizer'}"]
    if not applies:
        tuned = [name for name, change in delta.changes.items() if change.indices is None]
        summary["still_tuned"] = tuned
        lines += [f"still tuned, since stored whole: {', '.join(tuned)}"] if tuned else []
    print_summary(arguments, summary, *lines)


def _check_no_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"delta: expected one of a whole model, got one of the PEFT adapter in {folder}; "
                         "put it on the adapter in Python: load_delta(path).apply(model)")  # fmt: skip


def _apply(delta: Delta, model: torch.nn.Module, arguments: argparse.Namespace) -> None:
    try:
        delta.apply(model, cast=arguments.cast, allow_nonfinite=arguments.allow_nonfinite)
    except DeltaError as error:
        stored, own = (
            load_config(arguments.model).dtype,
            {change.dtype for change in delta.changes.values()},
        )
        if arguments.cast or stored is None or stored in own:
            raise
        kinds = " and ".join(sorted(map(str, own)))
        remedy = f"--model holds {stored} and the delta {kinds}, which --cast rounds"
        raise DeltaError(f"{error}; {remedy}".strip()) from error


def run_diff(arguments: argparse.Namespace) -> None:
    """Writes the delta between two models of transformers."""
    quiet_transformers()
    check_new_file(arguments.output)
    config = load_config(arguments.tuned, "--tuned")
    first = load_config(arguments.base, "--base")
    if first.model_type != config.model_type:
        raise ValueError(f"--base: expected a {config.model_type} model as --tuned, got {first.model_type}")
    tuned, missing = load_as_stored(config, arguments.tuned, "--tuned")
    check_held("--tuned", missing, arguments.tuned)
    base, fresh = load_alike(config, arguments.base, tuned, "--base")
    known = {name: param for name, param in plain_parameters(base).items() if name not in fresh}
    delta = diff(known, plain_parameters(tuned), originals=not arguments.no_originals)
    delta.settings["config"] = model_facts(json.loads(config.to_json_string()))
    summary = save_delta(delta, arguments)
    sparse = sum(change.indices is not None for change in delta.changes.values())
    counts = f"{summary['entries']:,} entries of {sparse} parameters differ"
    whole = [name for name, change in delta.changes.items() if change.indices is None]
    lines = [counts, *([f"stored whole: {', '.join(whole)}"] if whole else []), written(summary)]
    other = differing(first.to_dict(), config.to_dict())
    if other:
        told = f"the configurations differ, too: {', '.join(other)}"
        lines.append(f"{told}; `apply --config {arguments.tuned}` takes over that of --tuned")
    print_summary(arguments, summary | {"whole": whole, "configuration": other}, *lines)


def run_convert(arguments: argparse.Namespace) -> None:
    """Writes the delta that a summary of the method's toolkit holds."""
    quiet_transformers()
    check_new_file(arguments.output)
    given = (arguments.config, "--config") if arguments.config else (arguments.model, "--model")
    config = load_config(*given)
    base, fresh = load(config, arguments.model, config.dtype or "auto")
    delta = load_toolkit_summary(arguments.summary, base)
    entries = {name for name, change in delta.changes.items() if change.indices is not None}
    check_held("--model", fresh & entries, arguments.model)
    delta.settings["config"] = model_facts(json.loads(config.to_json_string()))
    summary = save_delta(delta, arguments)
    print_summary(arguments, summary, f"{summary['entries']:,} entries", written(summary))
