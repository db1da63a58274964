"""The commands on deltas: `id3-optim inspect | apply | revert | merge | diff | convert`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras import require

if TYPE_CHECKING:
    import torch

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
    merge = _add(commands, "merge", run_merge, "add up what several deltas with originals changed")
    merge.add_argument("deltas", nargs="+", metavar="delta", help=_DELTA_HELP)
    merge.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="one for each delta (default: 1)"
    )
    diff = _add(commands, "diff", run_diff, "write the delta between a base and a tuned model")
    diff.add_argument("--base", required=True, help="local directory or hub name")
    diff.add_argument("--tuned", required=True, help="local directory or hub name")
    diff.add_argument("--no-originals", action="store_true", help="smaller, but without revert and merge")
    convert = _add(
        commands, "convert", run_convert, "make a delta of a summary that the method's toolkit saved"
    )
    convert.add_argument("summary", help="file of the toolkit's write_summary_to_disk")
    convert.add_argument("--model", required=True, help="the base: local directory or hub name")
    for command in (merge, diff, convert):
        command.add_argument("--output", required=True, metavar="FILE", help="the delta file to write")
        command.add_argument("--compact", action="store_true", help="indices as gaps: 2 bytes less an entry")


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
    lines += [f"{name}: {json.dumps(value)}" for name, value in delta.settings.items() if name != "merged"]
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

    _quiet_transformers()
    _check_output(arguments)
    path = delta_path(arguments.delta)
    delta = load_delta(path)
    model = load_model(delta, path.parent, arguments.model)
    if arguments.command == "apply":
        delta.apply(model, strict=True)
    else:
        delta.revert(model)
    model.save_pretrained(arguments.output)
    tokenizer = _save_tokenizer([str(path.parent), arguments.model], arguments.output)
    counts = {name: delta.inspect()[name] for name in ("entries", "dense_entries")}
    summary = {"command": arguments.command, "output": arguments.output, "tokenizer": tokenizer, **counts}
    _report(
        arguments, summary, f"written to {arguments.output}{'' if tokenizer else ', without a tokenizer'}"
    )


def _check_output(arguments: argparse.Namespace) -> None:
    if Path(arguments.output).resolve() == Path(arguments.model).resolve():
        raise ValueError(f"--output: expected another directory than --model, got {arguments.output}")
    if Path(arguments.output).exists() and not Path(arguments.output).is_dir():
        raise ValueError(f"--output: expected a directory, got the file {arguments.output}")


def _quiet_transformers() -> None:
    require("transformers", extra="hf")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def load_model(delta: Delta, folder: Path, source: str) -> torch.nn.Module:
    """The model at `source`, as `delta` wants it: its class by the configuration beside the delta, or by its
    own where there is none; each parameter in the dtype that the delta tells.

    A new head holds random numbers; the delta brings all of it.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder if _has_config(folder) else source)
    told = {change.dtype for change in delta.changes.values() if change.indices is not None}
    dtype = told.pop() if len(told) == 1 else config.dtype or torch.float32
    # transformers loads all parameters in one dtype; float32 holds those of half width without loss.
    mixed = any(change.dtype != dtype for change in delta.changes.values())
    model, _ = _load(config, source, torch.float32 if mixed else dtype)
    for name, param in model.named_parameters():
        change = delta.changes.get(name)
        param.data = param.data.to(dtype if change is None else change.dtype)
    return model


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _load(config, source: str, dtype: torch.dtype | str) -> tuple[torch.nn.Module, set[str]]:
    """The model, and the names of its parameters that the checkpoint at `source` lacks."""
    import safetensors
    import transformers

    from .train import load_pretrained

    model_class = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    options = {"config": config, "dtype": dtype, "ignore_mismatched_sizes": True}
    try:
        return load_pretrained(model_class, source, **options)
    except safetensors.SafetensorError as error:
        raise OSError(f"{source}: expected weights as safetensors, got: {error}") from error


def _save_tokenizer(sources: list[str], output: str) -> bool:
    """Copies the first tokenizer found; a source that is no directory is a hub name."""
    import transformers

    for source in sources:
        if not Path(source).is_dir() or (Path(source) / "tokenizer_config.json").is_file():
            transformers.AutoTokenizer.from_pretrained(source).save_pretrained(output)
            return True
    return False


def run_merge(arguments: argparse.Namespace) -> None:
    from .delta import load_delta
    from .delta_merge import merge

    paths = [delta_path(path) for path in arguments.deltas]
    merged, conflicts = merge([load_delta(path) for path in paths], arguments.weights)
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


def run_diff(arguments: argparse.Namespace) -> None:
    _quiet_transformers()
    import transformers

    from .delta_diff import diff
    from .wrappers import plain_parameters

    config = transformers.AutoConfig.from_pretrained(arguments.tuned)
    kind = transformers.AutoConfig.from_pretrained(arguments.base).model_type
    if kind != config.model_type:
        raise ValueError(f"--base: expected a {config.model_type} model as --tuned, got {kind}")
    tuned, missing = _load(config, arguments.tuned, config.dtype or "auto")
    if missing:
        raise ValueError(f"--tuned: expected weights for {min(missing)} in {arguments.tuned}, got none")
    base, fresh = _load(config, arguments.base, tuned.dtype)
    known = {name: param for name, param in plain_parameters(base).items() if name not in fresh}
    delta = diff(known, plain_parameters(tuned), originals=not arguments.no_originals)
    summary = _save(delta, arguments)
    sparse = sum(change.indices is not None for change in delta.changes.values())
    counts = f"{summary['entries']:,} entries of {sparse} parameters differ"
    whole = [name for name, change in delta.changes.items() if change.indices is None]
    lines = [counts, *([f"stored whole: {', '.join(whole)}"] if whole else []), _written(summary)]
    _report(arguments, summary | {"whole": whole}, *lines)


def run_convert(arguments: argparse.Namespace) -> None:
    _quiet_transformers()
    import transformers

    from .toolkit import load_toolkit_summary

    config = transformers.AutoConfig.from_pretrained(arguments.model)
    base, _ = _load(config, arguments.model, config.dtype or "auto")
    summary = _save(load_toolkit_summary(arguments.summary, base), arguments)
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
