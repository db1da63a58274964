"""`id3-optim train --fsdp --method`: split over two processes, a method trains what it trains whole."""

import pytest
import torch

pytest.importorskip("transformers", reason="`train` comes with the extra `hf`")

from safetensors.torch import load_file
from torchrun import train_in_two
from train_command import save_train_files, words
from transformers import AutoModelForSequenceClassification

from id3_optim import load_delta

DELTA = ["--save-every", 2, "--delta-only", "--originals"]
BY_PARTS = "recipe", "snip", "weights-dynamic"  # they choose the same entries of split parameters
WITH_A_HEAD = "bitfit", "full", "head"  # a new head, trained whole
WAYS = {"split": ["--fsdp"], "whole": []}


def commands(files):
    """Name → words: each method both ways, and one that goes on from a checkpoint."""

    def of(name, *more, **what):
        return words(files, files / name, *map(str, more), "--batch-size", "4", **what)

    found = {}
    for way, own in WAYS.items():
        for method in BY_PARTS:
            more = ["--method", method, *own, *DELTA]
            found[f"{method} {way}"] = of(f"{method} {way}", *more, model="llama", data="facts.jsonl")
        for method in WITH_A_HEAD:
            found[f"{method} {way}"] = of(f"{method} {way}", "--method", method, *own, "--lr", 1e-4)
    kept = ["keep", str(files / "recipe split/checkpoint-2"), str(files / "recipe again")]
    more = ["--method", "recipe", "--fsdp", *DELTA, "--resume"]
    again = of("recipe again", *more, model="llama", data="facts.jsonl")
    return found | {"keep recipe": kept, "recipe again": again}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder in which both processes have run all commands."""
    folder = save_train_files(tmp_path_factory.mktemp("files"))
    train_in_two(folder, commands(folder))
    return folder


@pytest.mark.parametrize("name", BY_PARTS)
def test_the_same_delta(files, name):
    runs = ["split", "whole", *(["again"] if name == "recipe" else [])]
    assert len({(files / f"{name} {run}/delta.safetensors").read_bytes() for run in runs}) == 1
    changed = load_delta(files / f"{name} split/delta.safetensors").changes
    assert changed and (name != "recipe" or not any("embed" in parameter for parameter in changed))


@pytest.mark.parametrize("name", WITH_A_HEAD)
def test_the_same_weights_beside_a_head(files, name):
    base = AutoModelForSequenceClassification.from_pretrained(files / "bert").state_dict()
    split, whole = (load_file(files / f"{name} {way}/model.safetensors") for way in WAYS)
    assert split.keys() == whole.keys()
    assert all(torch.equal(x, whole[key]) for key, x in split.items())
    own = {key for key, x in split.items() if not (key.startswith("classifier.") or x.equal(base[key]))}
    assert bool(own) == (name != "head")
    assert name == "full" or all(key.endswith("bias") for key in own)
