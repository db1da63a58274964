"""`id3_optim.cli.reading`: encodings, delimiters, and what a mistake in a file is called, with its line."""

import codecs
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_command import run, save_train_files, words

from id3_optim.cli import reading, tasks


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_train_files(tmp_path_factory.mktemp("files"))


def written(tmp_path, content, name="a.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


ROWS = "text,label\ncafé,1\nthé,2\n"
READ = [(("café",), "1"), (("thé",), "2")]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "UTF-16BE"]
)
def test_encodings(tmp_path, encoding):
    for mark in ("", "\ufeff") if "utf" in encoding.lower() else ("",):
        path = written(tmp_path, (mark + ROWS).encode(encoding))
        assert reading.read_labelled(path, ["text"], "label", encoding) == READ
        line = json.dumps({"prompt": "ça", "completion": "là"}, ensure_ascii=False)
        path = written(tmp_path, (mark + line).encode(encoding), "a.jsonl")
        assert reading.read_completions(path, encoding) == [("ça", "là")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROWS.encode("latin-1"), r"a.csv:2: expected utf-8, got the byte 0xe9; choose with --encoding, such"),
        (ROWS.encode("utf-16"), r"a.csv:1: expected utf-8, got the first bytes of utf-16; --encoding utf-16"),
        (codecs.BOM_UTF16_BE + ROWS.encode("utf-16-be"), r"a.csv:1: expected utf-8, got the first bytes of"),
        (ROWS.encode("utf-32"), r"a.csv:1: expected utf-8, got the first bytes of utf-32; --encoding utf-32"),
        ("text,label\ngood,1\n".encode("utf-16-le"), r"a.csv:1: expected text, got a zero byte"),
        (b"text,label\ngood,1\nb\0ad,2\n", r"a.csv:3: expected text, got a zero byte"),
    ],
)
def test_a_file_in_another_encoding(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        reading.read_labelled(written(tmp_path, content), ["text"], "label")
    with pytest.raises(ValueError, match=message.replace("a.csv", "a.jsonl")):
        reading.read_completions(written(tmp_path, content, "a.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nx,1\ny,\n", "a.csv:3: expected a label in column 'label', got ''"),
        ("text,label\nx,1\ny, \t\n", "a.csv:3: expected a label in column 'label', got ''"),
        ("text,label\nx,1\ny,NaN\n", "a.csv:3: expected a label in column 'label', got 'NaN'"),
        ("text,label\n,1\ny,2\n", "a.csv:2: expected a text in column 'text', got ''"),
        ("text,label\nx,1\n  ,2\n", "a.csv:3: expected a text in column 'text', got '  '"),
        ("text,label,label\nx,1,2\n", "a.csv: expected one column 'label', got 2; rename all but one"),
        ("text,text,label\nx,y,2\n", "a.csv: expected one column 'text', got 2"),
        (
            "text;label\nx;1\n",
            "a.csv: expected a column 'text', got 'text;label'; choose with --delimiter ';'",
        ),
        (
            'text,label\nx,1\n"a\nb\nc,2\nd,1\n',
            "a.csv:3: expected a record of CSV, got none that can be read",
        ),
        ('text,label\n"x\ny",1\n"a" b,2\n', "a.csv:4: expected a record of CSV, got none that can be read"),
        ('text,label\nx,1\n"y\nz",2,3\n', "a.csv:3: expected 2 fields, got 3"),
    ],
)
def test_a_record_is_named_by_its_first_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        reading.read_labelled(written(tmp_path, content), ["text"], "label")


def test_of_a_pair_one_text_may_be_empty(tmp_path):
    path = written(tmp_path, "a,b,c\nx,,1\n")
    assert reading.read_labelled(path, ["a", "b"], "c") == [(("x", ""), "1")]
    with pytest.raises(ValueError, match=r"a.csv:2: expected a text in column 'a', got ''"):
        reading.read_labelled(written(tmp_path, "a,b,c\n,,1\n"), ["a", "b"], "c")


def test_columns_that_are_not_read_may_share_a_name(tmp_path):
    path = written(tmp_path, "text,,,label\nx,1,2,3\n")
    assert reading.read_labelled(path, ["text"], "label") == [(("x",), "3")]


@pytest.mark.parametrize(("delimiter", "name"), [(";", "a.csv"), ("|", "a.tsv"), ("\t", "a.csv")])
def test_delimiters(tmp_path, delimiter, name):
    path = written(tmp_path, f"text{delimiter}label\nx, y{delimiter}1\n", name)
    assert reading.read_labelled(path, ["text"], "label", delimiter=delimiter) == [(("x, y",), "1")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"prompt": "a", "prompt": "b", "completion": "c"}',
            "a.jsonl:2: expected the key 'prompt' once, got",
        ),
        ('{"prompt": "a", "completion": " \\n"}', "a.jsonl:2: completion: expected a text to learn, got ' "),
        ('{"prompt": "a", "completion": NaN}', "a.jsonl:2: expected an object with the string 'completion'"),
        ('{"prompt": null, "completion": "b"}', "a.jsonl:2: expected an object with the string 'prompt'"),
        ("[" * 100_000, "a.jsonl:2: expected "),
        (
            '{"prompt": "a", "completion": "b \\uD83D"}',
            "a.jsonl:2: expected whole characters, got .ud83d alone",
        ),
    ],
)
def test_mistakes_in_jsonl(tmp_path, line, message):
    path = written(tmp_path, '{"prompt": "", "completion": "fine"}\n' + line, "a.jsonl")
    with pytest.raises(ValueError, match=message) as error:
        reading.read_completions(path)
    assert len(str(error.value)) < 300 + len(path)


