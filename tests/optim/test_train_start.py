"""`id3-optim train` starts with a model, a tokenizer and texts that fit each other, or says what does not."""

import json
import shutil

import pytest
import torch
from tiny_models import word_tokenizer
from tokenizers import Tokenizer, models
from train_command import run, save_train_files, words
from transformers import BertConfig, BertLMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from id3_optim.cli import start


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_train_files(tmp_path_factory.mktemp("files"))


@pytest.fixture
def no_steps(monkeypatch):
    from id3_optim.cli import train

    monkeypatch.setattr(train, "fit", lambda *args: pytest.fail("the training began"))


def copy(files, tmp_path, model, *without):
    folder = shutil.copytree(files / model, tmp_path / model)
    for name in without:
        (folder / name).unlink()
    return folder


def change(folder, name, **fields):
    content = json.loads((folder / name).read_text()) | fields
    (folder / name).write_text(json.dumps(content))


TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ("bert", "reviews.csv", "expected a tokenizer (tokenizer.json or vocab.txt) in"),
        ("llama", "facts.jsonl", "expected a tokenizer in"),
    ],
)
def test_a_model_without_a_tokenizer(files, tmp_path, capsys, no_steps, model, data, expected):
    folder = copy(files, tmp_path, model, *TOKENIZER)
    code, _, error = run(capsys, words(files, tmp_path / "out", "--model", folder, data=data))
    assert code == 2 and f"--model: {expected}" in error and str(folder) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "{", '{"version": 1}', "[]"])
def test_a_damaged_tokenizer(files, tmp_path, capsys, no_steps, content):
    folder = copy(files, tmp_path, "bert")
    (folder / "tokenizer.json").write_text(content)
    code, _, error = run(capsys, words(files, tmp_path / "out", "--model", folder))
    assert code == 2 and error.startswith(f"id3-optim: error: --model: expected a tokenizer in {folder}")


@pytest.mark.parametrize("limit", ["", "12", [], {"a": 1}, -1, 0, 1, 1.5, True, float("nan")])
def test_a_tokenizer_without_a_length(files, tmp_path, capsys, no_steps, limit):
    folder = copy(files, tmp_path, "bert")
    change(folder, "tokenizer_config.json", model_max_length=limit)
    code, _, error = run(capsys, words(files, tmp_path / "out", "--model", folder))
    assert code == 2 and "--model: expected a tokenizer whose model_max_length is a number" in error
    assert f"got {limit!r}; correct tokenizer_config.json in {folder}" in error


@pytest.mark.parametrize("limit", [None, 2.5, 1e30])
def test_a_tokenizer_with_a_length_of_another_kind(files, tmp_path, capsys, limit):
    folder = copy(files, tmp_path, "bert")
    change(folder, "tokenizer_config.json", model_max_length=limit)
    assert run(capsys, words(files, tmp_path / "out", "--model", folder))[0] == 0


def test_a_tokenizer_that_fails_on_a_text(files, tmp_path, capsys, no_steps, monkeypatch):
    def fails(*args, **kwargs):
        raise TypeError("not supported between instances of 'int' and 'str'")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__call__", fails)
    code, _, error = run(capsys, words(files, tmp_path / "out"))
    assert code == 2 and error.startswith("id3-optim: error: --model: expected a tokenizer in")


def test_a_tokenizer_that_knows_none_of_the_words(files, tmp_path, capsys, no_steps):
    other = tmp_path / "other.csv"
    other.write_text("text,label\nguter Film,1\nschlechtes Buch,0\n")
    code, _, error = run(capsys, words(files, tmp_path / "out", "--train", other, "--eval", other))
    assert code == 2 and "--model: expected a tokenizer for the texts of --train" in error
    assert "4 of 4 tokens unknown ([UNK])" in error


def test_some_unknown_words_are_common(files, tmp_path, capsys):
    other = tmp_path / "other.csv"
    other.write_text("text,label\nthe good Film was,1\nthe bad book was odd,0\n")
    assert run(capsys, words(files, tmp_path / "out", "--train", other, "--eval", other))[0] == 0


@pytest.mark.parametrize("more", [[], ["--task", "causal-lm"]])
def test_an_encoder_does_not_train_on_completions(files, tmp_path, capsys, no_steps, more):
    command = words(files, tmp_path / "out", *more, model="bert", data="facts.jsonl")
    code, _, error = run(capsys, command)
    assert code == 2 and "--model: expected a causal language model for JSONL, got" in error
    assert "BertLMHeadModel" in error and not (tmp_path / "out").exists()


