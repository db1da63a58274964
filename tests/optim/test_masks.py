"""A mask that is known before training: of a delta, of another run, or of the command's first run."""

import copy
import json

import pytest
import torch
from test_resume import same, through_a_file
from train_command import run, save_train_files, words

from id3_optim import ID3AdamW, load_delta, save_delta
from id3_optim.masks import mask_of, trained_entries


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return save_train_files(tmp_path_factory.mktemp("files"))


def static(model, heuristic, budget):
    twin = copy.deepcopy(model)
    options = {"lr": 1e-2, "total_steps": 40, "strategy": "static"}
    return twin, ID3AdamW(twin.named_parameters(), budget=budget, heuristic=heuristic, **options)


def test_the_first_step_makes_the_entries_of_a_delta_active(tmp_path, model, make, train):
    tuned, optimizer = make(model)
    train(tuned, optimizer, 0, 40)
    save_delta(tmp_path / "delta", tuned, optimizer)
    for entries in (load_delta(tmp_path / "delta"), trained_entries(tuned, optimizer)):
        twin, second = static(model, mask_of(entries, model), optimizer.n_active)
        train(twin, second, 0, 1)
        for own, first in zip(second.touched(), optimizer.touched(), strict=True):
            assert torch.equal(own.indices, first.indices)
        train(twin, second, 1, 9)
        assert second.n_active == optimizer.n_active
        for t, base in zip(second.touched(), model.parameters(), strict=True):
            frozen = torch.ones(base.numel(), dtype=torch.bool)
            frozen[t.indices.long()] = False
            assert torch.equal(t.param.flatten()[frozen], base.flatten()[frozen])


def test_resume_needs_the_same_mask(model, train):
    masks = [{"0.weight": torch.tensor(rows)} for rows in ([3, 4, 900], [3, 4, 901])]
    begun, first = static(model, mask_of(masks[0], model), 3)
    train(begun, first, 0, 3)
    state = through_a_file(first.state_dict())
    resumed, second = static(begun, mask_of(masks[0], model), 3)
    second.load_state_dict(state)
    for pair in ((begun, first), (resumed, second)):
        train(*pair, 3, 6)
    assert same(first.state_dict(), second.state_dict())
    with pytest.raises(ValueError, match=r"heuristic: expected .*fisher.*checksum.* as in the optimizer"):
        static(begun, mask_of(masks[1], model), 3)[1].load_state_dict(state)


def test_what_the_model_lacks_is_refused(model):
    with pytest.raises(ValueError, match=r"entries: expected names of the model's parameters, got 'x'"):
        mask_of({"x": torch.tensor([0])}, model)
    with pytest.raises(ValueError, match=r"entries: expected indices below 60 for 0\.bias, got 60"):
        mask_of({"0.bias": torch.tensor([0, 60])}, model)


def trained(capsys, files, output, *more):
    report = output.with_suffix(".json")
    code, _, error = run(capsys, words(files, output, "--lr", "1e-2", "--report", report, *more, steps=12))
    assert code == 0, error
    return json.loads(report.read_text()), load_delta(output / "delta.safetensors")


def entries_of(delta):
    return {name: c.indices.tolist() for name, c in delta.changes.items() if c.indices is not None}


def test_the_command_trains_the_mask_of_a_delta_or_of_a_first_run(capsys, files, tmp_path):
    _, plain = trained(capsys, files, tmp_path / "plain", "--delta-only")
    mask = tmp_path / "plain" / "delta.safetensors"
    given, by_delta = trained(capsys, files, tmp_path / "given", "--delta-only", "--mask", mask)
    twice, reused = trained(capsys, files, tmp_path / "twice", "--delta-only", "--reuse-mask")
    assert entries_of(plain) == entries_of(by_delta) == entries_of(reused)
    assert given["entries"]["active"] == twice["entries"]["active"] == 300
    assert given["metrics"] == twice["metrics"]
    more, _ = trained(capsys, files, tmp_path / "more", "--delta-only", "--mask", mask, "--budget", "400")
    assert more["metrics"] == given["metrics"]
    assert more["entries"] == given["entries"]  # a larger budget would search for more in every step
    for name, change in by_delta.changes.items():
        assert torch.equal(change.values, reused.changes[name].values)
        assert name not in plain.changes or not torch.equal(change.values, plain.changes[name].values)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mask", "nowhere"], "--mask: expected a file, got nowhere, which is none"),
        (["--mask", "FILE", "--strategy", "static"], "--strategy: does not apply to --mask"),
        (["--mask", "FILE", "--reuse-mask"], "--reuse-mask: does not apply to --mask: it is a mask too"),
        (["--reuse-mask", "--save-every", "2"], "--reuse-mask: does not apply to --save-every"),
        (["--reuse-mask", "--method", "id3"], "--reuse-mask: does not apply to --method"),
        (["--reuse-mask", "--optimizer", "adamw"], "--optimizer: expected id3 with --reuse-mask, got adamw"),
        (["--prune", "4", "--release-gradients"], "--prune: does not apply to release_gradients"),
        (["--prune", "4", "--sparse-backward"], "--prune: does not apply to release_gradients"),
        (["--prune", "4", "--strategy", "repeat"], "--prune: does not apply to strategy 'repeat'"),
        (["--prune", "4", "--select-every", "3"], "--prune: expected every to be a multiple of select_every"),
        (["--prune", "0"], "--prune: expected at least 1, got 0"),
        (["--prune-share", "1"], "--prune-share: expected a number above 0 and below 1, got 1.0"),
        (["--tensor-cap", "0"], "--tensor-cap: expected a number above 0 and below 1, got 0.0"),
        (["--entry-warmup", "-1"], "--entry-warmup: expected at least 0, got -1"),
    ],
)
def test_refused_before_the_model_is_loaded(capsys, files, tmp_path, more, message):
    more = [str(files / "reviews.csv") if word == "FILE" else word for word in more]
    code, _, error = run(capsys, words(files, tmp_path / "out", *more))
    assert code != 0 and message in error


def test_a_mask_of_more_entries_than_the_budget_is_refused(capsys, files, tmp_path):
    trained(capsys, files, tmp_path / "plain", "--delta-only")
    mask = tmp_path / "plain" / "delta.safetensors"
    code, _, error = run(capsys, words(files, tmp_path / "out", "--mask", mask, "--budget", "299"))
    assert code != 0 and "--budget: expected at least the 300 entries of the mask, got 299" in error


def test_the_options_reach_the_optimizer(capsys, files, tmp_path):
    more = ["--prune", "4", "--prune-share", "0.2", "--tensor-cap", "0.5", "--entry-warmup", "3"]
    report, delta = trained(
        capsys, files, tmp_path / "out", "--delta-only", "--heuristic", "d3-relative", *more
    )
    settings = delta.settings
    assert settings["prune"] == {"every": 4, "share": 0.2} and settings["tensor_cap"] == 0.5
    assert settings["entry_warmup"] == 3 and "Relative" in settings["heuristic"]["name"]
    assert report["optimizer"]["heuristic"]["d3"] == {"name": "d3", "eps": 1.0, "exp": 2.0}
    assert max(len(rows) for rows in entries_of(delta).values()) <= 150
