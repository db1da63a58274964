"""A run that diverged is an error of `id3-optim train`: no result, and the last good checkpoint stays."""

import math
import os

import pytest
import torch
from train_command import run, save_train_files, snapshot, words

from id3_optim.cli.divergence import LASTS, Diverged, FiniteLoss


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_train_files(tmp_path_factory.mktemp("files"))


def poison(monkeypatch, values):
    """Makes the losses of some steps, counted from 1, infinite (by addition) or nan (by multiplication)."""
    from id3_optim.cli.watched_trainer import WatchedTrainer

    compute_loss = WatchedTrainer.compute_loss

    def poisoned(self, model, inputs, *args, **options):
        loss = compute_loss(self, model, inputs, *args, **options)
        value = values.get(self.state.global_step + 1) if model.training else None
        return loss if value is None else loss + value if math.isinf(value) else loss * value

    monkeypatch.setattr(WatchedTrainer, "compute_loss", poisoned)


@pytest.mark.parametrize("more", [["--delta-only"], [], ["--optimizer", "adamw"]])
@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_learning_rate_of_1e30(files, tmp_path, capsys, model, more):
    data = "reviews.csv" if model == "bert" else "facts.jsonl"
    command = words(files, tmp_path / "out", "--lr", "1e30", *more, model=model, data=data, steps=12)
    code, printed, error = run(capsys, command)
    assert code != 0 and "expected finite" in error and "nothing is written" in error
    assert "step" in error and "--lr" in error and "written to" not in printed
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_ends_too_soon_to_last(files, tmp_path, capsys, steps):
    code, _, error = run(capsys, words(files, tmp_path, "--lr", "1e30", "--warmup", 0, steps=steps))
    assert code != 0 and "expected" in error and "finite" in error
    assert os.listdir(tmp_path) == []


def test_the_steps_are_named_and_the_last_good_checkpoint_stays(files, tmp_path, capsys, monkeypatch):
    """Losses of infinity, whose gradients are finite: the weights stay so too."""
    poison(monkeypatch, {step: math.inf for step in (5, 6, 7, 8)})
    code, _, error = run(capsys, words(files, tmp_path, "--save-every", 2, "--keep", 1, steps=12))
    assert code == 2 and "loss: expected finite numbers, got inf in steps 5 to 7" in error
    assert error.endswith(f"the same command with --resume goes on from {tmp_path / 'checkpoint-4'}")
    # Of 4, no later loss was finite; 2 is known to be good. 6 was between losses that were not.
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-4"]


def test_a_single_infinity_is_no_divergence(files, tmp_path, capsys, monkeypatch):
    poison(monkeypatch, {2: math.inf, 4: math.inf, 5: math.inf, 8: math.inf})
    code, _, _ = run(capsys, words(files, tmp_path, "--save-every", 2, "--keep", 1, steps=8))
    assert code == 0 and (tmp_path / "model.safetensors").exists()
    # Of the checkpoints 2, 4, 6, 8 those after a step without a finite loss are not kept.
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_weights_that_are_not_finite_are_not_saved(files, tmp_path, capsys, monkeypatch):
    poison(monkeypatch, {4: math.nan})
    code, _, error = run(capsys, words(files, tmp_path, "--save-every", 2, "--keep", 1, steps=12))
    assert code == 2 and "expected finite weights, got infinity or nan after step 4" in error
    assert os.listdir(tmp_path) == ["checkpoint-2"]


def test_an_old_result_stays(files, tmp_path, capsys):
    assert run(capsys, words(files, tmp_path, "--delta-only"))[0] == 0
    before = snapshot(tmp_path)
    assert run(capsys, words(files, tmp_path, "--lr", "1e30", "--overwrite"))[0] == 2
    assert snapshot(tmp_path) == before


def test_steps_in_a_row_are_counted_not_batches():
    watch = FiniteLoss()
    nan, good = torch.tensor(math.nan), torch.tensor(1.0)
    for step in (1, 2, 4, 5):  # two batches a step, the first of them finite
        watch.see(step, good)
        watch.see(step, nan)
        watch.see(step, nan)
    assert watch.steps == [4, 5] and watch.finite(3) and not watch.finite(5)
    with pytest.raises(Diverged, match="got nan in steps 4 to 6"):
        watch.see(6, nan)
    assert LASTS == 3
