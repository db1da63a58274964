"""torchrun, for tests of several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

LEAVES = Path(__file__).parent / "run_and_leave.py"  # before a program of its own: it then ends at once


def launch(*command, processes=2, timeout=280):
    """The finished torchrun, with what it has written as text."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    # Lightning leaves there the seed of a test before this one, with which its sampler would shuffle.
    environment = {name: value for name, value in os.environ.items() if name != "PL_GLOBAL_SEED"}
    words = [sys.executable, *map(str, (*start, *command))]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=timeout)


def train_in_two(folder, commands):
    """Runs commands of `id3-optim train` (name → words) in two processes, of which all succeed in both."""
    (folder / "commands.json").write_text(json.dumps(commands))
    done = launch(Path(__file__).parent / "train_ranks_run.py", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        for name, (code, _, error) in json.loads((folder / f"rank-{rank}.json").read_text()).items():
            assert code == 0, (name, error[-500:])
