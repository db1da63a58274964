"""A run of `id3-optim train` that stops early: one error, which says how to go on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import safetensors

from .checkpoints import how_to_go_on
from .divergence import Diverged
from .failures import first_line, lacks_memory, lacks_peer
from .output import UNFINISHED, remove_unfinished

_LESS_MEMORY = "less is needed with a smaller --batch-size or --max-length, --bf16 or --release-gradients"


@contextlib.contextmanager
def stopping(output: Path) -> Iterator[None]:
    """Ends a run that stops early: says how to go on, and removes what it was writing.

    Raises Diverged, KeyboardInterrupt, MemoryError that says what needs less, and OSError for whatever went
    wrong while files were written.
    """
    try:
        yield
    except Diverged as error:
        raise Diverged(f"{error}; nothing is written, and {how_to_go_on(output)}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_go_on(output)) from None
    except (OSError, RuntimeError, MemoryError, safetensors.SafetensorError) as error:
        if lacks_memory(error):
            raise MemoryError(f"{first_line(error).rstrip('.')}; {_LESS_MEMORY}") from error
        # torch reports a full disk as RuntimeError, which also has many other causes.
        unwritten = any((output / UNFINISHED).glob("*")) and not lacks_peer(error)
        if isinstance(error, RuntimeError) and not unwritten:
            raise
        raise OSError(
            f"--output: expected to write into {output}, got {first_line(error)}; {how_to_go_on(output)}"
        ) from error
    finally:
        remove_unfinished(output)
