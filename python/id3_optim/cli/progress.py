"""The progress display of `id3-optim train`."""

import transformers
from tqdm.auto import tqdm


class ProgressBar(transformers.TrainerCallback):
    """One line: loss, active entries, entries changed."""

    _bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = tqdm(total=state.max_steps, unit="step", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            counts = {"active": logs.get("n_active"), "changed": logs.get("n_changed")}
            shown = {name: f"{count:,}" for name, count in counts.items() if count is not None}
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", **shown)

    def close(self) -> None:
        """Ends the line, so that what is printed next has its own."""
        if self._bar is not None:
            self._bar.close()
