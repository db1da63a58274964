"""What a run of several processes excludes, and what it needs."""

from __future__ import annotations

import os

from ..ranks import launched


def check_processes(settings) -> None:
    """Raises ValueError for options that several processes exclude, and for `fsdp` outside a launcher.

    settings: `settings.Settings`.
    """
    if not settings.fsdp:
        if settings.release_gradients and launched()[1] > 1:
            raise ValueError("--release-gradients: needs --fsdp with several processes: without it each of "
                             "them averages whole gradients")  # fmt: skip
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
        "--mask": (settings.mask, "the entries of a delta are those of whole tensors"),
        "--reuse-mask": (settings.reuse_mask, "the first run's entries are those of whole tensors"),
    }
    for option, (given, reason) in excluded.items():
        if given:
            raise ValueError(f"{option}: does not apply to --fsdp: {reason}")
