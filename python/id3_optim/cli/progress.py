"""Where the numbers of a run of `id3-optim train` go while it runs: the terminal, TensorBoard, W&B."""

from pathlib import Path

import transformers
from tqdm.auto import tqdm
from transformers.integrations import TensorBoardCallback, WandbCallback

from ..ranks import writes_files
from .settings import Settings

RUNS = "runs"  # in the output directory: TensorBoard's files


class ProgressBar(transformers.TrainerCallback):
    """One line: loss, active entries, entries changed; of several processes the first shows it."""

    _bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = tqdm(total=state.max_steps, unit="step", dynamic_ncols=True, disable=not writes_files())

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            counts = {"active": logs.get("n_active"), "changed": logs.get("n_changed")}
            shown = {name: f"{count:,}" for name, count in counts.items() if count is not None}
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", **shown)

    def note(self, line: str) -> None:
        """Prints a line, before training begins."""
        if writes_files():
            print(line)

    def close(self) -> None:
        """Ends the line, so that what is printed next has its own."""
        if self._bar is not None:
            self._bar.close()


def reporters(settings: Settings) -> list[transformers.TrainerCallback]:
    """The Trainer's callbacks for the names of `--report-to`; they follow the callbacks that add numbers."""
    made = []
    if "tensorboard" in settings.report_to:
        board = TensorBoardCallback()
        board.logging_dir = board.logging_dir or str(
            Path(settings.output) / RUNS
        )  # not in the Trainer's folder
        made.append(board)
    return [*made, *([WandbCallback()] if "wandb" in settings.report_to else [])]
