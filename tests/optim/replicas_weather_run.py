"""What each process runs for `test_replicas.py`: loss scales, states, replicas that differ, refusals."""

import copy
import functools
from datetime import timedelta

import torch
from replica_pairs import Pair
from split_models import expect, fsdp, main, tiny, with_head
from torch import distributed as dist
from torch import nn

import id3_optim
from id3_optim import ID3AdamW, sparse_backward
from id3_optim.running import Running
from id3_optim.state.shard import Shard

# --- loss scales -------------------------------------------------------------------------------------------


def overflow(_):
    """An infinity on one replica stops the step on all, and all scales stay alike."""
    for release in (False, True):
        pair = Pair(release=release, budget=1.0, strategy="static", groups=with_head)
        scalers = [id3_optim.GradScaler("cpu", init_scale=8.0, growth_interval=3) for _ in range(2)]
        for step in range(7):
            pair.own = spoiled if step == 3 else Pair.own.__get__(pair)
            pair.give(scale=scalers[0].get_scale())
            for scaler, optimizer in zip(scalers, pair.optimizers, strict=True):
                scaler.scale(torch.zeros(1))
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            assert scalers[0].get_scale() == scalers[1].get_scale()
            pair.done += 1
        assert pair.ours.steps_done == 6
        pair.check()


def spoiled(name, p, rank, micro):
    return torch.full_like(p, float("inf") if rank == 1 else 0.0)


def other_scaler(_):
    """torch's own would scale each replica by its own overflows."""
    for release in (False, True):
        pair, scaler = Pair(release=release), torch.amp.GradScaler("cpu")
        pair.give()
        scaler.scale(torch.zeros(1))
        pair.models[0][0].bias.grad = torch.zeros(16)  # or it finds no gradient at all
        step = functools.partial(scaler.step, pair.ours)
        expect(RuntimeError, "process_group: torch's GradScaler does not see", step)


# --- states ------------------------------------------------------------------------------------------------


def resume(_):
    """A run goes on bit by bit from a state, with replicas and in one process."""
    for release in (False, True):
        pair = Pair(release=release, select_every=2, groups=with_head).steps(5)
        saved = copy.deepcopy([o.state_dict() for o in pair.optimizers])
        models = copy.deepcopy([net.state_dict() for net in pair.models])
        pair.steps(5)
        again = Pair(release=release, select_every=2, groups=with_head)
        for net, values, optimizer, state in zip(again.models, models, again.optimizers, saved, strict=True):
            net.load_state_dict(values)
            optimizer.load_state_dict(state)
        again.done = 5
        again.steps(5).check()
        for p, q in zip(pair.models[0].parameters(), again.models[0].parameters(), strict=True):
            assert torch.equal(p, q)


def other_state(_):
    """A state of one replica that differs is found before anything changes."""
    pair = Pair().steps(3)
    state = pair.ours.state_dict()
    if dist.get_rank() == 1:
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"] + 1
    pair.ours.load_state_dict(state)
    pair.give()
    expect(ValueError, "state: expected the same on all 2 ranks, got checksum", pair.ours.step)
    assert pair.ours.steps_done == 3


def copies(_):
    """A deep copy is a replica too."""
    pair = Pair(release=True, select_every=2).steps(3)
    pair.models[0], pair.ours = copy.deepcopy((pair.models[0], pair.ours))
    pair.optimizers[0] = pair.ours
    pair.steps(4).check()


# --- replicas that differ ----------------------------------------------------------------------------------


def different(_):
    """Other values, settings or ways on one replica: one error on each, before anything changes."""
    odd = dist.get_rank() == 1
    for name, options in (
        ("budget", {"budget": 9}),
        ("max_grad_norm", {"max_grad_norm": 2.0}),
        ("select_from", {"release": True, "select_from": "max"}),
        ("select_from", {"release": True}),
        ("values of params", {"model": other_values}),
    ):
        pair = Pair(**options if odd else {})
        expect(ValueError, f"{name}: expected the same on all 2 ranks", lambda pair=pair: pair.steps(1))
        assert pair.ours.steps_done == pair.ours.n_active == 0


def other_values():
    net = tiny()
    with torch.no_grad():
        net[2].weight[[0, 1]] = net[2].weight[[1, 0]]
    return net


def other_layers(_):
    """Other layers, or another order, in a pass that selects: an error on each, before anything changes."""
    odd = dist.get_rank() == 1
    for names in ("ba" if odd else "ab", "a" if odd else "ab", "b" if odd else "ab", "ab" if odd else "b"):
        net = nn.ModuleDict({"a": nn.Linear(9, 9, bias=False), "b": nn.Linear(9, 7, bias=False)})
        for p in net.parameters():
            nn.init.ones_(p)
        options = {"budget": 10, "total_steps": 4, "release_gradients": True}
        optimizer = ID3AdamW(net.parameters(), **options, process_group=dist.group.WORLD)
        run = functools.partial(turn, optimizer, net, names)
        expect(RuntimeError, "process_group: expected all 2 replicas at the same point", run)
        assert optimizer.steps_done == optimizer.n_active == 0
        assert all(bool((p == 1).all()) for p in net.parameters())


def turn(optimizer, net, names):
    sum(net[name].weight.sum() for name in names).backward()
    optimizer.step()


def no_sync_last(_):
    pair = Pair(release=True)
    with pair.ours.no_sync():
        pair.give()
    expect(RuntimeError, "no_sync: expected the last backward pass", pair.ours.step)
    largest = Pair(release=True, select_from="max").ours
    expect(ValueError, "no_sync: does not apply to select_from='max'", largest.no_sync().__enter__)


def out_of_memory(_):
    """A replica that fails inside `step()` gets its error; the other one gets one soon that says at what."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    net = tiny()
    optimizer = ID3AdamW(net.parameters(), budget=20, total_steps=4, process_group=group)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    join = Shard.join
    if dist.get_rank() == 1:
        Shard.join = fail
        expect(MemoryError, "no memory", optimizer.step)
        Shard.join = join
        assert optimizer.steps_done == 0
    else:
        optimizer.step()
        expect(RuntimeError, "the comparison of steps: expected an answer of every rank", optimizer.step)


def fail(*arguments):
    raise MemoryError("no memory")


def refused(_):
    """What does not go together is refused by name."""
    world, net = dist.group.WORLD, tiny()

    def make(**options):
        return ID3AdamW(net.parameters(), **{"budget": 5, "total_steps": 2, "process_group": world} | options)

    expect(TypeError, "process_group: expected a group of torch.distributed", lambda: make(process_group=1))
    expect(ValueError, "process_group: does not apply to strategy", lambda: make(strategy="repeat"))
    expect(ValueError, "process_group: does not apply to capturable", lambda: make(capturable=True))
    expect(
        ValueError, "process_group: does not apply to the heuristic", lambda: make(heuristic=Running("sum"))
    )
    wrapped = nn.parallel.DistributedDataParallel(net)
    expect(ValueError, "model: expected one without Distributed", lambda: sparse_backward(wrapped, make()))
    group = {"params": list(net.parameters()), "process_group": world}
    expect(ValueError, r"param_groups\[0\]: process_group", lambda: ID3AdamW([group], budget=5))


def split_parameters(_):
    net = fsdp(tiny())
    optimizer = ID3AdamW(net.parameters(), budget=5, total_steps=2, process_group=dist.group.WORLD)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    expect(ValueError, "process_group: does not apply to DTensor parameters", optimizer.step)


if __name__ == "__main__":
    main(globals())
