"""What each process runs for `test_train_ranks.py`: commands of `id3-optim train`, one after the other.

Writes (exit status, stdout, stderr) of each by name into rank-<rank>.json.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch

from id3_optim.cli import main
from id3_optim.cli.processes import leave
from id3_optim.cli.watched_trainer import WatchedTrainer

RANK = int(os.environ["RANK"])


def ran(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def keep(checkpoint, output):
    """A folder as a run that was stopped after this checkpoint leaves it."""
    if RANK == 0:
        shutil.copytree(checkpoint, Path(output) / Path(checkpoint).name)
    torch.distributed.barrier()


@contextlib.contextmanager
def failing(how):
    """The last process meets a loss that is no number, or has no memory, in its third batch."""
    compute, batches = WatchedTrainer.compute_loss, []

    def fails(self, model, *args, **kwargs):
        loss = compute(self, model, *args, **kwargs)
        batches.append(model.training)
        if sum(batches) < 3 or not model.training:
            return loss
        if how == "no memory":
            raise MemoryError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return loss * float("nan")

    if RANK == 1:
        WatchedTrainer.compute_loss = fails
    try:
        yield
    finally:
        WatchedTrainer.compute_loss = compute


def killed_at(ending, words):
    """The process that writes the second file of this ending dies when the file is there."""
    save, times = torch.save, []

    def saved(content, path, *args, **kwargs):
        save(content, path, *args, **kwargs)
        times.append(str(path).endswith(ending))
        if times[-1] and sum(times) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = saved
    return ran(words)


def one_by_one(commands):
    found = {}
    for name, words in commands.items():
        if words[0] == "keep":
            keep(*words[1:])
        elif words[0] == "kill":
            found[name] = killed_at(words[1], words[2:])
        elif words[0] == "fail":
            with failing(words[1]):
                found[name] = ran(words[2:])
        else:
            found[name] = ran(words)
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = one_by_one(json.loads((folder / "commands.json").read_text()))
    (folder / f"rank-{RANK}.json").write_text(json.dumps(found))
    leave(0)
