"""`id3-optim compare` on models of a few thousand entries; as a program, the same in a process to be killed.

python compare_command.py KILLS WORDS…: runs the command KILLS times, each in a child that SIGKILL ends at a
random moment, and once more to the end. Prints how many children were killed before they had ended.
"""

import os
import random
import signal
import sys
import time

GRID = "--methods id3 full random --budgets 300 --lr 2e-3:8e-3 --seeds 0 1 --steps 6 --tune-steps 4"
HOW = "--batch-size 8 --log-every 2 --eval-every 3 --cpu --threads 1"


def words(files, results, *more) -> list[str]:
    """The command line; a later option takes the place of an earlier one."""
    data = ["--train", files / "reviews.csv", "--eval", files / "reviews.csv"]
    given = ["compare", "--model", files / "bert", *data, "--results", results]
    return [*map(str, given), *GRID.split(), *HOW.split(), *map(str, more)]


def killed(command: list[str], seed: int) -> bool:
    """Runs the command in a child and kills it after 50 to 800 ms; whether that came before its end."""
    from id3_optim.cli import main

    child = os.fork()
    if child == 0:
        os._exit(main(command))
    time.sleep(random.Random(seed).uniform(0.05, 0.8))
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    import torch
    import transformers.trainer  # noqa: F401 - before the children, so that each begins at once

    import id3_optim.cli.compare.running  # noqa: F401
    from id3_optim.cli import main

    torch.set_num_threads(1)  # threads do not survive a fork
    kills, command = int(sys.argv[1]), sys.argv[2:]
    print(sum(killed(command, seed) for seed in range(kills)), flush=True)
    sys.exit(main(command))
