"""What each process runs for `test_replicas.py`: replicas do what the average of all gradients does."""

from contextlib import nullcontext

import torch
from replica_pairs import Net, Pair, averaged, counted_bytes, loss_of, share_of_magnitude, small
from split_models import gradient, main, tiny, with_head
from torch import distributed as dist
from torch import nn

from id3_optim import Bias, Fisher, ID3AdamW, Magnitude, Random, sparse_backward
from id3_optim.step import candidates, products

# --- equal to the average of all gradients -----------------------------------------------------------------


def dense(_):
    """Whole gradients until the step."""
    every_kind(release=False)


def released(_):
    """Hooks that take them in the backward pass."""
    every_kind(release=True)


def every_kind(release):
    for options in (
        {},
        {"select_every": 3},
        {"strategy": "static", "select_every": 5},
        {"max_grad_norm": 0.3, "select_every": 2},
        {"groups": with_head, "max_grad_norm": 0.3, "select_every": 2},
        {"dtype": torch.float64, "select_every": 2},
        {"bias_correction": "entry", "keep_originals": False, "budget": 1.0},
    ):
        Pair(release=release, **options).steps(5).check().steps(9).check()
    with small(products, "BLOCK_ENTRIES", 7), small(candidates, "GATHERED", 3):
        Pair(release=release, select_every=2).steps(8).check()
    Pair(torch.bfloat16, release=release, select_every=1).steps(5).check(exact=False, tolerance=1e-2)


def heuristics(_):
    fisher = {name: gradient(name, p, 77).abs() for name, p in tiny().named_parameters()}
    for heuristic in (Random(3), Magnitude(), Fisher(fisher), Bias(), share_of_magnitude):
        for release in (False, True):
            Pair(release=release, heuristic=heuristic, budget=25, select_every=2).steps(6).check()


def mixed(_):
    """Parameters of two dtypes make two shards, which compete for one budget."""

    def model():
        net = tiny()
        net[2].bfloat16()
        return net

    for release in (False, True):
        for limit in (candidates.GATHERED, 3):
            with small(candidates, "GATHERED", limit):
                pair = Pair(release=release, model=model).steps(4)
                assert [shard.n_active > 0 for shard in pair.ours.active_set.shards] == [True, True]
                pair.check(exact=False, tolerance=1e-2)


def missing(_):
    """A gradient that one replica lacks counts as zeros; one that all lack stays missing."""
    for release in (False, True):
        pair = Pair(release=release, groups=with_head, select_every=3)
        for step in range(9):
            name = ("0.weight", "1.bias", "2.bias", "3.weight", "3.bias")[step % 5]
            one_alone = not release or step % 3  # a backward pass that selects needs the same layers
            pair.give(without=[(1, name)] if one_alone else [(0, name), (1, name)])
            pair.step()
        pair.check()


def nothing(_):
    """A step in which no entry can join, and another in which its number joins too."""
    for release in (False, True):
        pair = Pair(release=release)
        pair.give(scale=0.0)
        pair.step()
        assert pair.ours.n_active == 0
        pair.steps(3).check()
        assert pair.ours.n_active == 40


def accumulation(_):
    """Whole gradients: the sums of all micro-batches choose, and are sent once."""
    pair = Pair(select_every=2, max_grad_norm=0.3)
    with counted_bytes() as counted:
        for _ in range(6):
            for micro in range(3):
                counted.clear()
                pair.give(micro)
                assert not counted
            pair.step()
    pair.check(exact=False)


def released_accumulation(_):
    """Hooks: the last micro-batch chooses, as in one process; with `no_sync` only that one is sent."""
    for select_from, quiet in (("last", False), ("last", True), ("max", False)):
        pair = Pair(release=True, select_from=select_from, select_every=2, max_grad_norm=0.3)
        with counted_bytes() as counted:
            for step in range(6):
                for micro in range(3):
                    counted.clear()
                    with pair.ours.no_sync() if quiet and micro < 2 else nullcontext():
                        pair.give(micro)
                    begins = step == micro == 0  # the settings are compared
                    assert begins or bool(counted) == (step % 2 == 0 and (micro == 2 or not quiet))
                pair.step()
        pair.check(exact=False)


