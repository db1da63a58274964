"""The settings of `id3-optim train`, and the checks that need neither the model nor transformers."""

import codecs
import contextlib
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from id3_kernels import backend

from .. import methods, schedules
from ..heuristics import D3
from ..ranks import launched

T = TypeVar("T")
# Setting: its least value.
_LEAST = {"steps": 1, "batch_size": 1, "accumulate": 1, "log_every": 1, "max_length": 2, "warmup": 0}
_LEAST |= {
    "save_every": 1,
    "keep": 1,
    "select_every": 1,
    "eval_every": 1,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "seed": 0,
}
_POSITIVE = ("epochs", "lr", "head_lr")
_SEEDS = 2**32  # numpy's generator takes no larger ones


@dataclass(frozen=True)
class Settings:
    """The options of `id3-optim train`; the command's help explains each."""

    model: str
    train: str
    eval: str
    output: str
    task: str | None = None
    text_column: tuple[str, ...] = ("text",)
    label_column: str = "label"
    max_length: int = 256
    pooling: str = "first"
    optimizer: str = "id3"
    method: str | None = None
    leave_out: tuple[str, ...] = ()
    budget: int | float = 0.005
    heuristic: str = "d3"
    eps: float = 1.0
    exp: float = 2.0
    strategy: str = "increment"
    schedule: str = "uniform"
    select_every: int = 1
    bias_correction: str = "tensor"
    epochs: float = 3.0
    steps: int | None = None
    lr: float = 1e-3
    head_lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    batch_size: int = 16
    accumulate: int = 1
    seed: int = 42
    bf16: bool = False
    release_gradients: bool = False
    sparse_backward: bool = False
    fsdp: bool = False
    memory_report: bool = False
    backend: str | None = None
    cpu: bool = False
    delta_only: bool = False
    originals: bool = False
    save_every: int | None = None
    keep: int | None = None
    resume: bool = False
    save_at: tuple[int | float, ...] = ()
    log_every: int = 10
    eval_every: int | None = None
    encoding: str = "utf-8"
    delimiter: str | None = None
    overwrite: bool = False
    report: str | None = None
    report_to: tuple[str, ...] = ()
    save_plots: bool = False


def option(name: str) -> str:
    """The option of the command line for a setting: `--batch-size` for `batch_size`."""
    return f"--{name.replace('_', '-')}"


def notes(settings: Settings) -> list[str]:
    """What a run would otherwise do without a word."""
    if settings.optimizer == "id3" and settings.budget == 0:
        return [
            "--budget 0: no entry of the model is trained; parameters that are new in it (a head) alone are"
        ]
    return []


def check_settings(settings: Settings) -> None:
    """Raises ValueError or FileNotFoundError for settings that would fail late in training, or not at all."""
    for name in (*_LEAST, *_POSITIVE):
        value = getattr(settings, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{option(name)}: expected a finite number, got {value}")
        if value is not None and name in _LEAST and value < _LEAST[name]:
            raise ValueError(f"{option(name)}: expected at least {_LEAST[name]}, got {value}")
        if value is not None and name in _POSITIVE and value <= 0:
            raise ValueError(f"{option(name)}: expected more than 0, got {value}")
    if settings.seed >= _SEEDS:
        raise ValueError(f"--seed: expected less than {_SEEDS}, got {settings.seed}")
    _check_alone("schedule", lambda: schedules.from_name(settings.schedule))
    _check_alone("budget", lambda: schedules.check_budget(settings.budget))
    _check_d3(settings)
    if settings.backend is not None:
        _check_alone("backend", lambda: backend.require(settings.backend))
    _check_pairs(settings)
    _check_method(settings)
    _check_processes(settings)
    _check_save_at(settings)
    _check_data(settings)
    for name in settings.report_to:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"--report-to: expected {name} to be installed, got none; pip install {name}")


def _check_alone(name: str, check: Callable[[], T], argument: str | None = None) -> T:
    """What the library's own check of one argument returns; its error gets the option's name."""
    try:
        return check()
    except ValueError as error:
        raise ValueError(f"{option(name)}: {str(error).removeprefix(f'{argument or name}: ')}") from None


@contextlib.contextmanager
def naming_options(*arguments: str) -> Iterator[None]:
    """Errors of the library that begin with one of these arguments begin with the option of that name."""
    try:
        yield
    except ValueError as error:
        name, colon, text = str(error).partition(": ")
        if not colon or name not in arguments:
            raise
        raise ValueError(f"{option(name)}: {text}") from error


def resolved_budget(settings: Settings, entries: int) -> int:
    """The budget as a number of entries, out of so many.

    Raises ValueError for a budget, or one of `save_at`, that is out of range.
    """
    budget = _check_alone("budget", lambda: schedules.resolve_budget(settings.budget, entries))
    for given in settings.save_at:
        at = _check_alone("save_at", lambda given=given: schedules.resolve_budget(given, entries), "budget")
        if not 0 < at <= budget:
            raise ValueError(
                f"--save-at: expected 1 to {budget} entries (--budget), got {given}, which is {at} entries"
            )
    return budget