def test_a_line_separator_in_a_text_ends_no_row(tmp_path):
    rows = '{"prompt": "a\u2028b\x85", "completion": "c"}\r\n{"prompt": "", "completion": "d"}'
    read = reading.read_completions(written(tmp_path, rows, "a.jsonl"))
    assert read == [("a\u2028b\x85", "c"), ("", "d")]


@pytest.mark.parametrize(
    ("labels", "got"),
    [
        ([f"{n / 10}" for n in range(74)], "74 numbers such as 0.1, which are scores"),
        (["0", "1", "0.5", "1", "0"], "3 numbers such as 0.5, which are scores"),
        ([str(n) for n in range(60)] * 1, "60 different values in 60 rows"),
        ([f"id-{n}" for n in range(40)] + ["id-1"] * 20, "40 different values in 60 rows"),
    ],
)
def test_scores_are_classes_only_by_name(tmp_path, labels, got):
    path = written(tmp_path, "text,label\n" + "".join(f"x,{label}\n" for label in labels))
    with pytest.raises(ValueError, match=f"a.csv: expected classes in column 'label', got {got}; --task cla"):
        tasks.read_task(path, path)
    assert len(tasks.read_task(path, path, kind="classification").labels) == len(set(labels))


@pytest.mark.parametrize(
    "labels", [["0.0", "1.0"] * 3, ["1", "2.5", "x"] * 9, [str(n) for n in range(150)] * 2, list("abcdefgh")]
)
def test_these_labels_are_classes(tmp_path, labels):
    path = written(tmp_path, "text,label\n" + "".join(f"x,{label}\n" for label in labels))
    assert set(tasks.read_task(path, path).labels) == set(labels)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--encoding", "utf-9"],
            "--encoding: expected a name such as utf-8, utf-16 or latin-1, got 'utf-9'",
        ),
        (["--encoding", "hex"], "--encoding: expected a name such as utf-8, utf-16 or latin-1, got 'hex'"),
        (["--delimiter", ";;"], "--delimiter: expected one character, such as ';' or tab, got ';;'"),
        (["--delimiter", ""], "--delimiter: expected one character, such as ';' or tab, got ''"),
        (["--delimiter", "\n"], r"--delimiter: expected one character, such as ';' or tab, got '\n'"),
        (["--delimiter", "tab"], "reviews.csv: expected a column 'text', got 'text,label'"),
        (["--delimiter", r"\t"], "reviews.csv: expected a column 'text', got 'text,label'"),
        (["--text-column", "text", "text"], "--text-column: expected each column once"),
        (
            ["--label-column", "text"],
            "--text-column: expected each column once and not --label-column, 'text'",
        ),
    ],
)
def test_options_of_the_data(files, tmp_path, capsys, more, message):
    code, _, error = run(capsys, words(files, tmp_path / "out", *more))
    assert code == 2 and message in error and not (tmp_path / "out").exists()


def test_a_delimiter_does_not_apply_to_jsonl(files, tmp_path, capsys):
    command = words(files, tmp_path / "out", "--delimiter", ";", model="llama", data="facts.jsonl")
    code, _, error = run(capsys, command)
    assert code == 2 and "--delimiter: does not apply to causal-lm: its files are JSONL" in error


def test_the_same_rows_for_both_are_said(files, tmp_path, capsys):
    same = "--eval has the rows of --train"
    assert same in run(capsys, words(files, tmp_path / "one"))[1]
    text = (files / "reviews.csv").read_text()
    (tmp_path / "copy.csv").write_text(text)
    (tmp_path / "other.csv").write_text(text + "the good book,praise\n")
    assert same in run(capsys, words(files, tmp_path / "two", "--eval", tmp_path / "copy.csv"))[1]
    assert same not in run(capsys, words(files, tmp_path / "three", "--eval", tmp_path / "other.csv"))[1]


@given(st.binary(max_size=80), st.sampled_from(["utf-8", "utf-16", "latin-1", "utf-7", "ascii", "punycode"]))
def test_any_bytes_are_rows_or_one_error_with_the_file(tmp_path_factory, content, encoding):
    path = written(tmp_path_factory.getbasetemp(), b"text,label\n" + content)
    for read in (
        lambda: reading.read_labelled(path, ["text"], "label", encoding),
        lambda: reading.read_completions(path, encoding),
    ):
        try:
            assert read()
        except ValueError as error:
            assert str(error).startswith(path)


@pytest.mark.parametrize(
    ("train", "eval", "message"),
    [
        ("reviews.csv", "facts.jsonl", "--eval: expected a file for classification as --train, got "),
        ("facts.jsonl", "reviews.csv", "--eval: expected a file for causal-lm as --train, got "),
    ],
)
def test_both_files_are_of_one_kind(files, tmp_path, capsys, train, eval, message):
    more = ["--eval", files / eval]
    code, _, error = run(capsys, words(files, tmp_path / "out", *more, data=train))
    assert code == 2 and f"error: {message}{files / eval}; CSV and TSV are for classification, JSONL" in error


def test_jsonl_under_the_name_of_csv(tmp_path):
    path = written(tmp_path, '{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(
        ValueError, match=r"a.csv: expected CSV or TSV with a column 'text', got .* like JSONL"
    ):
        reading.read_labelled(path, ["text"], "label")


def test_an_escaped_pair_is_a_character(tmp_path):
    path = written(tmp_path, '{"prompt": "a", "completion": "b \\uD83D\\ude00"}', "a.jsonl")
    assert reading.read_completions(path) == [reading.Completion("a", "b 😀")]


def test_a_long_document_is_a_field(tmp_path):
    text = "word " * 50_000
    path = written(tmp_path, f"text,label\n{text},a\n")
    assert reading.read_labelled(path, ["text"], "label") == [reading.LabelledText((text,), "a")]
