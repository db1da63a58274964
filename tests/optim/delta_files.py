"""Models and deltas on disk, and the command line to run on them."""

import torch
from hand_trained import train_by_hand
from tiny_models import save_bert, save_llama
from transformers import AutoModelForSequenceClassification

from id3_optim import save_delta
from id3_optim.cli import main


def classifier(folder, dtype=torch.float32, seed=1):
    torch.manual_seed(seed)  # of the new head
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=dtype)


class HeadDense:
    """Renames a model's head for `train_by_hand`, which trains what is called head.* whole."""

    def __init__(self, model):
        self._model = model

    def named_parameters(self):
        for name, param in self._model.named_parameters():
            yield name.replace("classifier.", "head."), param


def train(model, output, seed=1, config=True, **options):
    """Changes a tenth of the entries and the head, and writes what `train --delta-only` writes."""
    optimizer = train_by_hand(HeadDense(model), share=0.1, seed=seed)
    output.mkdir()
    if config:
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(output)
    save_delta(output / "delta.safetensors", model, optimizer, **options)
    return output / "delta.safetensors"


def save_files(folder):
    """bert/, llama/; tuned/: a whole tuned classifier; one/ and two/: deltas of bert, with originals."""
    save_bert(folder / "bert")
    save_llama(folder / "llama")
    for seed, name in ((1, "one"), (2, "two")):
        model = classifier(folder / "bert", seed=seed)
        train(model, folder / name, seed, originals=True)
        if name == "one":
            model.save_pretrained(folder / "tuned")
    return folder


def run(capsys, *command):
    """The exit code, what was printed, and the errors."""
    capsys.readouterr()
    code = main([str(word) for word in command])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def bits_of(folder, dtype="auto"):
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype)
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)
