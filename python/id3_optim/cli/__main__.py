"""`python -m id3_optim.cli` is the command `id3-optim`."""

import sys

from .main import command

sys.exit(command())
