"""What each process runs for `test_reshard.py`: saves checkpoints, or goes on from all that were saved."""

import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from split_models import Twins, main, tiny, with_head
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

FOLDER = Path(sys.argv[1]).parent
SAVED_AT, STEPS = 5, 20
OPTIONS = {"groups": with_head, "max_grad_norm": 0.5, "total_steps": 18}


def states(model, optimizer, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def save(split):
    twins = Twins(split, torch.bfloat16, **OPTIONS)
    twins.steps(SAVED_AT)
    world = torch.distributed.get_world_size()
    for flatten in (False, True):
        path = FOLDER / f"{split}-{world}-{flatten}"
        dcp.save(states(twins.many, twins.ranks, flatten), checkpoint_id=path)
    if torch.distributed.get_rank() == 0:
        torch.save(twins.alone.state_dict(), FOLDER / "one.pt")
        torch.save(twins.one.state_dict(), FOLDER / "model.pt")


def resume(split):
    """Fresh models and optimizers go on from each checkpoint to the bits of the run in one process."""
    found = sorted(path for path in FOLDER.glob("*-?-[TF]*") if path.is_dir())
    assert len(found) >= 12, found
    for path in found:
        flatten = path.name.endswith("True")
        if flatten != (split != "fsdp"):  # every pair of splits in one of the two forms
            continue
        twins = Twins(split, torch.bfloat16, **OPTIONS)
        for p in [*twins.one.parameters(), *twins.many.parameters()]:
            p.data.zero_()
        state = states(twins.many, twins.ranks, flatten)
        assert twins.ranks.n_entries is None, "to ask for a state begins no run"
        dcp.load(state, checkpoint_id=path)
        set_model_state_dict(twins.many, state["model"])
        options = StateDictOptions(flatten_optimizer_state_dict=flatten)
        set_optimizer_state_dict(twins.many, twins.ranks, state["optimizer"], options=options)
        go_on(twins)


def resume_plain(split):
    """The state dict of one process is taken over by ranks too."""
    twins = Twins(split, torch.bfloat16, **OPTIONS)
    model = torch.load(FOLDER / "model.pt")
    for (name, _), q in zip(tiny().named_parameters(), twins.many.parameters(), strict=True):
        q.data.copy_(torch.distributed.tensor.distribute_tensor(model[name], q.device_mesh, q.placements))
    twins.ranks.load_state_dict(torch.load(FOLDER / "one.pt", weights_only=True))
    go_on(twins)


def go_on(twins):
    twins.one.load_state_dict(torch.load(FOLDER / "model.pt"))
    twins.alone.load_state_dict(torch.load(FOLDER / "one.pt", weights_only=True))
    twins.done = SAVED_AT
    twins.check()
    twins.steps(STEPS)
    twins.check()


if __name__ == "__main__":
    main(globals())
