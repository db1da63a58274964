"""What a run of several processes excludes, and what it needs."""

from __future__ import annotations

import atexit
import gc
import os
import sys

from ..method_table import splits
from ..ranks import launched


def check_processes(settings) -> None:
    """Raises ValueError for options that `fsdp` excludes, and for it outside a launcher.

    settings: `settings.Settings`.
    """
    if not settings.fsdp:
        return
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "--fsdp: expected the processes of a launcher, got none; start the command by "
            "`torchrun --nproc-per-node GPUS -m id3_optim.cli train …`"
        )
    excluded = {
        "--method": (
            settings.method is not None and not splits(settings.method),
            f"{settings.method} adds to the model, or needs whole tensors to choose",
        ),
        "--sparse-backward": (settings.sparse_backward, "it needs whole weights"),
        "--memory-report": (settings.memory_report, "the prediction is that of one process"),
        "--tensor-cap": (settings.tensor_cap, "no process sees all entries of a tensor"),
        "--prune": (settings.prune, "no process sees all entries"),
        "--heuristic": (settings.heuristic == "d3-relative", "d3-relative needs whole tensors"),
        "--mask": (settings.mask, "the entries of a delta are those of whole tensors"),
        "--reuse-mask": (settings.reuse_mask, "the first run's entries are those of whole tensors"),
    }
    for option, (given, reason) in excluded.items():
        if given:
            raise ValueError(f"{option}: does not apply to --fsdp: {reason}")


def exchanges(settings) -> bool:
    """Whether the optimizer averages what the steps of several processes use: there are no whole gradients,
    which DistributedDataParallel would average."""
    return (
        launched()[1] > 1 and not settings.fsdp and (settings.release_gradients or settings.sparse_backward)
    )


def leave(status: int) -> None:
    """Ends a process that a launcher started for a command, at once; returns where it is in no group.

    Otherwise gloo's threads abort now and then a process whose interpreter ends before they do
    (pytorch#190489); DTensor's caches keep them alive even where the group is destroyed. What was registered
    with atexit runs, such as the end of a W&B run. After a failure the group is left as it is: the end of a
    group can wait for processes that do not come.
    """
    distributed = sys.modules.get("torch.distributed")
    if not (distributed and distributed.is_available() and distributed.is_initialized()):
        return
    if status == 0:
        gc.collect()  # a model or a Trainer that holds the group
        distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
