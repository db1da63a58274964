"""The commands on deltas: `id3-optim inspect | apply | revert | merge | diff | convert`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_model import check_held, facts_of, load, load_model, model_facts, quiet_transformers, save_tokenizer
from .extras import require

if TYPE_CHECKING:
    from .delta import Delta

_DELTA_HELP = "delta file, or the output directory of `train --delta-only`"
_SHOWN = 20  # parameters with conflicts that `merge` lists


def add_commands(commands: argparse._SubParsersAction) -> None:
    inspect = _add(commands, "inspect", run_inspect, "check a sparse delta and say what it holds")
    inspect.add_argument("delta", help=_DELTA_HELP)
    inspect.add_argument("--plot", metavar="PNG", help="also draw where the entries are")
    for name, source in (("apply", "the base"), ("revert", "the tuned model")):
        about = {"apply": "write the model that a sparse delta and its base make",
                 "revert": "write the base again from a tuned model and a delta with originals"}  # fmt: skip
        command = _add(commands, name, run_rewrite, about[name])
        command.add_argument("delta", help=_DELTA_HELP)
        command.add_argument("--model", required=True, help=f"{source}: local directory or hub name")
        command.add_argument("--output", required=True, metavar="DIR", help="directory for the result")
        _add_config(command)
    merge = _add(commands, "merge", run_merge, "add up what several deltas with originals changed")
    merge.add_argument("deltas", nargs="+", metavar="delta", help=_DELTA_HELP)
    merge.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one for each delta (default: 1)"
    )
    merge.add_argument(
        "--whole", choices=("agree", "first", "drop"), default="agree",
        help="parameters stored whole, such as new heads: they must agree (default), those of the first "
        "delta that has them, or none",
    )  # fmt: skip
    diff = _add(commands, "diff", run_diff, "write the delta between a base and a tuned model")
    diff.add_argument("--base", required=True, help="local directory or hub name")
    diff.add_argument("--tuned", required=True, help="local directory or hub name")
    diff.add_argument("--no-originals", action="store_true", help="smaller, but without revert and merge")
    convert = _add(
        commands, "convert", run_convert, "make a delta of a summary that the method's toolkit saved"
    )
    convert.add_argument("summary", help="file of the toolkit's write_summary_to_disk")
    convert.add_argument("--model", required=True, help="the base: local directory or hub name")
    _add_config(convert)
    for command in (merge, diff, convert):
        command.add_argument("--output", required=True, metavar="FILE", help="the delta file to write")
        command.add_argument("--compact", action="store_true", help="indices as gaps: 2 bytes less an entry")


def _add_config(command: argparse.ArgumentParser) -> None:
    about = "directory or hub name of the configuration that tells the model's class (default: as recorded)"
    command.add_argument("--config", metavar="DIR|NAME", help=about)


def _add(commands: argparse._SubParsersAction, name: str, run, about: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=about, description=about)
    command.add_argument("--json", action="store_true", help="print a summary as JSON and nothing else")
    command.set_defaults(run=run)
    return command


def delta_path(path: str) -> Path:
    """The delta itself, where its directory was given."""
    return Path(path) / "delta.safetensors" if Path(path).is_dir() else Path(path)


def _report(arguments: argparse.Namespace, summary: dict[str, Any], *lines: str) -> None:
    print(json.dumps(summary, indent=2) if arguments.json else "\n".join(lines))


def run_inspect(arguments: argparse.Namespace) -> None:
    from . import analysis
    from .delta import load_delta

    if arguments.plot:
        require("matplotlib", extra="plot")
    path = delta_path(arguments.delta)
    delta = load_delta(path)
    report = {"path": str(path), "bytes": path.stat().st_size, **delta.inspect()}
    allocated = analysis.delta_allocation(delta)
    if arguments.plot and not allocated.roles:
        raise ValueError(f"--plot: expected entries in the delta, got none in {path}")
    if arguments.plot:
        analysis.save_allocation(arguments.plot, allocated, path.name)
    layers, sizes = allocated.layers, allocated.entries.tolist()
    table = {
        "roles": allocated.roles,
        "layers": layers,
        "changed": allocated.active.tolist(),
        "entries": sizes,
    }
    sparse = sum(tensor["kind"] == "sparse" for tensor in report["tensors"].values())
    lines = [f"{path}: {report['bytes']:,} bytes, {report['entries']:,} entries of {sparse} parameters"]
    fingerprint, originals = report["fingerprint"] or "none", "with" if report["originals"] else "without"
    lines += [f"{originals} originals, fingerprint of the base: {fingerprint}"]
    if isinstance(model := delta.settings.get("config"), dict):
        lines += [f"model: {json.dumps(model.get('architectures'))}"]
    told = {name: value for name, value in delta.settings.items() if name not in ("merged", "config")}
    lines += [f"{name}: {json.dumps(value)}" for name, value in told.items()]
    if sparse:
        lines += ["", "changed entries by layer and role", *analysis.allocation_table(allocated)]
    whole = {name: tensor for name, tensor in report["tensors"].items() if tensor["kind"] == "dense"}
    lines += ["", "stored whole"] if whole else []
    lines += [f"  {name}: {'×'.join(map(str, t['shape']))} {t['dtype']}" for name, t in whole.items()]
    lines += [f"picture: {arguments.plot}"] if arguments.plot else []
    _report(arguments, report | {"allocation": table}, *lines)


def run_rewrite(arguments: argparse.Namespace) -> None:
    """`apply` and `revert`."""
    from .delta import load_delta

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
        raise ValueError(f"delta: expected one of a whole model, got one of the PEFT adapter in {folder}: "
                         "put it on the adapter in Python, load_delta(path).apply(model)")  # fmt: skip


def _check_output(arguments: argparse.Namespace) -> None:
    if Path(arguments.output).resolve() == Path(arguments.model).resolve():
        raise ValueError(f"--output: expected another directory than --model, got {arguments.output}")
    if Path(arguments.output).exists() and not Path(arguments.output).is_dir():
        raise ValueError(f"--output: expected a directory, got the file {arguments.output}")


def run_merge(arguments: argparse.Namespace) -> None:
    from .delta import DeltaError, load_delta
    from .delta_merge import merge

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
    lines = [f"{overlapping:,} of {summary['entries']:,} entries overlap, {opposed:,} opposed"]
    worst = sorted(
        (n for n, c in conflicts.items() if c.overlapping), key=lambda n: -conflicts[n].overlapping
    )
    for name in worst[:_SHOWN]:
        entries, overlapping, opposed = conflicts[name]
        lines.append(f"  {name}: {overlapping:,} of {entries:,} overlap, {opposed:,} opposed")
    if len(worst) > _SHOWN:
        lines.append(f"  and {len(worst) - _SHOWN} more parameters (--json lists all)")
    _report(arguments, summary, *lines, _written(summary))


def _merged_facts(deltas: list[Delta], paths: list[Path], whole: str) -> dict[str, Any]:
    """The class and the labels of the model that the merged delta makes; {} where no one class is told."""
    heads = [any(change.indices is None for change in delta.changes.values()) for delta in deltas]
    if whole == "drop" and any(heads):
        return {}  # without the heads it is the base's class again
    facts = [facts_of(delta, path.parent) for delta, path in zip(deltas, paths, strict=True)]
    if whole == "first" and any(heads):
        return facts[heads.index(True)]
    told = [one for one in facts if one]
    return told[0] if told and all(one == told[0] for one in told) else {}


def run_diff(arguments: argparse.Namespace) -> None:
    quiet_transformers()
    import transformers

    from .delta_diff import diff
    from .wrappers import plain_parameters

    config = transformers.AutoConfig.from_pretrained(arguments.tuned)
    kind = transformers.AutoConfig.from_pretrained(arguments.base).model_type
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
    quiet_transformers()
    import transformers

    from .toolkit import load_toolkit_summary

    config = transformers.AutoConfig.from_pretrained(arguments.config or arguments.model)
    base, fresh = load(config, arguments.model, config.dtype or "auto")
    delta = load_toolkit_summary(arguments.summary, base)
    entries = {name for name, change in delta.changes.items() if change.indices is not None}
    check_held("--model", fresh & entries, arguments.model)
    delta.settings["config"] = model_facts(json.loads(config.to_json_string()))
    summary = _save(delta, arguments)
    _report(arguments, summary, f"{summary['entries']:,} entries", _written(summary))


def _save(delta: Delta, arguments: argparse.Namespace) -> dict[str, Any]:
    """Writes the delta to --output; the fields that the summaries share."""
    delta.save(arguments.output, compact=arguments.compact)
    counts = {
        name: delta.inspect()[name] for name in ("entries", "dense_entries", "originals", "fingerprint")
    }
    size = Path(arguments.output).stat().st_size
    return {"command": arguments.command, "output": arguments.output, "bytes": size, **counts}


def _written(summary: dict[str, Any]) -> str:
    return f"written to {summary['output']} ({summary['bytes']:,} bytes)"