# --- layers without weight gradients -----------------------------------------------------------------------


def sparse(_):
    """The entries of averaged whole gradients, and values up to the order of sums."""
    for options in (
        {},
        {"select_every": 4},
        {"select_every": 4, "max_grad_norm": 0.1, "heuristic": Magnitude()},
    ):
        with small(products, "BLOCK_ENTRIES", 150):
            pair = Pair(model=Net, **{"budget": 0.1, "total_steps": 20} | options)
            sparse_backward(pair.models[0], pair.ours)
            for step in range(20):
                loss_of(pair.models[0], 2 * step + dist.get_rank()).backward()
                assert all(p.grad is None for p in pair.models[0].parameters())
                averaged(pair.models[1], (2 * step, 2 * step + 1))
                pair.step()
                pair.check(exact=False, tolerance=1e-5)
            assert pair.ours.n_active == pair.ours.budget


def sparse_accumulation(_):
    """Between selections micro-batches send nothing; in a step that selects, the last one alone."""
    pair = Pair(model=Net, budget=0.1, total_steps=12, select_every=3)
    sparse_backward(pair.models[0], pair.ours)
    pair.alone.release_gradients("last")
    with counted_bytes() as counted:
        for step in range(9):
            for micro in range(2):
                counted.clear()
                seed = 4 * step + 2 * micro
                with nullcontext() if micro else pair.ours.no_sync():
                    loss_of(pair.models[0], seed + dist.get_rank()).backward()
                assert bool(counted) == (step % 3 == 0 and (micro == 1 or step == 0))
                losses = [loss_of(pair.models[1], seed + r) for r in range(2)]
                (sum(losses) / 2).backward()
            pair.step()
            pair.check(exact=False, tolerance=1e-5)


def ddp(_):
    """DistributedDataParallel with whole gradients chooses the same entries."""
    nets = [Net(), nn.parallel.DistributedDataParallel(Net())]
    groups = dist.group.WORLD, None
    optimizers = [
        ID3AdamW(list(net.parameters()), lr=1e-2, budget=0.1, total_steps=9, select_every=3, process_group=g)
        for net, g in zip(nets, groups, strict=True)
    ]
    sparse_backward(nets[0], optimizers[0])
    for step in range(9):
        for net, optimizer in zip(nets, optimizers, strict=True):
            loss_of(net, 2 * step + dist.get_rank()).backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(*(optimizer.touched() for optimizer in optimizers), strict=True):
        assert torch.equal(a.indices, b.indices)
        torch.testing.assert_close(a.param, b.param, rtol=1e-5, atol=1e-5)


# --- bytes -------------------------------------------------------------------------------------------------


def traffic(_):
    """Between selections 4 bytes per active entry, twice by a ring, and little besides."""
    size, every = dist.get_world_size(), 4
    for release in (False, True):
        pair = Pair(
            release=release, model=lambda: nn.Linear(90, 90), budget=400, total_steps=8, select_every=every
        )
        ours, n_tensors = pair.ours, 2
        whole = 2 * 4 * 8190 * (size - 1) / size  # what DistributedDataParallel sends in each step
        with counted_bytes() as counted:
            for step in range(9):
                counted.clear()
                n_before = ours.n_active
                pair.give()
                pair.step()
                values = 2 * 4 * n_before * (size - 1) / size
                comparison = 2 * (2 * n_tensors + 16) * (size - 1) / size
                if step not in (0, every):
                    assert sum(counted) == values + comparison, (counted, values, comparison)
                    assert values <= 8 * ours.n_active and whole * ours.n_active == values * 8190
                elif step:
                    of_all = (16 * 200 + 8 + 16 * n_tensors) * (
                        size - 1
                    )  # the best, and where each replica is
                    assert whole / 2 < sum(counted) <= whole / 2 + 8 + values + comparison + of_all
        assert ours.n_active == 400


if __name__ == "__main__":
    main(globals())
