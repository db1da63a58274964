"""What a run of several processes excludes, and what it needs."""

from __future__ import annotations

import os

from ..ranks import launched


def check_processes(settings) -> None:
    """Raises ValueError for options that several processes exclude, and for `fsdp` outside a launcher.

    settings: `settings.Settings`.
    """
    if not settings.fsdp:
        if launched()[1] > 1:
            _check_averaged(settings)
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


def _check_averaged(settings) -> None:
    """Raises ValueError for options that leave DistributedDataParallel no gradients to average."""
    whole = "without --fsdp each process averages whole gradients"
    if settings.release_gradients:
        raise ValueError(f"--release-gradients: needs --fsdp with several processes: {whole}")
    if settings.sparse_backward:
        raise ValueError(f"--sparse-backward: does not apply to several processes: {whole}; leave it out")
