"""How a process ends that a launcher started for `id3-optim`."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("transformers", reason="the command comes with the extra `hf`")

from id3_optim.cli import processes

LEAVING = """
import atexit, sys, torch
from id3_optim.cli.processes import leave
atexit.register(print, "ended")
torch.distributed.init_process_group("gloo", init_method=sys.argv[1], rank=0, world_size=1)
leave(int(sys.argv[2]))
print("still here")
"""


@pytest.mark.parametrize("status", (0, 2))
def test_a_process_leaves_its_group_with_its_status(status, tmp_path):
    command = [sys.executable, "-c", LEAVING, f"file://{tmp_path}/meet", str(status)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (status, "ended\n"), done.stderr


def test_a_process_of_no_group_goes_on(monkeypatch):
    monkeypatch.setattr(os, "_exit", pytest.fail)
    processes.leave(0)
