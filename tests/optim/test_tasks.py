"""`id3_optim.cli.tasks`: files as rows, rows as tokens and batches, and the mistakes in a file."""

import pytest
from tiny_models import word_tokenizer
from tokenizers.processors import TemplateProcessing

from id3_optim.cli import reading, tasks


def test_the_loss_sees_the_completion_alone():
    tokenizer = word_tokenizer(eos_token="</s>")
    row, whole = tasks.encode_completion(reading.Completion("the film is", "one two"), tokenizer, 32)
    words = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert words == ["the", "film", "is", "one", "two", "</s>"]
    assert row["labels"] == [tasks.IGNORED] * 3 + row["input_ids"][3:]
    cut, shorter = tasks.encode_completion(reading.Completion("the film is", "one two"), tokenizer, 4)
    assert (whole, shorter) == (False, True)
    assert tokenizer.convert_ids_to_tokens(cut["input_ids"]) == ["is", "one", "two", "</s>"]
    assert cut["labels"][0] == tasks.IGNORED and tasks.IGNORED not in cut["labels"][1:]


def test_padding_without_a_padding_token():
    tokenizer = word_tokenizer(eos_token="</s>")
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "labels": [-100, 6, 7]}]
    rows.append({"input_ids": [8], "attention_mask": [1], "labels": [8]})
    batch = tasks.collate(rows, tasks.padding_token(tokenizer))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 4, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_tsv_has_no_quoting(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('one\ttwo\tlabel\n"The film\twas "good"\t10\n', encoding="utf-8-sig")
    assert reading.read_labelled(path, ["one", "two"], "label") == [(('"The film', 'was "good"'), "10")]


def test_csv_is_quoted(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text('text,label\n"good, and ""fine""\nfilm",praise\n')
    assert reading.read_labelled(path, ["text"], "label") == [(('good, and "fine"\nfilm',), "praise")]


def test_labels_are_ordered_by_number_where_they_are_numbers():
    assert tasks.sorted_labels({"10", "9", "-1"}) == ["-1", "9", "10"]
    assert tasks.sorted_labels({"10", "9", "b"}) == ["10", "9", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\n", "a.csv: expected rows, got none"),
        ("a.csv", "", "a.csv: expected rows, got none"),
        ("a.csv", "words,label\nx,1\n", r"a.csv: expected a column 'text', got 'words', 'label'; choose"),
        ("a.csv", "text,label\nx\n", r"a.csv:2: expected 2 fields, got 1"),
        ("a.csv", "text,label\nx,1,2\n", r"a.csv:2: expected 2 fields, got 3"),
        (
            "a.csv",
            "text,label\nx,1\ny,1\n",
            r"a.csv: expected two labels or more in column 'label', got '1' alone",
        ),
        ("a.jsonl", "\n", "a.jsonl: expected rows, got none"),
        (
            "a.jsonl",
            '{"prompt": "x", "completion": "y"}\n{',
            r"a.jsonl:2: expected JSON, got '\{' \(Expecting",
        ),
        (
            "a.jsonl",
            '{"prompt": "x"}\n',
            r"a.jsonl:1: expected an object with the string 'completion', got {'prompt': 'x'}",
        ),
        ("a.jsonl", '["x"]\n', r"a.jsonl:1: expected an object with the string 'prompt', got \['x'\]"),
        (
            "a.jsonl",
            '{"prompt": "x", "completion": ""}\n',
            r"a.jsonl:1: completion: expected a text to learn, got ''",
        ),
        (
            "a.txt",
            "x",
            r"--train: expected a name in .csv, .tsv, .jsonl or .conll, got .*a.txt; name it so or give",
        ),
    ],
)
def test_mistakes_in_a_file(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        tasks.read_task(str(tmp_path / name), str(tmp_path / name))


def test_a_label_that_training_never_saw(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\nx,1\ny,2\n")
    (tmp_path / "eval.csv").write_text("text,label\nx,1\ny,3\n")
    with pytest.raises(
        ValueError, match=r"eval.csv: expected labels that occur in .*train.csv, got '3' \(1 such"
    ):
        tasks.read_task(str(tmp_path / "train.csv"), str(tmp_path / "eval.csv"))


def test_no_end_of_text_stands_between_prompt_and_completion():
    """Some tokenizers put one behind every text."""
    tokenizer = word_tokenizer(eos_token="</s>")
    plain, _ = tasks.encode_completion(reading.Completion("the film is", "red"), tokenizer, 32)
    ends = word_tokenizer(eos_token="</s>")
    single = [("</s>", ends.eos_token_id)]
    ends.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=single)
    assert ends("the film")["input_ids"][-1] == ends.eos_token_id
    for prompt in ("the film is", "the"):
        row = reading.Completion(prompt, "red")
        assert tasks.encode_completion(row, ends, 32) == tasks.encode_completion(row, tokenizer, 32)
    assert plain["labels"][:3] == [tasks.IGNORED] * 3
