"""What W&B, TensorBoard and others are sent: reporters stand where transformers puts those of `report_to`."""

import pytest

pytest.importorskip("transformers", reason="the Trainer comes with the extra `hf`")

import transformers
from trainer_run import arguments, build

from id3_optim.integrations.huggingface import report_first
from id3_optim.wrappers import unwrapped


class Reporter(transformers.TrainerCallback):
    """What `report_to="wandb"` brings, in the Trainer's own place for it: keeps what it is sent."""

    def __init__(self):
        self.sent = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.sent.append(dict(logs))


@pytest.fixture
def reporter(monkeypatch):
    one = Reporter()
    monkeypatch.setattr(transformers.trainer, "get_reporting_integration_callbacks", lambda names: [one])
    return one


def test_reporters_get_the_numbers(tmp_path, reporter, recwarn):
    trainer = build(arguments(tmp_path, report_to="one"))
    report_first(trainer)
    trainer.train()
    sent = [logs for logs in reporter.sent if "loss" in logs]
    kept = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(sent) == 8 and sent[-1]["n_active"] == unwrapped(trainer.optimizer).budget
    assert [logs | {"step": n} for n, logs in enumerate(sent, 1)] == kept
    assert not [w for w in recwarn if "report_first" in str(w.message)]


def test_reporters_that_miss_the_numbers_are_named(tmp_path, reporter):
    args = arguments(tmp_path, report_to="one", max_steps=1, save_strategy="no")
    with pytest.warns(UserWarning, match=r"do not reach \['one'\] without report_first\(trainer\)"):
        build(args).train()
    with pytest.raises(ValueError, match="trainer: expected an ID3Callback among its callbacks, got none"):
        report_first(build(args, callback=Reporter()))


def test_without_reporters_nothing_is_said(tmp_path, recwarn):
    build(arguments(tmp_path, max_steps=1, save_strategy="no")).train()
    assert not [w for w in recwarn if "report_first" in str(w.message)]
