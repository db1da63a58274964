"""Lightning's Trainer in two processes without DistributedDataParallel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="Lightning comes with the extra `lightning`")
pytest.importorskip("transformers", reason="the end of the processes comes with the extra `hf`")

SCRIPT = Path(__file__).parent / "lightning_ranks_run.py"


def test_two_processes_train_and_resume_as_one_and_refuse_what_parts_them(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # Lightning leaves there the seed of a test before this one, with which its sampler would shuffle.
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    done = subprocess.run(
        [*command, str(SCRIPT), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
