"""What a run of several processes excludes, and what it needs."""

from __future__ import annotations

import os

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
        "--method": (settings.method, "it trains what --optimizer, --heuristic and --strategy say"),
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
