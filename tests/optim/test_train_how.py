"""How `id3-optim train` runs the model: dtypes, activations that are computed again, the learning rate."""

import pytest
import torch

pytest.importorskip("transformers", reason="`train` comes with the extra `hf`")

from train_command import run, save_train_files, words

from id3_optim.cli import tasks
from id3_optim.cli.settings import Settings
from id3_optim.cli.start import load_start
from id3_optim.cli.train import train


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_train_files(tmp_path_factory.mktemp("files"))


def settings(files, output, model="bert", data="reviews.csv", **options):
    data = str(files / data)
    own = {"steps": 4, "batch_size": 8, "budget": 300, "log_every": 1, "cpu": True}
    return Settings(str(files / model), data, data, str(output), **own | options)


@pytest.mark.parametrize(
    ("chosen", "low"),
    [
        ({}, True),
        ({"method": "id3"}, True),
        ({"method": "recipe"}, True),
        ({"method": "full"}, False),
        ({"method": "adapter"}, False),
        ({"method": "lora"}, False),
        ({"method": "id3+lora"}, False),
        ({"optimizer": "adamw"}, False),
    ],
)
def test_weights_without_masters_stay_float32(files, tmp_path, chosen, low):
    """An update of full fine-tuning is less than half a step of bfloat16 for most weights."""
    own = settings(files, tmp_path / "out", bf16=True, **chosen)
    start = load_start(own, tasks.read_task(own.train, own.eval))
    dtypes = {p.dtype for name, p in start.model.named_parameters() if name not in start.fresh}
    assert dtypes == {torch.bfloat16 if low else torch.float32}


def test_full_fine_tuning_in_bf16_moves_the_weights(files, tmp_path):
    own = settings(files, tmp_path / "out", bf16=True, method="full", lr=2e-5)
    _, start, _ = train(own)
    before = dict(load_start(own, tasks.read_task(own.train, own.eval)).model.named_parameters())
    name = "bert.encoder.layer.0.output.dense.weight"
    moved = dict(start.model.named_parameters())[name] != before[name]
    assert moved.float().mean() > 0.9


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ({}, {}),
        ({}, {"pooling": "mean"}),
        ({}, {"sparse_backward": True, "select_every": 2}),
        ({"model": "llama", "data": "facts.jsonl"}, {"release_gradients": True}),
    ],
)
def test_activations_are_computed_again_to_the_same_bits(files, tmp_path, kind, options):
    ends = []
    for again in (False, True):
        own = settings(files, tmp_path / str(again), checkpointing=again, **kind, **options)
        _, start, _ = train(own)
        inner = getattr(start.model, "base_model", start.model)
        layers = [m for m in inner.modules() if hasattr(m, "gradient_checkpointing")]
        assert layers and all(layer.gradient_checkpointing == again for layer in layers)
        ends.append(start.model.state_dict())
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())


@pytest.mark.parametrize(("kind", "end"), [("linear", 0.0), ("cosine", 0.0), ("constant", 1e-2)])
def test_schedules_of_the_learning_rate(files, tmp_path, kind, end):
    _, _, optimizer = train(settings(files, tmp_path / "out", lr=1e-2, lr_scheduler=kind))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([end, end])


def test_options_of_the_command(files, tmp_path, capsys):
    code, _, error = run(
        capsys, words(files, tmp_path / "out", "--lr-scheduler", "cosine", "--checkpointing")
    )
    assert code == 0, error
