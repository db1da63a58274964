"""What each process runs for `test_killed.py`: the example of FSDP2, from its newest checkpoint on.

Arguments: a folder, and of a killed run where and which rank: it kills itself while it saves step 8.
"""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter

from id3_optim.distributed import checkpoint
from id3_optim.distributed.part import full

spec = importlib.util.spec_from_file_location("fsdp2", Path(__file__).parents[2] / "examples" / "fsdp2.py")
fsdp2 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fsdp2)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half(writer, plan, planner):
    """Half of the file is on the disk."""
    write(writer, plan, planner).wait()
    path = Path(writer.path) / f"{plan.storage_data.prefix}0.distcp"
    os.truncate(path, path.stat().st_size // 2)
    die()


def written(writer, plan, planner):
    write(writer, plan, planner).wait()
    die()


write = FileSystemWriter.write_data
DEATHS = {
    "before": (FileSystemWriter, "write_data", die),
    "half": (FileSystemWriter, "write_data", half),
    "written": (FileSystemWriter, "write_data", written),
    "metadata": (FileSystemWriter, "finish", die),
    "rename": (checkpoint.os, "rename", die),
}


def main(folder, where=None, rank=None):
    torch.distributed.init_process_group("gloo")
    model, optimizer = fsdp2.build(12)
    saved = sorted(folder.glob("step-?"))
    if saved:
        checkpoint.load(saved[-1], model, optimizer)
        assert optimizer.steps_done == int(saved[-1].name[-1])
    for last in (5, 8):
        if optimizer.steps_done < last:
            fsdp2.train(model, optimizer, optimizer.steps_done, last)
            if last == 8 and where and torch.distributed.get_rank() == int(rank):
                setattr(*DEATHS[where])
            checkpoint.save(folder / f"step-{last}", model, optimizer)
    fsdp2.train(model, optimizer, 8, 12)
    whole = {name: full(p.detach()) for name, p in model.named_parameters()}
    if torch.distributed.get_rank() == 0:
        torch.save(whole, folder / "end.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    os._exit(0)  # gloo's threads can end a process that ends late with SIGABRT: pytorch#190489
