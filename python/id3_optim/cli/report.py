"""The report of a training run: numbers as JSON, and the main ones as a table."""

import json
import math
from pathlib import Path
from statistics import fmean

import torch

from ..analysis import count_changed
from ..ranks import world_size
from .output import write_text


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state, parameters and gradients not counted."""
    if hasattr(optimizer, "memory_report"):
        return optimizer.memory_report()["total"]
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if torch.is_tensor(value))


def summarise(settings, start, optimizer: torch.optim.Optimizer, run) -> dict:
    """The report of a run as plain numbers: metrics, entries, bytes, milliseconds of a step (means).

    Bytes and times are those of this process; where parameters are split, every process has to call this.
    """
    steps = max(len(run.clock.step_seconds), 1)
    step_ms = 1e3 * fmean(run.clock.step_seconds or [0.0])
    optimizer_ms = 1e3 * fmean(run.clock.optimizer_seconds or [0.0])
    is_id3 = hasattr(optimizer, "phase_seconds")
    # On a GPU the optimizer's clock measures the time to issue the work, not the work itself.
    on_cpu = all(p.device.type == "cpu" for p in start.model.parameters())
    phases = optimizer.phase_seconds if is_id3 and on_cpu else {}
    phases_ms = {name: 1e3 * s / steps for name, s in phases.items()}
    entries = {name: p.numel() for name, p in start.model.named_parameters() if p.requires_grad}
    dense = sum(entries[name] for name in start.fresh if name in entries)
    total = sum(entries.values())
    chooses = is_id3 and not all(group["dense"] for group in optimizer.param_groups)
    return {
        "metrics": run.metrics,
        "entries": {
            "total": total - dense,
            "dense": dense,
            "active": optimizer.n_active if chooses else total - dense,
            "changed": count_changed(optimizer) if chooses else None,
        },
        "optimizer_bytes": state_bytes(optimizer),
        "optimizer_memory": optimizer.memory_report() if is_id3 else {},
        "step_ms": {
            "total": step_ms,
            "forward_backward": step_ms - (sum(phases_ms.values()) or optimizer_ms),
            **(phases_ms or {"update": optimizer_ms}),
        },
        "steps": len(run.clock.step_seconds),
        "processes": world_size(),
        "dense_parameters": sorted(start.fresh),
        "settings": settings.__dict__ | {"text_column": list(settings.text_column)},
        "optimizer": optimizer.settings() if is_id3 else {"method": "adamw"},
        "history": run.history,
    }


def table(report: dict) -> str:
    """The report's main numbers, one a line."""
    entries, step_ms = report["entries"], report["step_ms"]
    rows = [(_shown(name), f"{value:.4f}") for name, value in report["metrics"].items()]
    if entries["changed"] is not None:
        share = entries["changed"] / max(entries["total"], 1)
        rows.append(("entries changed", f"{entries['changed']:,} of {entries['total']:,} ({share:.3%})"))
    else:
        rows.append(("entries trained", f"{entries['active']:,} of {entries['total']:,}"))
    if entries["dense"]:
        rows.append(("entries of the dense group", f"{entries['dense']:,}"))
    rows.append(("optimizer state", f"{report['optimizer_bytes']:,} bytes"))
    rows.append(("step", f"{step_ms['total']:.1f} ms"))
    names = {"forward_backward": "forward, backward", "select": "select", "update": "update"}
    rows += [(f"  {names[key]}", f"{step_ms[key]:.1f} ms") for key in names if key in step_ms]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _shown(metric: str) -> str:
    """`eval_token_loss` is the token loss, `also_` that on --also-eval, `before_` that before."""
    file, _, name = metric.partition("_")
    words = {"eval": "{}", "also": "also {}", "before": "also {}, before"}
    return words[file].format(name.replace("_", " "))


def plain(value):
    """The value as JSON has it: NaN and infinities, which JSON lacks, are None; keys are texts."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_report(path: str | Path, report: dict) -> None:
    """Writes JSON; NaN and infinities, which JSON lacks, are written as null. Makes the directory.

    The file holds the old report or the new one afterwards, never a part.
    """
    write_text(path, json.dumps(plain(report), indent=2) + "\n")
