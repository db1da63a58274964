"""The Trainer and Accelerate with `fsdp_version: 2`, in two processes on the CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the Trainer comes with the extra `hf`")


def test_accelerates_fsdp2_trains_saves_and_resumes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = Path(__file__).parent / "trainer_fsdp2_run.py"
    done = subprocess.run([*command, str(script), str(tmp_path)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
