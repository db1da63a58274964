"""`id3-optim train` writes over nothing: paths are checked before the first step, files appear whole."""

import os

import pytest
from train_command import run, save_train_files, snapshot, words

from id3_optim.cli import output
from id3_optim.cli.report import write_report
from id3_optim.cli.settings import Settings


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_train_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def no_training(monkeypatch):
    """A refusal comes before the model is loaded."""
    from id3_optim.cli import train

    monkeypatch.setattr(train, "load_start", lambda *args: pytest.fail("the model was loaded"))


def link(files, tmp_path):
    (tmp_path / "link").symlink_to(files / "bert")
    return tmp_path / "link"


@pytest.mark.parametrize(
    "same",
    [
        lambda files, tmp_path: files / "bert",
        lambda files, tmp_path: f"{files}/bert/",
        lambda files, tmp_path: f"{files}/llama/../bert",
        lambda files, tmp_path: os.path.relpath(files / "bert"),
        link,
    ],
)
@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_the_base_is_never_the_output(files, tmp_path, capsys, no_training, same, more):
    before = snapshot(files / "bert")
    code, _, error = run(capsys, words(files, same(files, tmp_path), *more))
    assert code == 2 and error.startswith("id3-optim: error: --output: expected another folder than --model")
    assert snapshot(files / "bert") == before


def test_a_hub_name_is_no_output(files, tmp_path, capsys, no_training, monkeypatch):
    """The next run would take the folder for the model of that name."""
    monkeypatch.chdir(tmp_path)
    code, _, error = run(capsys, words(files, "some/model", "--model", "some/model"))
    assert code == 2 and "--output: expected another folder than --model, got some/model" in error


def test_the_output_does_not_hold_the_base(files, capsys, no_training):
    code, _, error = run(capsys, words(files, files, "--overwrite"))
    assert code == 2 and "--output: expected a folder that does not hold --model" in error


def test_a_folder_with_files_is_refused(files, tmp_path, capsys, no_training):
    (tmp_path / "notes.txt").write_text("mine")
    code, _, error = run(capsys, words(files, tmp_path))
    assert code == 2 and "--output: expected a new or an empty folder" in error
    assert "notes.txt" in error and "--overwrite" in error and "--resume" in error
    assert snapshot(tmp_path) == {"notes.txt": b"mine"}


def test_what_a_killed_run_was_writing_is_no_result(files, tmp_path, capsys):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "model.safetensors").write_text("half")
    assert run(capsys, words(files, tmp_path, "--delta-only"))[0] == 0
    assert not (tmp_path / "unfinished").exists()


def test_overwrite_replaces_what_train_writes_and_nothing_else(files, tmp_path, capsys):
    delta = ["--delta-only", "--save-every", "2", "--save-at", "100"]
    assert run(capsys, words(files, tmp_path, *delta))[0] == 0
    mine = {"notes.txt": b"mine", "checkpoints.md": b"mine", "delta-notes.txt": b"mine"}
    for name, content in mine.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "checkpoint-best").mkdir()
    assert {"delta.safetensors", "checkpoint-2", "checkpoint-4"} <= set(os.listdir(tmp_path))
    assert any(name.startswith("delta-1") for name in os.listdir(tmp_path))
    assert run(capsys, words(files, tmp_path, "--overwrite"))[0] == 0
    left = set(os.listdir(tmp_path))
    assert {"model.safetensors", "config.json", "checkpoint-best", *mine} <= left
    assert not {"delta.safetensors", "checkpoint-2", "checkpoint-4", "unfinished"} & left
    assert not any(name.startswith("delta-1") for name in left)
    assert run(capsys, ["inspect", str(tmp_path)])[0] == 2  # no old delta is shown for the new model
    assert run(capsys, words(files, tmp_path, "--overwrite", "--delta-only"))[0] == 0
    assert "model.safetensors" not in os.listdir(tmp_path)


def test_a_run_that_does_not_begin_leaves_the_old_checkpoints(files, tmp_path, capsys, monkeypatch):
    assert run(capsys, words(files, tmp_path, "--delta-only", "--save-every", "2"))[0] == 0
    before = snapshot(tmp_path)
    from id3_optim.cli import trainer

    def refuse(*args):
        raise ValueError("--model: expected a tokenizer within the model's 40 tokens, got token 41")

    monkeypatch.setattr(trainer, "check_tokens", refuse)
    code, _, error = run(capsys, words(files, tmp_path, "--overwrite"))
    assert code == 2 and "got token 41" in error
    assert snapshot(tmp_path) == before


