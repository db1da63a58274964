"""The results of a comparison in one SQLite file: each run is there whole, or not at all."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..report import plain
from ..settings import Settings
from .grid import Plan, Trial, key, possible
from .methods import Method

_OWN = 0x1D30C0DE  # SQLite's application_id of these files
_TABLES = """
create table if not exists runs
    (key text primary key, trial text not null, report text not null, active blob);
create table if not exists plans (id integer primary key, plan text not null);
"""
_NEWEST = "select plan from plans order by id desc limit 1"


class Store:
    """An open file of results. Use it in a `with` block.

    Raises ValueError for a file of another kind; with `create=False` FileNotFoundError where there is none.
    """

    def __init__(self, path: str | Path, create: bool = True) -> None:
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise FileNotFoundError(
                f"results: expected a file of compare --results, got {path}, which is none"
            )
        if create and (self.path.is_dir() or not self.path.absolute().parent.is_dir()):
            raise ValueError(f"--results: expected a file in an existing folder, got {path}")
        with self._reading():
            self._file = sqlite3.connect(self.path, timeout=60.0)
            self._begin()

    def _begin(self) -> None:
        """Makes the tables of a new file; ValueError for a file of another program."""
        (own,) = self._file.execute("pragma application_id").fetchone()
        (tables,) = self._file.execute("select count(*) from sqlite_master").fetchone()
        if tables and own != _OWN:
            raise ValueError(
                f"results: expected a file of compare --results, got {self.path}, another database"
            )
        if not own:
            with self._file:
                self._file.executescript(f"begin; {_TABLES} pragma application_id = {_OWN}; commit;")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise OSError(f"{self.path}: {error}") from error
        except (sqlite3.DatabaseError, zlib.error, KeyError, TypeError, json.JSONDecodeError) as error:
            got = f"{self.path}, which cannot be read ({error})"
            raise ValueError(f"results: expected a file of compare --results, got {got}") from error

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, key: str, trial: Trial, report: Mapping[str, Any], active: np.ndarray | None) -> None:
        """Writes one run. active: int64[n], the sorted places of the entries that it trained."""
        packed = None if active is None else pack(active)
        row = (key, json.dumps(trial), json.dumps(plain(report)), packed)
        with self._reading(), self._file:
            self._file.execute("insert or replace into runs values (?, ?, ?, ?)", row)

    def restore(self, runs: Iterable[Mapping[str, Any]]) -> None:
        """Adds runs of `summary.exported` that the file lacks: all but whole logs and active sets."""
        rows = []
        for run in runs:
            trial = Trial(*(run[name] for name in Trial._fields))
            report = {name: value for name, value in run.items() if name not in ("key", *Trial._fields)}
            rows.append((run["key"], json.dumps(trial), json.dumps(report)))
        with self._reading(), self._file:
            self._file.executemany("insert or ignore into runs (key, trial, report) values (?, ?, ?)", rows)

    def results(self, plan: Plan) -> dict[Trial, dict[str, Any]]:
        """The reports of the runs of a grid that have ended."""
        with self._reading():
            reports = dict(self._file.execute("select key, report from runs"))
            trials = {trial: reports.get(key(plan, trial)) for trial in possible(plan)}
            return {trial: json.loads(report) for trial, report in trials.items() if report is not None}

    def active(self, plan: Plan, trial: Trial) -> np.ndarray | None:
        """int64[n]: the places of the entries that a run trained; None where none are recorded."""
        with self._reading():
            query = "select active from runs where key = ? and active is not null"
            found = self._file.execute(query, (key(plan, trial),)).fetchone()
            return unpack(found[0]) if found else None

    def remember(self, plan: Plan) -> None:
        """Writes what `plan` returns for the file from now on."""
        with self._reading(), self._file:
            self._file.execute("insert into plans (plan) values (?)", (json.dumps(asdict(plan)),))

    def threads(self) -> int | None:
        """Of the newest grid; None where the file has none."""
        with self._reading():
            row = self._file.execute(_NEWEST).fetchone()
            return json.loads(row[0])["threads"] if row else None

    def plan(self) -> Plan:
        """The newest grid. Raises ValueError where the file has none."""
        with self._reading():
            row = self._file.execute(_NEWEST).fetchone()
            if row is None:
                raise ValueError(
                    f"results: expected a file of compare --results, got {self.path} without runs"
                )
            return _plan(json.loads(row[0]))


def _plan(saved: dict[str, Any]) -> Plan:
    """The plan from JSON, where tuples are lists."""
    settings = saved.pop("settings")
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}
    methods = tuple(
        Method(
            m["name"],
            tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in m["changes"]),
            m["rates"] and tuple(m["rates"]),
        )
        for m in saved.pop("methods")
    )
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    return Plan(settings=Settings(**settings), methods=methods, **lists)


def pack(places: np.ndarray) -> bytes:
    """Sorted int64 places as gaps, compressed."""
    return zlib.compress(np.diff(places, prepend=np.int64(0)).astype("<i8").tobytes())


def unpack(packed: bytes) -> np.ndarray:
    return np.cumsum(np.frombuffer(zlib.decompress(packed), "<i8"))
