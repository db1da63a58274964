"""Ctrl-C during `id3-optim train`: the run ends after its current step, with a checkpoint of that step."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

import transformers

from ..ranks import world_size


class Interrupt(transformers.TrainerCallback):
    """Ends the training, with a checkpoint, after the step in which Ctrl-C came.

    stopped: whether this has happened. The last step ends the training anyway, so it does not count.
    """

    def __init__(self) -> None:
        self.requested = self.stopped = False

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block the first Ctrl-C sets `requested`, and a second one raises KeyboardInterrupt.

        Ctrl-C keeps its effect with several processes, which would not stop at the same step, and outside the
        main thread, where Python has no signals.
        """
        if world_size() > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._request)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _request(self, number, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\ninterrupted: saving after this step; Ctrl-C again stops at once", file=sys.stderr)
