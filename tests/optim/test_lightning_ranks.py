"""Lightning's Trainer in two processes without DistributedDataParallel."""

from pathlib import Path

import pytest

pytest.importorskip("lightning", reason="Lightning comes with the extra `lightning`")
pytest.importorskip("transformers", reason="the end of the processes comes with the extra `hf`")

from torchrun import launch

SCRIPT = Path(__file__).parent / "lightning_ranks_run.py"


def test_two_processes_train_and_resume_as_one_and_refuse_what_parts_them(tmp_path):
    done = launch(SCRIPT, tmp_path, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
