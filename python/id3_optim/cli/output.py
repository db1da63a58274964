"""Where `id3-optim train` writes: checks before the first step, and files that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .. import atomic
from ..ranks import launched, meet, writes_files
from .settings import Settings, option

UNFINISHED = "unfinished"  # in the output directory: the checkpoint that is being written
# Of an earlier run: what a result of another kind would leave behind, and what the first step removes.
_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
_TOKENIZER = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
_TOKENIZER += ("special_tokens_map.json", "chat_template.jinja", "generation_config.json")
_RESULTS = (*_WEIGHTS, *_TOKENIZER, "delta.safetensors", "plots.png")
_ALONG_THE_WAY = ("checkpoint-*[0-9]", "delta-*[0-9].safetensors", "runs/events.out.tfevents.*")


def check_paths(settings: Settings) -> None:
    """Raises ValueError or OSError where the run would overwrite something, or could not write its files.

    Writes nothing that stays.
    """
    _check_apart_from_model(settings)
    check_writable("--output", Path(settings.output))
    _check_new(settings)
    if settings.report:
        report = Path(settings.report)
        if report.is_dir():
            raise ValueError(f"--report: expected a file name, got the folder {report}")
        for name in ("train", "eval", "also_eval"):
            path = getattr(settings, name)
            if path is not None and _same(report, Path(path)):
                raise ValueError(f"--report: expected another file than {option(name)}, got {report}")
        check_writable("--report", report.parent)


def _check_new(settings: Settings) -> None:
    output = Path(settings.output)
    if _contents(output) and not (settings.resume or settings.overwrite):
        raise ValueError(
            f"--output: expected a new or an empty folder, got {output} with {min(_contents(output))} in it; "
            "--resume goes on with its run, --overwrite replaces its results"
        )


def _check_apart_from_model(settings: Settings) -> None:
    output, model = Path(settings.output), Path(settings.model)
    if os.path.normpath(output) == os.path.normpath(model) or _same(output, model):
        raise ValueError(f"--output: expected another folder than --model, got {output}")
    if model.exists() and output.resolve() in model.resolve().parents:
        raise ValueError(f"--output: expected a folder that does not hold --model, got {output}")


def _same(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and a.samefile(b)


def _contents(output: Path) -> list[str]:
    """The names in a folder, without what a killed run was writing."""
    return [name for name in atomic.contents(output) if name != UNFINISHED]


def check_writable(option: str, folder: Path) -> None:
    """Raises ValueError or OSError unless files can be made in the folder, which need not exist yet."""
    absolute = folder.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ValueError(f"{option}: expected a folder, got {existing}, which is none")
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"{option}: expected a folder to write to, got {existing}: {error.strerror}") from None


@contextlib.contextmanager
def holding(settings: Settings) -> Iterator[None]:
    """Makes the output directory, removes what a killed run was writing, and keeps other runs out.

    Raises ValueError where another run holds the directory, or has written a result since `check_paths`.
    """
    meet()  # every process has checked the folder
    output = Path(settings.output)
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output) if writes_files() else contextlib.nullcontext():
        if writes_files():
            _check_new(settings)
        remove_unfinished(output)
        meet()
        yield


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the folder itself, so that no file of a killed process is left; not on Windows."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"--output: expected a folder that no other run writes to, got {folder}; give each run its own"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(place)


def remove_earlier(output: Path) -> None:
    """Removes what an earlier run wrote along its way; of several processes the first does.

    Results (weights, delta, tokenizer) stay until `publishing` replaces them. Files of other names always
    stay.
    """
    if writes_files():
        for path in (path for name in _ALONG_THE_WAY for path in output.glob(name)):
            remove(path)


def remove_unfinished(output: Path) -> None:
    """Removes what a run was writing into the directory; of several processes the first does."""
    if writes_files():
        remove(output / UNFINISHED)


@contextlib.contextmanager
def first_prints() -> Iterator[None]:
    """Within the block the first of a launcher's processes prints, and no other one."""
    if launched()[0] == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def remove(path: Path) -> None:
    """Removes a file or a folder; does nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def publishing(output: Path) -> Iterator[Path]:
    """`with publishing(output) as folder:` moves what the block wrote to `folder` into `output`.

    Only when the block has succeeded do its files replace those of their names, and weights, deltas or parts
    of a tokenizer that it did not write are removed: `output` holds the old result or the new one.
    """
    with atomic.directory(output, last="config.json") as folder:
        yield folder
        written = {path.name for path in folder.iterdir()}
    for path in (path for pattern in _RESULTS for path in output.glob(pattern)):
        if path.name not in written:
            remove(path)


def write_text(path: str | Path, text: str) -> None:
    """Writes a file, which holds the old text or the new one afterwards. Makes its directory.

    A device or a pipe, such as /dev/stdout, is written to directly.
    """
    path = Path(path)
    if path.absolute().is_relative_to("/dev") or (path.exists() and not path.is_file()):
        path.write_text(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, text.encode(), "a report")
