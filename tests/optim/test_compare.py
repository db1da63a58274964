"""`id3-optim compare`: the table of a grid, what it refuses, and that no interruption changes it."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import zlib
from collections import Counter

import pytest
from compare_command import __file__ as PROGRAM
from compare_command import words
from train_command import run, save_train_files

from id3_optim.cli.compare import trial as trials
from id3_optim.cli.compare.store import Store, pack, unpack


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_train_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):
    """(results, report, what was printed) of the grid, run without an interruption."""
    from id3_optim.cli import main

    folder = tmp_path_factory.mktemp("straight")
    assert main(words(files, folder / "r.sqlite", "--report", folder / "r.json")) == 0
    return folder / "r.sqlite", folder / "r.json"


def outcome(report):
    """What a report says, without times."""
    read = json.loads(report.read_text())
    for line in (*read["rows"], *read["runs"]):
        del line["step_ms"]
    return read


def test_the_table_is_that_of_the_runs(straight, capsys, files, tmp_path):
    read = json.loads(straight[1].read_text())
    finals = [r for r in read["runs"] if not r["tuning"]]
    tuning = [r for r in read["runs"] if r["tuning"]]
    assert len(finals) == 3 * 2 and len(tuning) == 3 * (3 + 2)
    for row in read["rows"]:
        own = {str(r["seed"]): r["metrics"]["eval_accuracy"] for r in finals if r["method"] == row["method"]}
        assert row["scores"] == own and row["mean"] == pytest.approx(sum(own.values()) / 2)
        assert {r["lr"] for r in finals if r["method"] == row["method"]} == {row["lr"]}
        last = {r["lr"]: r["metrics"] for r in tuning if r["method"] == row["method"] and r["steps"] == 4}
        best = max(last, key=lambda lr: (last[lr]["eval_accuracy"], -last[lr]["eval_loss"]))
        assert row["lr"] == best and row["at_edge"] == (best in (2e-3, 8e-3))
    code, printed, _ = run(capsys, words(files, straight[0]))
    assert code == 0 and len(printed.splitlines()) >= 5
    assert printed.splitlines()[0].split()[:4] == ["method", "budget", "lr", "entries"]


def test_a_run_is_that_of_train(straight, files, tmp_path, capsys):
    """No second training loop: the same settings give `id3-optim train`'s numbers, up to the order of sums,
    which depends on the number of threads."""
    read = json.loads(straight[1].read_text())
    final = next(r for r in read["runs"] if r["method"] == "id3" and not r["tuning"] and r["seed"] == 1)
    command = f"train --model {files}/bert --train {files}/reviews.csv --eval {files}/reviews.csv --steps 6"
    command += f" --output {tmp_path}/out --report {tmp_path}/t.json --budget 300 --lr {final['lr']} --seed 1"
    command += " --batch-size 8 --log-every 2 --eval-every 3 --cpu"
    assert run(capsys, command.split())[0] == 0
    measured = json.loads((tmp_path / "t.json").read_text())["metrics"]
    assert measured == pytest.approx(final["metrics"], rel=1e-5)


def test_options_that_explain_are_options_of_a_method(files, tmp_path, capsys):
    options = ("reuse_mask=true", "prune=2,entry_warmup=3", "tensor_cap=0.1", "heuristic=d3-relative")
    methods = ["id3", *(f"id3:{option}" for option in options), "id3-sum:select_every=2"]
    command = words(files, tmp_path / "r.sqlite", "--methods", *methods, "--lr", "4e-3", "--seeds", "0")
    code, _, error = run(capsys, command)
    assert code == 0, error
    with Store(tmp_path / "r.sqlite", create=False) as store:
        plan = store.plan()
        finals = [trial for trial in store.results(plan) if not trial.tuning]
        active = {trial.method: store.active(plan, trial).tolist() for trial in finals}
    assert active.keys() == set(methods) and {len(places) for places in active.values()} == {300}
    assert active["id3"] == active["id3:reuse_mask=true"]
    for option in (*options[1:], "sum"):
        (name,) = (name for name in methods if option in name)
        assert active[name] != active["id3"]
    most = {
        name: Counter(place >> 32 for place in places).most_common(1)[0][1] for name, places in active.items()
    }
    assert most["id3:tensor_cap=0.1"] <= 30 < most["id3"]


def test_places_are_those_of_the_same_tensors_whatever_is_left_out(files, tmp_path, capsys):
    methods = ["random", "random:leave_out=embeddings"]
    command = words(files, tmp_path / "r.sqlite", "--methods", *methods, "--lr", "4e-3", "--seeds", "0")
    assert run(capsys, command)[0] == 0
    with Store(tmp_path / "r.sqlite", create=False) as store:
        plan = store.plan()
        every, some = ({p >> 32 for p in store.active(plan, t).tolist()} for t in sorted(store.results(plan)))
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(files / "bert")
    hashes = {zlib.crc32(name.encode()) >> 1: name for name, _ in model.named_parameters()}
    assert {hashes[place].split(".")[1] for place in some} <= {"encoder", "pooler"}
    assert some & every and every - some


def test_tuning_measures_on_rows_it_does_not_train_on(files):
    from id3_optim.cli.tasks import read_task

    task = read_task(str(files / "reviews.csv"), str(files / "reviews.csv"))
    split = trials.held_out(task, 0.2)
    assert (len(split.train), len(split.eval)) == (32, 8)
    assert sorted(map(repr, [*split.train, *split.eval])) == sorted(map(repr, task.train))
    assert trials.held_out(task, 0.2) == split
    with pytest.raises(ValueError, match="--held-out: expected a share that splits 40 rows"):
        trials.held_out(task, 0.001)


def test_a_finished_grid_runs_nothing_again(straight, files, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(trials, "fit", None)
    code, _, _ = run(capsys, words(files, straight[0], "--report", tmp_path / "again.json"))
    assert code == 0 and json.loads((tmp_path / "again.json").read_text()) == json.loads(
        straight[1].read_text()
    )


def test_a_larger_grid_runs_what_is_new(straight, files, capsys, monkeypatch, tmp_path):
    results, ran = tmp_path / "r.sqlite", []
    results.write_bytes(straight[0].read_bytes())
    plain = trials.fit
    monkeypatch.setattr(trials, "fit", lambda *given, **more: ran.append(1) or plain(*given, **more))
    assert run(capsys, words(files, results, "--seeds", 0, 1, 2))[0] == 0
    assert len(ran) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_grid_killed_at_20_random_moments_has_the_same_table(straight, files, tmp_path):
    command = words(files, tmp_path / "r.sqlite", "--report", tmp_path / "r.json")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    given = [sys.executable, PROGRAM, "20", *command]
    done = subprocess.run(given, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[0]) >= 5, "the children ended before they were killed"
    assert outcome(tmp_path / "r.json") == outcome(straight[1])


def test_several_processes_give_the_same_table(straight, files, tmp_path, capsys):
    command = words(files, tmp_path / "r.sqlite", "--report", tmp_path / "r.json", "--jobs", 2)
    assert run(capsys, command)[0] == 0
    assert outcome(tmp_path / "r.json") == outcome(straight[1])


def test_ctrl_c_keeps_what_has_ended(files, tmp_path, capsys, monkeypatch):
    plain, ran = trials.fit, []

    def interrupted(*given, **more):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(1)
        return plain(*given, **more)

    monkeypatch.setattr(trials, "fit", interrupted)
    assert run(capsys, words(files, tmp_path / "r.sqlite"))[0] == 130
    with Store(tmp_path / "r.sqlite", create=False) as store:
        assert len(store.results(store.plan())) == 2


def test_ctrl_c_ends_a_run_of_a_grid_at_once(files, tmp_path, capsys, monkeypatch):
    """Nothing of it is kept, so it saves nothing."""
    steps, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)

    def pressed(*_, **__):
        steps.append(1)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trials.Steps, "on_step_end", pressed)
    try:
        code, _, error = run(capsys, words(files, tmp_path / "r.sqlite"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and len(steps) == 1 and "saving" not in error


def test_a_run_that_diverges_is_counted_and_not_dropped(files, tmp_path, capsys):
    command = words(files, tmp_path / "r.sqlite", "--report", tmp_path / "r.json")
    command[command.index("--methods") + 1 : command.index("--budgets")] = ["full:lr=1e35"]
    assert run(capsys, [*command, "--lr", "1e35"])[0] == 0
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert row["diverged"] == 2 and row["mean"] is None and row["scores"] == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "id3", "id3"], "--methods: expected each once, got id3 twice"),
        (["--methods", "id3:lr=1e-3", "id3:lr=2e-3"], "--methods: expected each once, got id3 twice"),
        (["--seeds", 0, 0], "--seeds: expected each once, got 0 twice"),
        (["--methods", "id3", "full:lr=1e-3"], "--methods: expected as many learning rates for each method"),
        (["--against", "none"], "--against: expected one of id3"),
        (["--jobs", 0], "--jobs: expected at least 1, got 0"),
        (["--held-out", 1.5], "--held-out: expected a share between 0 and 1, got 1.5"),
        (["--metric", "f1"], "--metric: expected"),
        (["--methods", "id3:schedule=none", "--against", "id3:schedule=none"], "--schedule: expected"),
        (["--steps", 0], "--steps: expected at least 1, got 0"),
        (["--results", "no/folder/r.sqlite"], "--results: expected a file in an existing folder"),
        (["--report", "{files}/reviews.csv"], "--report: expected another file than --train, got"),
        (["--page", "x.html", "--report", "x.html"], "--report: expected another file than --page, got"),
        (["--methods", "id3", "random:leave_out=none"], "--methods random:leave_out=none: "),
    ],
)
def test_what_is_refused_before_the_first_run(files, tmp_path, capsys, more, message):
    more = [str(word).replace("{files}", str(files)) for word in more]
    code, _, error = run(capsys, words(files, tmp_path / "r.sqlite", *more))
    assert code == 2 and message in error
    if (tmp_path / "r.sqlite").exists():
        with sqlite3.connect(tmp_path / "r.sqlite") as store:
            assert store.execute("select count(*) from runs").fetchone() == (0,)


def test_a_file_of_another_kind_is_refused_and_kept(files, tmp_path, capsys):
    text, database = tmp_path / "notes.txt", tmp_path / "other.sqlite"
    text.write_text("notes that are no database, long enough for a header " * 50)
    with sqlite3.connect(database) as other:
        other.execute("create table t (a)")
    other.close()
    for path in (text, database):
        before = path.read_bytes()
        for command in (words(files, path), ["plot", str(path), "--output", str(tmp_path / "p.html")]):
            code, _, error = run(capsys, command)
            assert code == 2 and "results: expected a file of compare --results" in error, error
        assert path.read_bytes() == before
    code, _, error = run(capsys, ["plot", str(tmp_path / "none"), "--output", str(tmp_path / "p.html")])
    assert code == 2 and "which is none" in error


def test_active_sets_come_back(straight):
    with Store(straight[0], create=False) as store:
        plan = store.plan()
        finals = [trial for trial in store.results(plan) if not trial.tuning]
        for trial in finals:
            active = store.active(plan, trial)
            assert (active is None) == (trial.method == "full")
            assert active is None or (len(active) == 300 and (active[1:] > active[:-1]).all())
            assert active is None or (unpack(pack(active)) == active).all()
