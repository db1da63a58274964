"""The commands on deltas: `id3-optim inspect | apply | revert | merge | diff | convert`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..analysis import Allocation, allocation_table, delta_allocation
from ..delta import Delta, DeltaError, load_delta
from ..delta.diff import diff
from ..delta.merge import Conflict, merge
from ..delta.toolkit import load_toolkit_summary
from ..extras import require
from ..plots import save_allocation
from ..wrappers import plain_parameters
from .models import (
    check_held,
    facts_of,
    load,
    load_config,
    load_model,
    model_facts,
    quiet_transformers,
    save_tokenizer,
)

_DELTA_HELP = "delta file, or the output directory of `train --delta-only`"
SHOWN = 20  # parameters with conflicts that `merge` lists


def add_delta_commands(commands) -> None:
    """Adds the commands to the subparsers of `id3-optim`."""
    inspect = _add(commands, "inspect", run_inspect, "check a sparse delta and print its contents")
    inspect.add_argument("delta", help=_DELTA_HELP)
    inspect.add_argument("--plot", metavar="PNG", help="also draw the entries by layer and role")
    for name, source in (("apply", "the base"), ("revert", "the tuned model")):
        about = {"apply": "put a sparse delta on its base and write the model",
                 "revert": "take a delta with originals off a tuned model and write the base"}  # fmt: skip
        command = _add(commands, name, run_rewrite, about[name])
        command.add_argument("delta", help=_DELTA_HELP)
        command.add_argument("--model", required=True, help=f"{source}: local directory or hub name")
        command.add_argument("--output", required=True, metavar="DIR", help="directory for the result")
        _add_config(command)
    combine = _add(commands, "merge", run_merge, "add up what several deltas with originals changed")
    combine.add_argument("deltas", nargs="+", metavar="delta", help=_DELTA_HELP)
    combine.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one for each delta (default: 1)"
    )
    combine.add_argument(
        "--whole", choices=("agree", "first", "drop"), default="agree",
        help="parameters stored whole, such as new heads: they must agree (default), come from the first "
        "delta that has them, or are left out",
    )  # fmt: skip
    compare = _add(commands, "diff", run_diff, "write the delta between a base and a tuned model")
    compare.add_argument("--base", required=True, help="local directory or hub name")
    compare.add_argument("--tuned", required=True, help="local directory or hub name")
    compare.add_argument(
        "--no-originals", action="store_true", help="a smaller file, which revert and merge cannot use"
    )
    convert = _add(
        commands, "convert", run_convert, "write the delta of a summary that the method's toolkit saved"
    )
    convert.add_argument("summary", help="file of the toolkit's write_summary_to_disk")
    convert.add_argument("--model", required=True, help="the base: local directory or hub name")
    _add_config(convert)
    for command in (combine, compare, convert):
        command.add_argument("--output", required=True, metavar="FILE", help="the delta file to write")
        command.add_argument(
            "--compact", action="store_true", help="indices as gaps: about 2 bytes less per entry"
        )


def _add_config(command: argparse.ArgumentParser) -> None:
    about = "directory or hub name of the configuration with the model's class (default: as recorded)"
    command.add_argument("--config", metavar="DIR|NAME", help=about)


def _add(commands, name: str, run, about: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=about, description=about)
    command.add_argument("--json", action="store_true", help="print a summary as JSON and nothing else")
    command.set_defaults(run=run)
    return command


def delta_path(path: str) -> Path:
    """The delta file at `path`, or in the directory at `path`."""
    return Path(path) / "delta.safetensors" if Path(path).is_dir() else Path(path)


def _report(arguments: argparse.Namespace, summary: dict[str, Any], *lines: str) -> None:
    print(json.dumps(summary, indent=2) if arguments.json else "\n".join(lines))


def run_inspect(arguments: argparse.Namespace) -> None:
    """Prints counts, settings and the allocation of a delta."""
    if arguments.plot:
        require("matplotlib", extra="plot")
    path = delta_path(arguments.delta)
    delta = load_delta(path)
    report = {"path": str(path), "bytes": path.stat().st_size, **delta.inspect()}
    allocated = delta_allocation(delta)
    if arguments.plot and not allocated.roles:
        raise ValueError(f"--plot: expected entries in the delta, got none in {path}")
    if arguments.plot:
        save_allocation(arguments.plot, allocated, path.name)
    _report(arguments, report | {"allocation": _as_json(allocated)}, *_inspected(arguments, delta, report))


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
    if isinstance(model := delta.settings.get("config"), dict):
        lines += [f"model: {json.dumps(model.get('architectures'))}"]
    shown = {name: value for name, value in delta.settings.items() if name not in ("merged", "config")}
    lines += [f"{name}: {json.dumps(value)}" for name, value in shown.items()]
    if sparse:
        lines += ["", "changed entries by layer and role", *allocation_table(delta_allocation(delta))]
    whole = {name: tensor for name, tensor in report["tensors"].items() if tensor["kind"] == "dense"}
    lines += ["", "stored whole"] if whole else []
    lines += [f"  {name}: {'×'.join(map(str, t['shape']))} {t['dtype']}" for name, t in whole.items()]
    return lines + ([f"picture: {arguments.plot}"] if arguments.plot else [])


def run_rewrite(arguments: argparse.Namespace) -> None:
    """Runs `apply` and `revert`: puts a delta on a model or takes it off, and writes the model."""
    quiet_transformers()
    _check_output(arguments)
    path, applies = delta_path(arguments.delta), arguments.command == "apply"
    _check_no_adapter(path.parent)
    delta = load_delta(path)
    model = load_model(delta, path.parent, arguments.model, arguments.config, brings_whole=applies)
    if applies:
        delta.apply(model, strict=True)
    else:
        delta.revert(model)
    model.save_pretrained(arguments.output)
    tokenizer = save_tokenizer([str(path.parent), arguments.model], arguments.output)
    counts = {name: delta.inspect()[name] for name in ("entries", "dense_entries")}
    summary = {"command": arguments.command, "output": arguments.output, "tokenizer": tokenizer, **counts}
    lines = [f"written to {arguments.output}{'' if tokenizer else ', without a tokenizer'}"]
    if not applies:
        tuned = [name for name, change in delta.changes.items() if change.indices is None]
        summary["still_tuned"] = tuned
        lines += [f"still tuned, since stored whole: {', '.join(tuned)}"] if tuned else []
    _report(arguments, summary, *lines)


def _check_no_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"delta: expected one of a whole model, got one of the PEFT adapter in {folder}; "
                         "put it on the adapter in Python: load_delta(path).apply(model)")  # fmt: skip


def _check_output(arguments: argparse.Namespace) -> None:
    if Path(arguments.output).resolve() == Path(arguments.model).resolve():
        raise ValueError(f"--output: expected another directory than --model, got {arguments.output}")
    if Path(arguments.output).exists() and not Path(arguments.output).is_dir():
        raise ValueError(f"--output: expected a directory, got the file {arguments.output}")


def run_merge(arguments: argparse.Namespace) -> None:
    """Writes the sum of several deltas, and prints where they conflict."""
    paths = [delta_path(path) for path in arguments.deltas]
    deltas = [load_delta(path) for path in paths]
    try:
        merged, conflicts = merge(deltas, arguments.weights, arguments.whole)
    except DeltaError as error:
        message = str(error)
        for i, path in enumerate(paths):
            message = message.replace(f"deltas[{i}]", str(path))
        raise DeltaError(message) from error
    if facts := _merged_facts(deltas, paths, arguments.whole):
        merged.settings["config"] = facts
    summary = _save(merged, arguments) | {
        "merged": [str(path) for path in paths],
        "weights": merged.settings["weights"],
        "overlapping": sum(conflict.overlapping for conflict in conflicts.values()),
        "opposed": sum(conflict.opposed for conflict in conflicts.values()),
        "conflicts": {name: conflict._asdict() for name, conflict in conflicts.items()},
    }
    overlapping, opposed = summary["overlapping"], summary["opposed"]
    total = f"{overlapping:,} of {summary['entries']:,} entries overlap, {opposed:,} opposed"
    _report(arguments, summary, total, *_worst(conflicts), _written(summary))


def _worst(conflicts: dict[str, Conflict]) -> list[str]:
    """Lines on the parameters with most overlapping entries."""
    overlapping = (name for name, conflict in conflicts.items() if conflict.overlapping)
    names = sorted(overlapping, key=lambda name: -conflicts[name].overlapping)
    lines = []
    for name in names[:SHOWN]:
        entries, overlap, opposed = conflicts[name]
        lines.append(f"  {name}: {overlap:,} of {entries:,} overlap, {opposed:,} opposed")
    if len(names) > SHOWN:
        lines.append(f"  and {len(names) - SHOWN} more parameters (--json lists all)")
    return lines


def _merged_facts(deltas: list[Delta], paths: list[Path], whole: str) -> dict[str, Any]:
    """The class and the labels of the merged delta's model; {} where the deltas give none or disagree."""
    heads = [any(change.indices is None for change in delta.changes.values()) for delta in deltas]
    if whole == "drop" and any(heads):
        return {}  # a model without the heads is of the base's class
    facts = [facts_of(delta, path.parent) for delta, path in zip(deltas, paths, strict=True)]
    if whole == "first" and any(heads):
        return facts[heads.index(True)]
    known = [one for one in facts if one]
    return known[0] if known and all(one == known[0] for one in known) else {}