def test_a_failed_run_leaves_the_old_result(files, tmp_path, capsys, monkeypatch):
    assert run(capsys, words(files, tmp_path, "--delta-only"))[0] == 0
    before = snapshot(tmp_path)
    from id3_optim.cli import train

    def full(path, *args, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(train, "save_delta", full)
    code, _, error = run(capsys, words(files, tmp_path, "--delta-only", "--overwrite", "--steps", "3"))
    assert code == 2 and "--output: expected to write into" in error and "No space left" in error
    assert "no checkpoint to go on from" in error
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("option", "path", "message"),
    [
        ("--report", ".", "--report: expected a file name, got the folder"),
        ("--report", "data.csv/report.json", "--report: expected a folder, got"),
        ("--report", "data.csv", "--report: expected another file than --train, got"),
        ("--report", "/proc/report.json", "--report: expected a folder to write to, got /proc"),
        ("--output", "data.csv", "--output: expected a folder, got"),
        ("--output", "data.csv/deep/out", "--output: expected a folder, got"),
        ("--output", "dangling", "--output: expected a folder, got"),
        ("--output", "/proc/out/deep", "--output: expected a folder to write to, got /proc"),
    ],
)
def test_paths_are_checked_before_training(files, tmp_path, capsys, no_training, option, path, message):
    data = tmp_path / "data.csv"
    data.write_bytes((files / "reviews.csv").read_bytes())
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = snapshot(tmp_path)
    command = words(files, tmp_path / "out", "--train", data, "--eval", data, option, tmp_path / path)
    code, _, error = run(capsys, command)
    assert code == 2 and message in error
    assert snapshot(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_report_is_whole_or_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "new" / "report.json"
    write_report(path, {"a": 1})
    before = snapshot(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        write_report(path, {"a": 2})
    assert snapshot(tmp_path) == before


def test_a_report_may_go_to_a_device(capfd):
    write_report("/dev/stdout", {"a": 1})
    assert capfd.readouterr().out == '{\n  "a": 1\n}\n'


def test_publishing_follows_no_half_written_file(tmp_path):
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "delta.safetensors").write_text("old")
    before = snapshot(tmp_path)
    with pytest.raises(RuntimeError), output.publishing(tmp_path) as folder:
        (folder / "config.json").write_text("new")
        raise RuntimeError
    assert snapshot(tmp_path) == before
    with output.publishing(tmp_path) as folder:
        (folder / "config.json").write_text("new")
    assert snapshot(tmp_path) == {"config.json": b"new"}


def test_an_earlier_runs_chat_template_goes_with_its_result(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    with output.publishing(tmp_path) as folder:
        (folder / "config.json").write_text("new")
    assert snapshot(tmp_path) == {"config.json": b"new", "notes.txt": b"mine"}


def settings_for(files, folder):
    data = str(files / "reviews.csv")
    return Settings(str(files / "bert"), data, data, str(folder))


def test_one_run_at_a_time_writes_to_a_folder(files, tmp_path, capsys):
    target = tmp_path / "out"
    with output.holding(settings_for(files, target)):
        (target / output.UNFINISHED).mkdir()
        code, _, error = run(capsys, words(files, target))
        assert code == 2 and "--output: expected a folder that no other run writes to" in error
        assert (target / output.UNFINISHED).is_dir()  # of the run that goes on
    assert run(capsys, words(files, target))[0] == 0


def test_a_result_that_has_come_meanwhile_stays(files, tmp_path, capsys, monkeypatch):
    from id3_optim.cli import train

    target, prepare = tmp_path / "out", train.prepare

    def slow(*arguments):
        target.mkdir()
        (target / "model.safetensors").write_text("of another run")
        return prepare(*arguments)

    monkeypatch.setattr(train, "prepare", slow)
    code, _, error = run(capsys, words(files, target, "--delta-only"))
    assert code == 2 and "expected a new or an empty folder" in error
    assert snapshot(target) == {"model.safetensors": b"of another run"}
