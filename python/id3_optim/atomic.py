"""Files and directories that appear whole: a killed process leaves the old one or the new one."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

_STALE_SECONDS = 3600.0  # longer than any write takes


def write(path: str | os.PathLike, content: bytes, what: str) -> None:
    """Writes a file at path, which holds the old content or the new one afterwards, never a part.

    A symbolic link is followed. what: names the content in an error, as in "a delta". Raises OSError (for a
    full disk with the path and the bytes needed) and removes the unfinished file. A killed process can leave
    a `.<name>.<hex>.partial` beside the file, which a later write to the same name removes once it is an
    hour old.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"path: expected a file name, got {target}, which is not a regular file")
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        reason = f"{error.strerror}: {what} of {len(content)} bytes was not written"
        raise OSError(error.errno, reason, str(target)) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)
    sync_directory(target.parent)
    _remove_stale(target.parent, f".{target.name}.")


@contextlib.contextmanager
def directory(path: str | os.PathLike, last: str) -> Iterator[Path]:
    """`with directory(path, last) as unfinished:` moves what the block wrote to `unfinished` into `path`.

    `unfinished` is a hidden directory in `path`, so that both lie on one disk. After the block its files
    replace those of the same names in `path`. The one named `last`, without which no reader takes the
    directory for a result, is removed from `path` first and moved last. After an error `path` is as it was. A
    killed process can leave `.<hex>.partial` in `path`, which a later call removes once it is an hour old.
    """
    target = Path(path)
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    unfinished = target / f".{secrets.token_hex(8)}.partial"
    try:
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.rglob("*"):
            sync(file)
        (target / last).unlink(missing_ok=True)
        for file in sorted(unfinished.iterdir(), key=lambda file: file.name == last):
            os.replace(file, target / file.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if made:
            with contextlib.suppress(OSError):  # not empty: the block succeeded
                target.rmdir()
    sync_directory(target)
    _remove_stale(target, ".")


def contents(path: str | os.PathLike) -> list[str]:
    """The names in a directory, without what killed processes left; none where there is no directory."""
    left = re.compile(r"\.[0-9a-f]{16}\.partial")
    return [name for name in os.listdir(path) if not left.fullmatch(name)] if os.path.isdir(path) else []


def sync(path: Path) -> None:
    """Waits until the disk has a file or a directory, where the system supports that."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_directory(directory: Path) -> None:
    """Makes renames durable where the file system supports it; some network file systems do not."""
    with contextlib.suppress(OSError):
        sync(directory)


def _remove_stale(folder: Path, prefix: str) -> None:
    """Removes what killed writers left. Ages are differences of the file system's own clock."""
    pattern = re.compile(re.escape(prefix) + "[0-9a-f]{16}" + re.escape(".partial"))
    with contextlib.suppress(OSError), os.scandir(folder) as listing:
        newest = folder.stat().st_mtime
        for entry in listing:
            if pattern.fullmatch(entry.name) and newest - _changed(Path(entry.path)) > _STALE_SECONDS:
                _remove(Path(entry.path))


def _changed(path: Path) -> float:
    """When a file, or the newest file in a directory, was last written to."""
    return max(p.stat().st_mtime for p in (path, *path.glob("*")))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()