def run_diff(arguments: argparse.Namespace) -> None:
    """Writes the delta between two models of transformers."""
    quiet_transformers()
    config = load_config(arguments.tuned)
    kind = load_config(arguments.base).model_type
    if kind != config.model_type:
        raise ValueError(f"--base: expected a {config.model_type} model as --tuned, got {kind}")
    tuned, missing = load(config, arguments.tuned, config.dtype or "auto")
    check_held("--tuned", missing, arguments.tuned)
    base, fresh = load(config, arguments.base, tuned.dtype)
    known = {name: param for name, param in plain_parameters(base).items() if name not in fresh}
    delta = diff(known, plain_parameters(tuned), originals=not arguments.no_originals)
    delta.settings["config"] = model_facts(json.loads(config.to_json_string()))
    summary = _save(delta, arguments)
    sparse = sum(change.indices is not None for change in delta.changes.values())
    counts = f"{summary['entries']:,} entries of {sparse} parameters differ"
    whole = [name for name, change in delta.changes.items() if change.indices is None]
    lines = [counts, *([f"stored whole: {', '.join(whole)}"] if whole else []), _written(summary)]
    _report(arguments, summary | {"whole": whole}, *lines)


def run_convert(arguments: argparse.Namespace) -> None:
    """Writes the delta that a summary of the method's toolkit holds."""
    quiet_transformers()
    config = load_config(arguments.config or arguments.model)
    base, fresh = load(config, arguments.model, config.dtype or "auto")
    delta = load_toolkit_summary(arguments.summary, base)
    entries = {name for name, change in delta.changes.items() if change.indices is not None}
    check_held("--model", fresh & entries, arguments.model)
    delta.settings["config"] = model_facts(json.loads(config.to_json_string()))
    summary = _save(delta, arguments)
    _report(arguments, summary, f"{summary['entries']:,} entries", _written(summary))


def _save(delta: Delta, arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes the delta to --output; returns the fields that all summaries share."""
    delta.save(arguments.output, compact=arguments.compact)
    counts = {
        name: delta.inspect()[name] for name in ("entries", "dense_entries", "originals", "fingerprint")
    }
    size = Path(arguments.output).stat().st_size
    return {"command": arguments.command, "output": arguments.output, "bytes": size, **counts}


def _written(summary: dict[str, Any]) -> str:
    return f"written to {summary['output']} ({summary['bytes']:,} bytes)"
