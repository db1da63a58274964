"""In which order the streams of a GPU work on what hooks keep.

A hook runs in autograd's thread for its device, on the stream of the parameter's gradient. The first hook of
a pass prepares every device, on the streams that are current in its own thread; a step works on the streams
of its caller. Each waits for the one before it on the same device, so any of them may be any stream. Autograd
does the same for gradients alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Streams:
    """The stream that has worked last on each CUDA device."""

    def __init__(self) -> None:
        self._last: dict[torch.device, torch.cuda.Stream] = {}

    def follow(self, device: torch.device, tensors: Iterable[Tensor]) -> None:
        """Lets the device's current stream wait for the last one there; the host does not wait.

        tensors: what either works on. Memory of another stream is not reused before this one is done with it.
        """
        if device.type != "cuda":
            return
        current = torch.cuda.current_stream(device)
        last = self._last.get(device)
        self._last[device] = current
        if last is not None and last != current:
            current.wait_stream(last)
            for tensor in tensors:
                tensor.record_stream(current)
