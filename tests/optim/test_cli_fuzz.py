"""No arguments and no damaged files make `id3-optim` show a traceback, or lose a file when it refuses.

The options come from the parser itself, so new ones are covered. A status of 1 is an unexpected error.
"""

import argparse
import contextlib
import io
import json
import shutil
import tempfile
import traceback
from pathlib import Path

import pytest
from command_files import COMMANDS, contents, save_all
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from id3_optim.cli import failures, main
from id3_optim.cli.main import parser

(COMMANDS_OF,) = (a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
FILES = sorted({file for _, files in COMMANDS.values() for file in files})
PLACES = [*FILES, *sorted({file.split("/")[0] for file in FILES}), "old", "old.png", "old.json"]
PLACES += ["new", "new/in", "one/new", ".", "..", "", "a.csv/in", "~", "bert/", "nul\0l", "n" * 300]

# --- arguments -----------------------------------------------------------------------------------------

words = st.text("abcxyzAZ019-_.,:%=+ \t\nüé中\u2028", max_size=8)
places = st.sampled_from(PLACES) | words
whole_numbers = st.sampled_from([-1, 0, 1, 2, 3, 8, 40, 2**31, 2**63, 10**30]).map(str)
numbers = st.floats().map(str) | whole_numbers | st.sampled_from(["1e-3", "0.5", "5%", "-1%", "1e400", "1_0"])
junk = st.integers(0, 9).flatmap(lambda n: words if n == 0 else numbers)  # most values are of the right type
VALUES = {int: st.one_of(whole_numbers, whole_numbers, junk), float: junk, None: places}


def values(action):
    """A strategy of the lists of words that may follow an option or be positional arguments."""
    if action.nargs == 0:
        return st.just([])
    one = VALUES.get(action.type, junk)  # the type may be a function, such as that of budgets
    if action.choices is not None:
        one = st.sampled_from(sorted(action.choices) * 4 + ["", "x"])
    return st.lists(one, min_size=1, max_size=3) if action.nargs == "+" else one.map(lambda word: [word])


@st.composite
def command_lines(draw):
    """A command that succeeds, up to three options replaced, added or left out, and the files it reads."""
    words_of, files = draw(
        st.sampled_from(
            [*COMMANDS.values(), ("env", []), ("completion bash", []), ("plot old.json --output new", [])]
        )
    )
    name, *given = words_of.split()
    actions = [a for a in COMMANDS_OF[name]._actions if a.dest != "help"]
    given = COMMANDS_OF[name].parse_args(given)
    most = draw(st.sampled_from([0, 1, 3]))
    drawn = draw(st.lists(st.sampled_from(actions), max_size=most, unique=True)) if actions else []
    line = [name]
    for action in actions:
        kept = getattr(given, action.dest)
        if action in drawn:
            often = 0 if action.required else 3
            parts = draw(values(action)) if draw(st.integers(-1, often)) else None
        else:
            parts = None if kept == action.default else [] if kept is True else kept
        if parts is not None:
            line += [action.option_strings[-1]] if action.option_strings else []
            line += map(str, parts if isinstance(parts, list) else [parts])
    more = draw(st.integers(0, 19))
    return line + ([draw(words)] if more == 0 else []), files


# --- files ---------------------------------------------------------------------------------------------

scalars = st.sampled_from([None, True, -1, 0, 1, 3, 17, 0.5, "", "x", "gelu", [], {}, [1], {"0": 1}])


def with_json_changed(content, data):
    """One value of a JSON object is replaced or removed. Sizes stay small: models are made of them."""
    try:
        whole = json.loads(content)
    except ValueError:
        return content
    if not isinstance(whole, dict) or not whole:
        return content
    key = data.draw(st.sampled_from(sorted(whole)))
    if data.draw(st.booleans()):
        whole[key] = data.draw(scalars)
    else:
        del whole[key]
    return json.dumps(whole).encode()


def with_bytes_changed(content, data):
    """A few bytes become others, of which none is a digit, which could make a size large."""
    changed = bytearray(content)
    for at in data.draw(st.lists(st.integers(0, max(len(content) - 1, 0)), max_size=4)):
        changed[at : at + 1] = data.draw(
            st.sampled_from([b"", b"\0", b"\xff", b'"', b"{", b",", b"\n", b"-"])
        )
    return bytes(changed)


def cut(content, data):
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    return data.draw(st.sampled_from([content[:begin], content[begin:], content[:begin] + content[end:]]))


MUTATIONS = [with_bytes_changed, cut]


def damage(folder, files, data):
    for file in data.draw(st.lists(st.sampled_from(files), max_size=2, unique=True)) if files else []:
        path = folder / file
        possible = [with_json_changed] if path.name == "config.json" else MUTATIONS
        possible = [*possible, with_json_changed, cut] if path.suffix == ".json" else possible
        path.write_bytes(data.draw(st.sampled_from(possible))(path.read_bytes(), data))


# --- the runs ------------------------------------------------------------------------------------------


class Trained(ValueError):
    """Ends `train` where training would begin."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = save_all(tmp_path_factory.mktemp("originals"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield folder


def run(line):
    """The status and stderr; an unexpected error comes with its traceback."""
    errors, report = io.StringIO(), failures._report

    def with_traceback(error):
        status = report(error)
        if status == failures.UNEXPECTED:
            traceback.print_exception(error, file=errors)
        return status

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(failures, "_report", with_traceback)
        with contextlib.redirect_stderr(errors):
            try:
                return main(line), errors.getvalue()
            except SystemExit as stop:
                return stop.code, errors.getvalue()


def check(originals, line, files, data):
    with tempfile.TemporaryDirectory() as temporary, pytest.MonkeyPatch.context() as patch:
        folder = Path(temporary) / "files"
        shutil.copytree(originals, folder)
        damage(folder, files, data)
        patch.chdir(folder)
        before = contents(folder)
        status, errors = run(line)
        assert status in (0, 2), errors
        if status == 2:
            assert "error: " in errors, errors
        if status == 2 and line[0] != "train":  # whose checkpoints stay
            assert contents(folder) == before


def many(examples):
    health = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(max_examples=examples, suppress_health_check=health)


@many(500)
@given(command=command_lines(), data=st.data())
def test_no_traceback(originals, command, data):
    def fit(*arguments, **options):
        raise Trained("fit: expected no training, got one")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("id3_optim.cli.train.fit", fit)
        check(originals, *command, data)


@many(15)
@given(name=st.sampled_from(["train", "causal", "resume"]), data=st.data())
def test_no_traceback_in_training(originals, name, data):
    words, files = COMMANDS[name]
    check(originals, words.split(), files, data)


def test_damaged_files_and_arguments_are_made(originals):
    """Most lines parse, and all commands are among them; else nothing is tested. `compare` trains in other
    processes, for minutes where a line is right: test_compare.py has its mistakes."""
    seen, parsed = set(), []

    @settings(max_examples=200, suppress_health_check=list(HealthCheck))
    @given(command=command_lines())
    def collect(command):
        line, _ = command
        seen.add(line[0])
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            try:
                parsed.append(parser().parse_args(line))
            except SystemExit:
                return

    collect()
    assert seen == set(COMMANDS_OF) - {"compare"} and len(parsed) > 60
