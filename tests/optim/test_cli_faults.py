"""Every command x every file that it reads or writes x what can be wrong with the file.

One line on stderr, status 2, and nothing that was there before is lost. A killed process leaves the old
result or the new one. Data files that can be read and are wrong: `test_tasks.py`.
"""

import os
import resource
import shutil
import subprocess
import sys

import pytest
from command_files import COMMANDS, contents, save_all
from delta_files import run

# --- reading -------------------------------------------------------------------------------------------


def missing(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 - 3])  # within a line


def garbled(path):
    size = path.stat().st_size
    path.write_bytes((b"\xff\x00{" * size)[:size])


def a_directory(path):
    path.unlink()
    path.mkdir()


def through_a_file(path):
    """The folder of the file is a file."""
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"")


def unreadable(path):
    path.chmod(0)


FAULTS = [missing, empty, truncated, garbled, a_directory, through_a_file, unreadable]
# These the commands can do without: the model's own configuration serves, or no tokenizer is written.
SPARE = {("revert", "one/config.json"), ("apply", "bert/tokenizer_config.json")}
SPARE |= {("train", "bert/tokenizer_config.json"), ("causal", "llama/tokenizer_config.json")}
SPARE |= {("apply", "one/config.json")}


READS = [
    pytest.param(name, file, fault, id=f"{name}-{file}-{fault.__name__}")
    for name, (_, files) in COMMANDS.items()
    for file in files
    for fault in FAULTS
    if (fault is not through_a_file or "/" in file) and (fault is not truncated or "csv" not in file)
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return save_all(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def files(originals, tmp_path, monkeypatch):
    folder = tmp_path / "files"
    shutil.copytree(originals, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


def check_refused(capsys, files, command, before, mentioned):
    status, printed, errors = run(capsys, *command.split())
    last = errors.rstrip("\n").split("\n")[-1]
    assert (status, printed) == (2, "") or (command.startswith("train") and status == 2), errors
    assert last.startswith("id3-optim: error: ") and len(last) < 600, errors
    assert errors.count("\n") == 1 or command.startswith("train"), errors  # which shows progress there
    assert mentioned in last or "got a damaged one" in last, last
    assert contents(files) == before


@pytest.mark.parametrize(("name", "file", "fault"), READS)
def test_a_file_that_cannot_be_read(files, capsys, name, file, fault):
    if fault is unreadable and os.geteuid() == 0:
        pytest.skip("root reads every file")
    command, folder = COMMANDS[name][0], file.split("/")[0]
    fault(files / file)
    if (name, file) in SPARE and fault in (missing, a_directory):
        assert run(capsys, *command.split())[0] == 0
    else:
        check_refused(capsys, files, command, contents(files), folder)


def test_the_commands_succeed_with_whole_files(files, capsys):
    """Else the faults would prove nothing."""
    for command, _ in COMMANDS.values():
        shutil.rmtree(files / "new", ignore_errors=True)
        assert run(capsys, *command.split())[0] == 0


# --- writing -------------------------------------------------------------------------------------------

WRITES = {
    name: command for name, (command, _) in COMMANDS.items() if name not in ("estimate", "resume", "causal")
}


def the_wrong_kind(path):
    if path.is_dir() or path.name == "new":
        path.write_bytes(b"mine")
    else:
        path.unlink()
        path.mkdir()


def in_a_file(path):
    """Returns the path to write to."""
    return "a.csv/out"


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("fault", [the_wrong_kind, in_a_file])
def test_a_place_where_nothing_can_be_written(files, capsys, name, fault):
    output = next(word for word in WRITES[name].split() if word.startswith(("old", "new")))
    instead = fault(files / output) or output
    command = WRITES[name].replace(f" {output}", f" {instead}")
    check_refused(capsys, files, command, contents(files), instead.split("/")[0])


@pytest.mark.parametrize("limit", [1, 1000, 10_000])
@pytest.mark.parametrize("name", WRITES)
def test_a_full_disk(files, capsys, name, limit):
    """The limit of a file's size stops writers in C and Rust as a full disk does."""
    before = contents(files)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        status, _, errors = run(capsys, *WRITES[name].split())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert errors.count("\n") == 1 or name == "train", errors
    assert status == 2 and ("File too large" in errors or "os error 27" in errors), errors
    left = contents(files)
    assert left == before or (name == "train" and left == before | {"new": None})
    assert not [path for path in files.rglob("*.partial")]


KILLED = """
import os, shutil, signal, sys
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
import torch

torch.set_num_threads(1)  # threads do not survive a fork
from command_files import COMMANDS, contents, save_all
from id3_optim.cli import main

originals, work = Path(sys.argv[1]), Path(sys.argv[2])
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
count, stop_at = 0, None

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def after_open(frame, event, argument):
    if frame.f_code is not watch.__code__:
        die()

def watch(event, args):
    # Counts the moments before a change of the file system, and after a file is opened to be written, when it
    # is empty; at the given one the process dies.
    global count
    path = str(args[0]) if args else ""
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if stop_at is not None and (event in CHANGES or writes) and not path.startswith(("/dev", "/proc")):
        count += 1
        if count == stop_at:
            die()
        count += bool(writes)
        if count == stop_at:
            sys.setprofile(after_open)

sys.addaudithook(watch)

def restore():
    os.chdir("/")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(originals, work)
    os.chdir(work)

def child(function):
    pid = os.fork()
    if pid == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        os._exit(function())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def killed(words, moment):
    global stop_at
    stop_at = moment
    return main(words)

def whole(new, before, after):
    # The old result, the new one, or a folder that no command takes for a model.
    found = contents(work)
    if found in (before, after):
        return True
    rest = {path: content for path, content in found.items() if path.split("/")[0] != "new"}
    return new and rest == before and "new/config.json" not in found

restore()
before = contents(work)
for name in sys.argv[3:]:
    words = COMMANDS[name][0].split()
    restore()
    assert child(lambda: main(words)) == 0, name
    after = contents(work)
    moment, status = 0, None
    while status != 0:
        moment += 1
        restore()
        status = child(lambda: killed(words, moment))
        assert status in (0, -signal.SIGKILL), (name, moment, status)
        assert whole("new" in words, before, after), (name, moment)
        if status and "new" in words and set(contents(work)) <= {*before, "new"}:  # the next try succeeds
            assert child(lambda: main(words)) == 0 and contents(work) == after, (name, moment)
    print(name, moment - 1)
"""


def test_killed_at_any_change_of_the_file_system(originals, tmp_path):
    names = [name for name in WRITES if name != "train"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", KILLED, str(originals), str(tmp_path / "work"), *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    moments = {line.split()[0]: int(line.split()[1]) for line in result.stdout.splitlines()}
    assert moments.keys() == set(names) and min(moments.values()) >= 2 and moments["apply"] > 6, moments
