"""Which rank writes the files of an optimizer."""

from __future__ import annotations

from typing import Any

from ..param_groups import named_parameters
from ..ranks import writes_files
from .many_ranks import holders_of


def writes(optimizer: Any) -> bool:
    """Whether this rank writes: the first of those that hold split parameters, or of the `process_group`;
    without either the first of all processes."""
    if optimizer.replicas is not None:
        return optimizer.replicas.rank == 0
    holders = holders_of(named_parameters(optimizer.param_groups))
    return writes_files() if holders.alone else holders.first
