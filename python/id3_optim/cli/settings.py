"""The settings of `id3-optim train`, and the checks that need neither the model nor transformers."""

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from id3_kernels import backend

from .. import compatibility, method_table, schedules
from ..heuristics import D3
from ..method import Method, Prune, share_of
from . import reading
from .processes import check_processes, exchanges

T = TypeVar("T")
# Setting: its least value.
_LEAST = {"steps": 1, "batch_size": 1, "accumulate": 1, "log_every": 1, "max_length": 2, "warmup": 0}
_LEAST |= {"save_every": 1, "keep": 1, "eval_every": 1, "weight_decay": 0, "max_grad_norm": 0, "seed": 0}
_LEAST |= {"select_every": 1, "entry_warmup": 0, "prune": 1}
_POSITIVE = ("epochs", "lr", "head_lr")
HEURISTICS = ("d3", "d3-relative", "magnitude", "random", "bias")
_NOT_WITH_A_MASK = {
    "method": "it chooses entries too",
    "save_at": "all entries join at once",
    "save_every": "a run that is resumed would train twice again",
}
_SEEDS = 2**32  # numpy's generator takes no larger ones


@dataclass(frozen=True)
class Settings:
    """The options of `id3-optim train`; the command's help explains each."""

    model: str
    train: str
    eval: str
    output: str
    also_eval: str | None = None
    task: str | None = None
    text_column: tuple[str, ...] = ("text",)
    label_column: str = "label"
    max_length: int = 256
    pooling: str = "first"
    optimizer: str = "id3"
    method: str | None = None
    leave_out: tuple[str, ...] = ()
    mask: str | None = None
    reuse_mask: bool = False
    budget: int | float = 0.005
    heuristic: str = "d3"
    eps: float = 1.0
    exp: float = 2.0
    strategy: str = "increment"
    schedule: str = "uniform"
    select_every: int = 1
    bias_correction: str = "tensor"
    entry_warmup: int = 0
    tensor_cap: float | None = None
    prune: int | None = None
    prune_share: float = 0.1
    epochs: float = 3.0
    steps: int | None = None
    lr: float = 1e-3
    head_lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.05
    lr_scheduler: str = "linear"
    max_grad_norm: float = 1.0
    batch_size: int = 16
    accumulate: int = 1
    group_by_length: bool = False
    seed: int = 42
    bf16: bool = False
    checkpointing: bool = False
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
    if settings.heuristic not in HEURISTICS:
        raise ValueError(f"--heuristic: expected one of {', '.join(HEURISTICS)}, got {settings.heuristic!r}")
    if settings.backend is not None:
        _check_alone("backend", lambda: backend.require(settings.backend))
    for name in ("tensor_cap", "prune_share"):
        if (share := getattr(settings, name)) is not None:
            share_of(option(name), share)
    _check_pairs(settings)
    _check_mask(settings)
    _check_method(settings)
    _check_selection(settings)
    check_processes(settings)
    _check_save_at(settings)
    reading.check_columns(settings.text_column, settings.label_column)
    reading.check_format(settings.encoding, settings.delimiter)
    for name in ("train", "eval", "also_eval"):
        if (path := getattr(settings, name)) is not None:
            _check_file(name, path)
    for name in settings.report_to:
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"--report-to: expected {name} to be installed, got none; pip install {name}")


def _check_file(name: str, path: str) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{option(name)}: expected a file, got {path}, which is none")


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


def optimizer_options(settings: Settings) -> dict[str, Any]:
    """The arguments of ID3AdamW that no method decides."""
    return {
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm or None,
        "backend": settings.backend,
        "release_gradients": settings.release_gradients,
        "process_group": torch.distributed.group.WORLD if exchanges(settings) else None,
        **_of_selection(settings),
    }


def _of_selection(settings: Settings) -> dict[str, Any]:
    names = ("select_every", "bias_correction", "entry_warmup", "tensor_cap")
    prune = None if settings.prune is None else Prune(settings.prune, settings.prune_share)
    own = {"schedule": schedules.from_name(settings.schedule), "prune": prune}
    return own | {name: getattr(settings, name) for name in names}


def _check_selection(settings: Settings) -> None:
    """Raises ValueError for options of the optimizer that do not go together."""
    if settings.optimizer == "id3":
        chosen = {"budget_given": settings.budget, "strategy": settings.strategy, "heuristic": D3()}
        released = settings.release_gradients or settings.sparse_backward
        with naming_options("prune", "tensor_cap", "release_gradients"):
            method = Method(**chosen, max_grad_norm=None, keep_originals=True, **_of_selection(settings))
            compatibility.check_options(method, released, "last", capturable=False)


def _check_mask(settings: Settings) -> None:
    """Raises ValueError or FileNotFoundError for a mask beside what would choose entries too."""
    given = [name for name in ("mask", "reuse_mask") if getattr(settings, name)]
    if not given:
        return
    if len(given) > 1:
        raise ValueError("--reuse-mask: does not apply to --mask: it is a mask too")
    name = option(given[0])
    for unfit, why in _NOT_WITH_A_MASK.items():
        if getattr(settings, unfit) and (settings.reuse_mask or unfit != "save_every"):
            raise ValueError(f"{name}: does not apply to {option(unfit)}: {why}")
    if settings.optimizer != "id3":
        raise ValueError(f"--optimizer: expected id3 with {name}, got {settings.optimizer}")
    defaults = Settings.__dataclass_fields__
    for decided in ("heuristic", "strategy", "schedule"):
        if settings.mask and getattr(settings, decided) != defaults[decided].default:
            raise ValueError(f"{option(decided)}: does not apply to --mask: the mask decides it")
    if settings.mask:
        _check_file("mask", settings.mask)


def _check_method(settings: Settings) -> None:
    """Raises ValueError for options that a method decides itself, or that its pool excludes."""
    name = settings.method
    if name is None:
        if settings.leave_out:
            raise ValueError("--leave-out: expected --method with it, got none")
        return
    _check_alone("method", lambda: method_table.check_name(name))
    defaults = {f: Settings.__dataclass_fields__[f].default for f in ("optimizer", "heuristic", "strategy")}
    for given, default in defaults.items():
        if getattr(settings, given) != default:
            raise ValueError(f"{option(given)}: does not apply to --method: {name} decides it")
    if (settings.release_gradients or settings.sparse_backward) and method_table.needs_whole_gradients(name):
        raise ValueError(f"--method {name}: does not apply to released gradients: it reads whole ones")
    if name == "head" and settings.head_lr is not None:
        raise ValueError("--head-lr: does not apply to --method head: --lr is the head's")
    for unfit in ("delta_only", "save_at", "save_every", "release_gradients", "sparse_backward"):
        if getattr(settings, unfit) and not method_table.trains_entries(name):
            raise ValueError(f"{option(unfit)}: does not apply to --method {name}: it trains whole tensors "
                             "or an adapter")  # fmt: skip


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