def tiny(kind, **more):
    torch.manual_seed(0)
    sizes = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(intermediate_size=32, max_position_embeddings=32, initializer_range=0.2, **sizes, **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_model_sees_decides_not_its_name(dtype):
    """A BERT that is a decoder is causal, as is GPT-NeoX, whose configuration says is_decoder=False."""
    decoder = BertLMHeadModel(tiny(BertConfig, is_decoder=True))
    neox = GPTNeoXForCausalLM(tiny(GPTNeoXConfig))
    for model in (decoder, neox):
        start.check_causal("here", model.to(dtype))
    encoder = BertLMHeadModel(tiny(BertConfig))
    with pytest.raises(
        ValueError, match="--model: expected a causal language model for JSONL, got here, a Bert"
    ):
        start.check_causal("here", encoder.to(dtype))


def test_a_kind_of_model_without_the_task(files, tmp_path, capsys, no_steps):
    folder = copy(files, tmp_path, "bert")
    change(folder, "config.json", model_type="clip")
    command = words(files, tmp_path / "out", "--model", folder, data="facts.jsonl")
    code, _, error = run(capsys, command)
    assert code == 2 and "--model: expected one that causal-lm can train, got a clip" in error


@pytest.mark.parametrize("model", ["nowhere", "some/where", "./nowhere", "/no/where/at/all", "nowhere/"])
def test_a_mistyped_model(files, tmp_path, capsys, no_steps, monkeypatch, model):
    """Without the hub client's words, its host and its tries."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    code, _, error = run(capsys, words(files, "out", "--model", model))
    assert code == 2 and error.startswith("id3-optim: error: --model: expected a folder")
    assert repr(model) in error or f"got {model}" in error
    for word in ("http", "huggingface", "repo", "connect", "offline"):
        assert word not in error.lower()


@pytest.mark.parametrize("command", ["train", "estimate"])
def test_a_hub_name_without_a_network_ends_at_once(files, tmp_path, capsys, no_steps, monkeypatch, command):
    """The hub's client tries five times, for 20 seconds."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} seconds"))
    train = words(files, tmp_path / "out", "--model", "some/where")
    code, _, error = run(capsys, train if command == "train" else ["estimate", "--model", "some/where"])
    assert code == 2 and "got some/where: there is no such folder, and the hub gave none" in error


def test_a_folder_without_a_configuration(files, tmp_path, capsys, no_steps):
    folder = copy(files, tmp_path, "bert", "config.json")
    code, _, error = run(capsys, words(files, tmp_path / "out", "--model", folder))
    assert code == 2 and f"--model: expected a config.json in {folder}, got none" in error


def test_tokens_beyond_the_models_vocabulary(files, tmp_path, capsys):
    """A tokenizer of another model."""
    folder = copy(files, tmp_path, "bert", *TOKENIZER)
    tokenizer = word_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    vocabulary = tokenizer.get_vocab() | {"awful": 500}
    tokenizer.backend_tokenizer.model = models.WordLevel(vocabulary, unk_token="[UNK]")
    assert isinstance(tokenizer.backend_tokenizer, Tokenizer)
    tokenizer.save_pretrained(folder)
    code, _, error = run(capsys, words(files, tmp_path / "out", "--model", folder))
    assert code == 2 and "--model: expected a tokenizer within the model's 19 tokens, got token 500" in error


def test_texts_longer_than_the_model_takes(files, tmp_path, capsys):
    """The tiny models have 32 positions, and tokenizers without a limit."""
    long = tmp_path / "long.csv"
    rows = [f"{'good ' * n}film,{n % 2}" for n in (40, 61, 3, 4)]
    long.write_text("\n".join(["text,label", *rows]) + "\n")
    assert run(capsys, words(files, tmp_path / "out", "--train", long, "--eval", long))[0] == 0


def test_bf16_without_a_gpu(files, tmp_path, capsys):
    """A machine without an accelerator trains on the CPU, with or without --cpu."""
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    command = [word for word in words(files, tmp_path / "out", "--bf16") if word != "--cpu"]
    code, printed, error = run(capsys, command)
    assert code == 0 and "accuracy" in printed and "use_cpu" not in error
