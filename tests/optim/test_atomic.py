"""Directories that are filled whole or not at all. Files: `test_delta_write.py`."""

import errno
import os
from pathlib import Path

import pytest

from id3_optim import atomic


def fill(path, **files):
    with atomic.directory(path, last="config") as unfinished:
        for name, text in files.items():
            (unfinished / name).write_text(text)


def held(path):
    return {str(f.relative_to(path)): f.read_text() for f in Path(path).rglob("*") if f.is_file()}


@pytest.mark.parametrize("before", ["no directory", "an empty one", "a link to one"])
def test_a_directory_is_filled(tmp_path, before):
    out, real = tmp_path / "deep" / "out", tmp_path / "real"
    if before != "no directory":
        out.parent.mkdir()
        (real if before == "a link to one" else out).mkdir()
    if before == "a link to one":
        out.symlink_to(real)
    fill(out, config="c", weights="w")
    assert held(out) == {"config": "c", "weights": "w"} == {name: held(out)[name] for name in os.listdir(out)}
    assert out.is_symlink() == (before == "a link to one")


def test_files_are_replaced_and_other_files_stay(tmp_path):
    fill(tmp_path, config="old", weights="old", notes="mine")
    fill(tmp_path, config="new", weights="new")
    assert held(tmp_path) == {"config": "new", "weights": "new", "notes": "mine"}


@pytest.mark.parametrize("exists", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, exists):
    out = tmp_path / "out"
    if exists:
        fill(out, config="old", weights="old")
    with pytest.raises(OSError, match="No space left"), atomic.directory(out, "config") as unfinished:
        (unfinished / "weights").write_text("new")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert out.exists() == exists and (held(out) if exists else {}) == (
        {"config": "old", "weights": "old"} if exists else {}
    )


def test_the_last_file_is_gone_while_the_first_are_replaced(tmp_path, monkeypatch):
    """A process killed between two renames leaves a directory that no reader takes for a result."""
    fill(tmp_path, config="old", a="old", z="old")
    seen, replace = [], os.replace

    def watched(source, target):
        seen.append((Path(target).name, (tmp_path / "config").exists()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    fill(tmp_path, config="new", a="new", z="new")
    assert sorted(seen[:2]) == [("a", False), ("z", False)] and seen[2:] == [("config", False)]


def test_what_killed_processes_left_counts_for_nothing_and_is_removed_when_old(tmp_path):
    old, young, busy = (tmp_path / f".{digit * 16}.partial" for digit in "012")
    for left in (old, young, busy):
        left.mkdir()
        (left / "weights").write_text("half")
    assert atomic.contents(tmp_path) == []
    long_ago = young.stat().st_mtime - 4000
    for path in (old / "weights", old, busy):  # of `busy` a file is still written to
        os.utime(path, (long_ago, long_ago))
    fill(tmp_path, config="c")
    assert sorted(os.listdir(tmp_path)) == sorted([young.name, busy.name, "config"])
    assert atomic.contents(tmp_path) == ["config"] and atomic.contents(tmp_path / "none") == []
