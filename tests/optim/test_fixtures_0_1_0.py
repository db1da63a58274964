"""States and deltas that version 0.1.0 wrote: they load, go on and are written again to the same bits."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from fixture_cases import CASES, DELTAS, END, SAVED_AT, make_model, make_optimizer, take_step

from id3_kernels import available_backends
from id3_optim import load_delta, save_delta

FOLDER = Path(__file__).parent / "fixtures" / "0.1.0"
BACKENDS = [name for name in ("cpu", "reference") if available_backends()[name] is None]


def recorded(run, prefix):
    """Tensors of a run by parameter name: `base`, `3`, `6`, `gradient-3`, …"""
    tensors = safetensors.torch.load_file(FOLDER / f"{run}.safetensors")
    found = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{prefix}/")}
    return {key.removeprefix(f"{prefix}/"): tensor for key, tensor in found.items()}


def recorded_state(run, steps):
    return torch.load(FOLDER / f"{run}-{steps}.pt", weights_only=True)


def model_at(run, prefix):
    model = make_model(CASES[run].dtype)
    model.load_state_dict(recorded(run, prefix))
    return model


def resumed(run, steps, **options):
    model = model_at(run, steps)
    optimizer = make_optimizer(model, CASES[run], **options)
    optimizer.load_state_dict(recorded_state(run, steps))
    return model, optimizer


def same(a, b):
    """Equal types, values and bits, through dicts and lists, in the same order of keys."""
    if isinstance(a, torch.Tensor):
        alike = (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def check_parameters(model, expected):
    assert dict(model.named_parameters()).keys() == expected.keys()
    for name, param in model.named_parameters():
        assert same(param.detach(), expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", CASES)
def test_a_state_goes_on_to_the_recorded_bits(run, backend):
    model, optimizer = resumed(run, SAVED_AT, backend=backend)
    assert optimizer.steps_done == SAVED_AT
    for step in range(SAVED_AT, END):
        take_step(model, optimizer, recorded(run, f"gradient-{step}"))
    check_parameters(model, recorded(run, END))
    assert same(optimizer.state_dict(), recorded_state(run, END))


@pytest.mark.parametrize("steps", [SAVED_AT, END])
@pytest.mark.parametrize("run", CASES)
def test_a_loaded_state_is_saved_as_it_was(run, steps):
    _, optimizer = resumed(run, steps)
    assert same(optimizer.state_dict(), recorded_state(run, steps))


def test_the_steps_of_every_run_change_entries():
    for run in CASES:
        before, after = recorded(run, SAVED_AT), recorded(run, END)
        assert any(not torch.equal(before[name], after[name]) for name in before), run


@pytest.mark.parametrize("delta", DELTAS)
def test_a_delta_makes_the_recorded_model_and_comes_off_again(delta):
    run, _ = DELTAS[delta]
    model, loaded = model_at(run, "base"), load_delta(FOLDER / f"delta-{delta}.safetensors")
    undo = loaded.apply(model, strict=loaded.fingerprint is not None)
    check_parameters(model, recorded(run, END))
    undo.revert()
    check_parameters(model, recorded(run, "base"))


@pytest.mark.parametrize("delta", [name for name, (_, options) in DELTAS.items() if "originals" in options])
def test_a_delta_with_originals_gives_the_base_back(delta):
    run, _ = DELTAS[delta]
    model, loaded = model_at(run, END), load_delta(FOLDER / f"delta-{delta}.safetensors")
    loaded.revert(model)
    base, tuned = recorded(run, "base"), recorded(run, END)
    whole = {name for name, change in loaded.changes.items() if change.indices is None}
    check_parameters(model, {name: tuned[name] if name in whole else base[name] for name in base})


@pytest.mark.parametrize("delta", DELTAS)
def test_a_delta_is_written_again_to_the_same_bytes(delta, tmp_path):
    run, options = DELTAS[delta]
    kept = FOLDER / f"delta-{delta}.safetensors"
    load_delta(kept).save(tmp_path / "copy.safetensors", compact=options.get("compact", False))
    assert (tmp_path / "copy.safetensors").read_bytes() == kept.read_bytes()
    save_delta(tmp_path / "resumed.safetensors", *resumed(run, END), **options)
    assert (tmp_path / "resumed.safetensors").read_bytes() == kept.read_bytes()
