"""What `--methods` and `--lr` say: a name, and the settings of `id3-optim train` that differ under it."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, fields
from typing import Any

from ... import methods
from ..options import budget
from ..settings import Settings

# Name: the settings that make it; `budget` None: the method has none.
NAMED: dict[str, dict[str, Any]] = {name: {"method": name} for name in methods.names()}
NAMED |= {name: {"method": name, "budget": None} for name in ("head", "adapter")}
NAMED["head"]["head_lr"] = None  # its rate is `lr`
NAMED |= {"full": {"optimizer": "adamw", "budget": None}}
# So that eps, exp, heuristic and strategy may differ.
NAMED |= {"id3": {}, "static-d3": {"strategy": "static"}, "repeat-d3": {"strategy": "repeat"}}
# No part of a run's key: `Plan.facts` has the contents, or they change nothing.
IN_FACTS = {
    "model",
    "train",
    "eval",
    "also_eval",
    "task",
    "text_column",
    "label_column",
    "encoding",
    "delimiter",
}
IN_FACTS |= {"output", "overwrite", "resume", "report", "save_plots", "epochs", "cpu"}
# Nor can a method change those that have an option of their own, or that keep files.
_NOT_IN_A_METHOD = IN_FACTS | {"seed", "steps", "budget", "method", "save_every", "save_at", "keep"}
_NOT_IN_A_METHOD |= {"mask", "memory_report"}  # mask: a file; `reuse_mask` has the mask of each seed


@dataclass(frozen=True)
class Method:
    """name: as typed, less learning rates. changes: settings. rates: its own, else those of `--lr`."""

    name: str
    changes: tuple[tuple[str, Any], ...] = ()
    rates: tuple[float, ...] | None = None

    @property
    def has_budget(self) -> bool:
        return ("budget", None) not in self.changes


def read_rates(text: str) -> tuple[float, ...]:
    """Reads learning rates: `1e-3` is one, `1e-4:1.6e-3` doubles from the first up to the second.

    Raises ArgumentTypeError, with the text as typed, for anything else.
    """
    try:
        first, last = (float(part) for part in (text.split(":") if ":" in text else (text, text)))
    except ValueError:
        first = last = 0.0
    if not 0.0 < first <= last < math.inf:
        expected = "expected a learning rate above 0 (1e-3) or a range to double through (1e-4:1.6e-3)"
        raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")
    rates = [first]
    while rates[-1] * 2 <= last * 1.01 and len(rates) < 64:
        rates.append(float(f"{rates[-1] * 2:.6g}"))
    return tuple(rates)


def read_method(text: str) -> Method:
    """Reads `NAME` or `NAME:SETTING=VALUE,SETTING=VALUE`, as in `id3:eps=0.5,select_every=16,lr=1e-4:1e-2`.

    Raises ArgumentTypeError for a name or a setting that there is not, and for values of another type.
    """
    name, _, rest = text.partition(":")
    if name not in NAMED:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(NAMED)}, got {name!r}")
    changes, rates, parts = dict(NAMED[name]), None, list(filter(None, rest.split(",")))
    for part in parts:
        setting, _, value = part.partition("=")
        setting = setting.strip().replace("-", "_")
        if setting == "lr":
            rates = read_rates(value)
        else:
            changes[setting] = _value(setting, value, text)
    if "leave_out" in changes and name in methods.names():  # a plain run of train leaves nothing out
        decided = {k: v for k, v in NAMED[name].items() if k != "budget"}.items()  # by the method then
        changes = dict(change for change in changes.items() if change not in decided) | {"method": name}
    shown = ",".join(part for part in parts if not part.strip().startswith("lr="))
    return Method(f"{name}:{shown}" if shown else name, tuple(sorted(changes.items())), rates)


def _value(setting: str, value: str, text: str) -> Any:
    """The value of a setting in its own type. Raises ArgumentTypeError."""
    types = {field.name: field.type for field in fields(Settings) if field.name not in _NOT_IN_A_METHOD}
    if setting not in types:
        raise argparse.ArgumentTypeError(f"expected settings of train such as eps=0.5, got {text!r}")
    kind = types[setting].__name__ if isinstance(types[setting], type) else str(types[setting])
    if kind.startswith("str"):
        return value
    if kind.startswith("tuple[str"):
        return tuple(value.split("+"))
    if setting == "budget":
        return budget(value)
    try:
        read = json.loads(value.lower())
    except ValueError:
        read = None
    allowed = (bool,) if kind == "bool" else (int,) if kind.startswith("int") else (int, float)
    if not isinstance(read, allowed) or (isinstance(read, bool) and bool not in allowed):
        raise argparse.ArgumentTypeError(f"expected {setting} as {kind}, got {value!r} in {text!r}")
    return float(read) if kind.startswith("float") else read