def _check_d3(settings: Settings) -> None:
    try:
        D3(eps=settings.eps, exp=settings.exp)
    except ValueError as error:
        message = f"--{error}"  # it begins with `eps` or `exp`
        raise ValueError(message) from None


def _check_pairs(settings: Settings) -> None:
    """Raises ValueError for options that need another one, or exclude one."""
    if settings.optimizer != "id3":
        names = ("delta_only", "save_at", "release_gradients", "sparse_backward", "memory_report")
        for name in names:
            if getattr(settings, name):
                raise ValueError(f"--optimizer: expected id3 with {option(name)}, got {settings.optimizer}, "
                                 "which changes every entry")  # fmt: skip
    if settings.sparse_backward and settings.strategy == "repeat":
        raise ValueError("--sparse-backward: does not apply to --strategy repeat: entries that come back "
                         "need whole gradients")  # fmt: skip
    if settings.originals and not (settings.delta_only or settings.save_at or settings.save_every):
        raise ValueError("--originals: expected --delta-only, --save-at or --save-every with it, got none")
    if settings.keep and not settings.save_every:
        raise ValueError("--keep: expected --save-every with it, got none")
    if settings.resume and settings.overwrite:
        raise ValueError("--overwrite: does not apply to --resume: the run goes on with what is there")


def _check_method(settings: Settings) -> None:
    """Raises ValueError for options that a method decides itself, or that its pool excludes."""
    name = settings.method
    if name is None:
        if settings.leave_out:
            raise ValueError("--leave-out: expected --method with it, got none")
        return
    _check_alone("method", lambda: methods.check_name(name))
    defaults = {f: Settings.__dataclass_fields__[f].default for f in ("optimizer", "heuristic", "strategy")}
    for given, default in defaults.items():
        if getattr(settings, given) != default:
            raise ValueError(f"{option(given)}: does not apply to --method: {name} decides it")
    pool = name not in methods.SELECTIVE
    for unfit in ("delta_only", "save_at", "save_every", "release_gradients", "sparse_backward"):
        if pool and getattr(settings, unfit):
            raise ValueError(f"{option(unfit)}: does not apply to --method {name}: it trains whole tensors "
                             "or an adapter")  # fmt: skip


def _check_processes(settings: Settings) -> None:
    """Raises ValueError for options that several processes exclude, and for `fsdp` outside a launcher."""
    if not settings.fsdp:
        if settings.release_gradients and launched()[1] > 1:
            raise ValueError("--release-gradients: needs --fsdp with several processes: without it each of "
                             "them averages whole gradients")  # fmt: skip
        return
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "--fsdp: expected the processes of a launcher, got none; start the command by "
            "`torchrun --nproc-per-node GPUS -m id3_optim.cli train …`"
        )
    reasons = {
        "method": "it trains what --optimizer, --heuristic and --strategy say",
        "sparse_backward": "it needs whole weights",
        "memory_report": "the prediction is that of one process",
    }
    for name, reason in reasons.items():
        if getattr(settings, name):
            raise ValueError(f"{option(name)}: does not apply to --fsdp: {reason}")


def _check_save_at(settings: Settings) -> None:
    """Raises ValueError for budgets of `save_at` that the run does not pass through."""
    for budget in settings.save_at:
        _check_alone("save_at", lambda budget=budget: schedules.check_budget(budget), "budget")
        if type(budget) is type(settings.budget) and not 0 < budget <= settings.budget:
            raise ValueError(f"--save-at: expected more than 0 and at most --budget, {settings.budget}, "
                             f"got {budget}")  # fmt: skip
    if settings.save_at and settings.strategy != "increment":
        raise ValueError(f"--strategy: expected increment with --save-at, got {settings.strategy}, which has "
                         "the whole budget from the first step on")  # fmt: skip


def _check_data(settings: Settings) -> None:
    """Raises ValueError or FileNotFoundError for files and columns that cannot be read."""
    columns = settings.text_column
    if len(columns) not in (1, 2):
        raise ValueError(f"--text-column: expected one or two columns, got {len(columns)}")
    if len({*columns, settings.label_column}) < len(columns) + 1:
        given = ", ".join(map(repr, columns))
        raise ValueError(
            f"--text-column: expected each column once and not --label-column, {settings.label_column!r}, "
            f"got {given}"
        )
    try:
        codecs.lookup(settings.encoding)
        "".encode(settings.encoding)  # refuses codecs that are no encodings of text, such as hex
    except LookupError:
        raise ValueError(
            f"--encoding: expected a name such as utf-8, utf-16 or latin-1, got {settings.encoding!r}"
        ) from None
    delimiter = settings.delimiter
    if delimiter is not None and (len(delimiter) != 1 or delimiter in '"\r\n \0'):
        raise ValueError(f"--delimiter: expected one character, such as ';' or tab, got {delimiter!r}")
    for name in ("train", "eval"):
        path = getattr(settings, name)
        if not Path(path).is_file():
            raise FileNotFoundError(f"{option(name)}: expected a file, got {path}, which is none")
