"""ID3AdamW in axolotl's trainer: the plugin sets the trainer up that axolotl has made."""

import pytest
import torch

pytest.importorskip("peft", reason="the plugin needs the extra `peft`")

import transformers
from tiny_models import save_llama
from transformers import AutoModelForCausalLM

from id3_optim import load_delta

WORDS = [torch.tensor([6, 8, 13, 5 + i % 2]) for i in range(8)]
ROWS = [{"input_ids": words, "labels": words} for words in WORDS]


class AxolotlTrainer(transformers.Trainer):
    """Calls the factory of `optimizer_cls_and_kwargs` as `OptimizerMixin` does: its arguments go in, too."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            factory, options = self.optimizer_cls_and_kwargs
            self.optimizer = factory()(self.model if model is None else model, self.args, **options)
        return self.optimizer


def axolotl_trainer(folder, **arguments):
    try:
        from axolotl.core.trainers.base import AxolotlTrainer as Trainer
        from axolotl.core.training_args import AxolotlTrainingArguments as Arguments
        from datasets import Dataset

        rows = Dataset.from_list([{name: row.tolist() for name, row in each.items()} for each in ROWS])
    except ModuleNotFoundError:
        Trainer, Arguments, rows = AxolotlTrainer, transformers.TrainingArguments, ROWS
    model = AutoModelForCausalLM.from_pretrained(save_llama(folder / "base"))
    fixed = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "use_cpu": True, "report_to": "none"}
    fixed |= {"max_grad_norm": 0, "learning_rate": 1e-2}
    arguments = Arguments(str(folder / "run"), **(fixed | arguments))
    return Trainer(model=model, args=arguments, train_dataset=rows)


class Configuration(dict):
    __getattr__ = dict.__getitem__


def test_axolotl(plugin, tmp_path):
    ours = plugin("axolotl")
    trainer = axolotl_trainer(tmp_path)
    cfg = Configuration(id3={"budget": 300, "max_grad_norm": 1.0})
    plugin = ours.ID3Plugin()
    assert plugin.get_input_args() == "id3_optim.integrations.axolotl.ID3Args"
    assert ours.ID3Args(**cfg).id3 == cfg["id3"]
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    assert [line["n_active"] for line in trainer.state.log_history if "loss" in line] == [75, 150, 225, 300]
    delta = load_delta(tmp_path / "run/checkpoint-4/delta.safetensors")
    assert delta.settings["budget"] == 300 and delta.settings["total_steps"] == 4
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    delta.apply(base)
    assert all(map(torch.equal, base.parameters(), trainer.model.cpu().parameters()))


@pytest.mark.parametrize(
    ("arguments", "id3", "message"),
    [
        ({"max_grad_norm": 1.0}, {"budget": 300, "max_grad_norm": 1.0}, "max_grad_norm: expected"),
        ({}, {"budget": 300, "lr": 1e-3}, "lr: expected it in TrainingArguments"),
        ({}, {"budget": 0.0}, "budget: expected"),
    ],
)
def test_axolotl_options_that_do_not_fit(plugin, tmp_path, arguments, id3, message):
    ours = plugin("axolotl")
    with pytest.raises(ValueError, match=message):
        ours.ID3Plugin().post_trainer_create(Configuration(id3=id3), axolotl_trainer(tmp_path, **arguments))
