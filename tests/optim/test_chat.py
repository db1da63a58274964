"""Rows with `messages`: what the model reads, what it learns, and the mistakes in them."""

import json

import pytest
from tiny_models import save_llama, word_tokenizer
from train_command import run, words
from transformers import AutoModelForCausalLM, AutoTokenizer

from id3_optim.cli import reading, tasks
from id3_optim.cli.chat import Conversation, encode_conversation

# Each turn is its role's word, the text, and an end; as in ChatML, with words that the tests' tokenizer has.
TEMPLATE = (
    "{% for m in messages %}{{ 'one ' if m.role == 'user' else 'two ' if m.role == 'assistant' else 'a ' }}"
    "{{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}two {% endif %}"
)
# Takes the earlier answers away, as templates of reasoning models do with reasoning.
FORGETFUL = TEMPLATE.replace("{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else '' }}")


def tokenizer(template=TEMPLATE):
    made = word_tokenizer(eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": ["</s>"]})
    made.chat_template = template
    return made


def talk(*contents):
    """The user and the assistant in turns."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def encoded(*contents, template=TEMPLATE, max_length=64):
    made = tokenizer(template)
    row, _ = encode_conversation(Conversation(tuple(talk(*contents)), "a.jsonl:7"), made, max_length)
    learnt = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == t]
    assert {*row["labels"]} <= {*learnt, tasks.IGNORED} and len(row["attention_mask"]) == len(row["labels"])
    return tuple(" ".join(made.convert_ids_to_tokens(ids)) for ids in (row["input_ids"], learnt))


def test_the_loss_sees_the_turns_of_the_assistant_with_their_ends():
    read, learnt = encoded("the film", "is red", "a book", "is blue", "was good")
    assert read == "one the film </s> two is red </s> one a book </s> two is blue </s>"
    assert learnt == "is red </s> is blue </s>"


def test_a_long_conversation_is_cut_at_its_beginning():
    read, learnt = encoded("the film", "is red", "a book", "is blue", max_length=6)
    assert read == "book </s> two is blue </s>" and learnt == "is blue </s>"


def test_a_template_that_changes_earlier_turns():
    assert encoded("the film", "is red", template=FORGETFUL)[1] == "is red </s>"
    with pytest.raises(ValueError, match="leaves earlier turns as they were, got one that changes them"):
        encoded("the film", "is red", "a book", "is blue", template=FORGETFUL)


def test_a_template_that_refuses():
    refusing = "{{ raise_exception('roles must alternate') }}"
    message = r"^a.jsonl:7: expected .* takes, got roles must alternate for 'the film'"
    with pytest.raises(ValueError, match=message):
        encoded("the film", "is red", template=refusing)


def test_a_long_answer_is_cut_at_its_end():
    assert encoded("the film", "is red was good", max_length=3) == ("two is red", "is red")


def test_a_prompt_that_thinks_is_learnt_from_where_turns_leave_it():
    thinking = TEMPLATE.replace("two {% endif %}", "two a {% endif %}")
    assert encoded("the film", "is red", template=thinking)[1] == "is red </s>"


def test_a_greeting_is_read_and_not_learnt():
    row = Conversation(({"role": "assistant", "content": "good"}, *talk("the film", "is red")))
    made, cut = encode_conversation(row, tokenizer(), 64)
    assert not cut and encode_conversation(row, tokenizer(), 10)[1]
    assert made["labels"].count(tasks.IGNORED) == 8 and len(made["labels"]) == 11


def test_a_row_with_a_completion_is_no_conversation(tmp_path):
    rows = [
        {"prompt": "a", "completion": "b", "messages": None},
        {"prompt": "a", "completion": "b", "messages": 1},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert reading.read_completions(str(tmp_path / "a.jsonl")) == [("a", "b")] * 2


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"a.jsonl:2: messages: expected a list of objects, got \[\]"),
        ("hello", "a.jsonl:2: messages: expected a list of objects, got 'hello'"),
        ([{"role": "user"}], r"a.jsonl:2: messages: expected objects such as .*, got \{'role': 'user'\}"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "a.jsonl:2: messages: expected objects such as",
        ),
        ([{"role": "bot", "content": "x"}], "a.jsonl:2: messages: expected a role of system, .*, got 'bot'"),
        (
            [{"role": "assistant", "content": "x"}, *talk("y")],
            "a.jsonl:2: messages: expected an answer of the assistant to learn, got none",
        ),
        (talk("x"), "a.jsonl:2: messages: expected an answer of the assistant to learn, got none"),
        (
            talk("x", " "),
            "a.jsonl:2: messages: expected an answer of the assistant to learn, got an empty one",
        ),
    ],
)
def test_mistakes_in_messages(tmp_path, messages, message):
    rows = [{"messages": talk("x", "y"), "more": 1}, {"messages": messages}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=message):
        reading.read_completions(str(tmp_path / "a.jsonl"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    save_llama(folder / "llama")
    facts = [("the film", "is red"), ("a book", "is blue")]
    rows = [{"messages": talk(*facts[i % 2])} for i in range(16)]
    rows += [{"prompt": "the film is", "completion": "red"}]
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_model_learns_to_answer(files, capsys, tmp_path):
    tokenizer().save_pretrained(files / "llama")
    more = ["--lr", "2e-2", "--budget", "0.3"]
    code, _, _ = run(
        capsys, words(files, tmp_path / "out", *more, model="llama", data="talk.jsonl", steps=60)
    )
    assert code == 0
    trained = AutoTokenizer.from_pretrained(tmp_path / "out")
    asked = trained.apply_chat_template(
        talk("a book"), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    answer = model.generate(**asked, max_new_tokens=3, do_sample=False, pad_token_id=0)[0, -3:]
    assert " ".join(trained.convert_ids_to_tokens(answer)) == "is blue </s>"


def test_a_run_that_goes_on_needs_its_template(files, capsys, tmp_path):
    tokenizer().save_pretrained(files / "llama")
    more = ["--save-every", "2", "--max-length", "5"]
    command = words(files, tmp_path / "out", *more, model="llama", data="talk.jsonl", steps=2)
    code, printed, _ = run(capsys, command)
    assert code == 0
    assert "--train: 16 of 17 rows are cut to 5 tokens (--max-length)" in printed and "--eval: 16" in printed
    tokenizer(TEMPLATE.replace("two ", "one ")).save_pretrained(files / "llama")
    code, _, error = run(capsys, [*command, "--resume"])
    assert code == 2 and "--model: expected the tokens as in checkpoint-2, got other tokens" in error
    tokenizer().save_pretrained(files / "llama")
    assert run(capsys, [*command, "--resume"])[0] == 0


def test_a_tokenizer_without_a_template(files, capsys, tmp_path):
    word_tokenizer(eos_token="</s>").save_pretrained(files / "llama")
    (files / "llama" / "chat_template.jinja").unlink(missing_ok=True)
    code, _, error = run(capsys, words(files, tmp_path / "out", model="llama", data="talk.jsonl"))
    assert code == 2 and "expected a tokenizer with a chat template for rows with messages, got none" in error
