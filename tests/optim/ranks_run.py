"""What each process runs for `test_ranks.py`: split parameters beside one process with whole ones."""

import copy
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from split_models import SPLITS, Twins, expect, gradient, main, mesh_of, tiny, whole, with_head
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from id3_optim import (
    Bias,
    Fisher,
    ID3AdamW,
    Magnitude,
    Prune,
    Random,
    diff,
    load_delta,
    save_delta,
    sparse_backward,
    weight_patches,
)
from id3_optim.distributed import traffic as computed
from id3_optim.integrations.run import numbers_to_log
from id3_optim.relative import Relative
from id3_optim.running import Running
from id3_optim.step import selection


def bits(split, dtype=torch.float32, **options):
    """Entries, parameters and state are those of one process."""
    twins = Twins(split, dtype, **options)
    twins.steps(5)
    twins.check()
    twins.steps(9)
    twins.check()


def heuristics(split):
    """Scores by position, by name, by a tensor that every rank holds whole, and by a function of DTensors."""
    fisher = {name: gradient(name, p, 77).abs() for name, p in tiny().named_parameters()}
    for heuristic in (Random(3), Magnitude(), Fisher(fisher), Bias(), magnitude_share):
        bits(split, heuristic=heuristic, budget=25)


def magnitude_share(param, grad):
    return grad.abs() / (param.abs() + 1)


def strategies(split):
    bits(split, strategy="static")
    bits(split, strategy="repeat", budget=60)
    bits(split, select_every=3, bias_correction="entry")
    bits(split, torch.bfloat16, entry_warmup=4)
    bits(split, torch.bfloat16)
    bits(split, torch.float64)
    bits(split, keep_originals=False, budget=1.0)


def large(split):
    """More entries at once than ranks gather: histograms find the same."""
    few, selection.GATHERED = selection.GATHERED, 3
    try:
        bits(split)
        bits(split, strategy="static", dtype=torch.float64)
        bits(split, heuristic=Magnitude())
        bits(split, heuristic=Bias(), budget=20)  # all scores are 1
    finally:
        selection.GATHERED = few


def clipping(split):
    """The norm over all ranks has the bits of one process, of dense groups too."""
    bits(split, max_grad_norm=0.3)
    bits(split, torch.bfloat16, max_grad_norm=0.3)
    bits(split, groups=with_head, max_grad_norm=0.3)


def not_finite(split):
    """One rank's NaN or infinity: no rank selects it, and the norm is NaN on all."""
    for value in (float("nan"), float("inf")):
        twins = Twins(split)
        for _ in range(4):
            twins.give()
            twins.spoil(value)
            twins.step()
        twins.check()


def missing(split):
    """Tensors without gradients, and those that require none."""
    twins = Twins(split)
    for step in range(6):
        twins.give()
        for model in (twins.one, twins.many):
            model[step % 4].weight.grad = None
        twins.step()
    twins.check()


def loss_scale(split):
    """An overflow on one rank stops the step on all; a scale divides out."""
    twins = Twins(split, max_grad_norm=0.3)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3) for _ in range(2)]
    for step in range(8):
        twins.give(scale=scalers[0].get_scale())
        if step == 3:
            twins.spoil(float("inf"))
        for scaler, optimizer in zip(scalers, (twins.alone, twins.ranks), strict=True):
            scaler.scale(torch.zeros(1))  # begins the scaler
            scaler.step(optimizer)
            scaler.update()
        twins.done += 1
    assert twins.alone.steps_done == twins.ranks.steps_done == 7
    assert scalers[0].get_scale() == scalers[1].get_scale()
    twins.check()


def accumulation(split):
    """Two micro-batches, of which the first sends nothing: as one process with the same sums."""
    twins = Twins(split)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for step in range(4):
        x = torch.randn(2 * world, 12, generator=torch.Generator().manual_seed(step))
        for last, batch in enumerate(x.view(2, world, 12)):
            twins.many.set_requires_gradient_sync(bool(last))
            twins.many(batch[rank : rank + 1]).square().sum().backward()
        for p, q in zip(twins.one.parameters(), twins.many.parameters(), strict=True):
            p.grad = whole(q.grad)
        twins.step()
        twins.alone.zero_grad()
        twins.ranks.zero_grad()
    twins.check()


def deltas(split):
    """Deltas and patches of split models are those of one process; they apply, revert and differ alike."""
    twins = Twins(split, torch.bfloat16, groups=with_head)
    twins.steps(5)
    folder, rank = Path(sys.argv[1]), torch.distributed.get_rank()
    if split == "fsdp":  # after a forward pass alone, whole parameters of the root stay in the model
        twins.many(torch.zeros(2, 12, dtype=torch.bfloat16))
    one, many = folder / f"{split}-one-{rank}.safetensors", folder / f"{split}-many.safetensors"
    save_delta(one, twins.one, twins.alone, originals=True)
    save_delta(many, twins.many, twins.ranks, originals=True)
    torch.distributed.barrier()
    expected, delta = load_delta(one), load_delta(many)
    same_changes(expected, delta)
    for a, b in zip(
        weight_patches(twins.one, twins.alone, 2), weight_patches(twins.many, twins.ranks, 2), strict=True
    ):
        assert a.name == b.name and torch.equal(a.indices, b.indices) and torch.equal(a.values, b.values)
    assert numbers_to_log(twins.alone) == numbers_to_log(twins.ranks)
    base, plain = SPLITS[split](tiny(torch.bfloat16)), tiny(torch.bfloat16)
    undo = delta.apply(base)
    for p, q in zip(twins.many.parameters(), base.parameters(), strict=True):
        assert torch.equal(p, q)
    same_changes(diff(SPLITS[split](tiny(torch.bfloat16)), base), diff(plain, merged(plain, delta)))
    undo.revert()
    for p, q in zip(plain.parameters(), base.parameters(), strict=True):
        assert torch.equal(p, whole(q))


def merged(plain, delta):
    model = copy.deepcopy(plain)
    delta.apply(model)
    return model


def same_changes(one, many):
    assert one.fingerprint == many.fingerprint and one.changes.keys() == many.changes.keys()
    for name, a in one.changes.items():
        b = many.changes[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        for x, y in zip(a[2:], b[2:], strict=True):
            assert (x is None and y is None) or torch.equal(x, y), name


def traffic(split):
    """The counted bytes of a choice are the computed ones, and steps that choose nothing send nothing."""
    at_most = selection.GATHERED
    with counted_bytes() as counted:
        for few in (at_most, 3):
            selection.GATHERED = computed.GATHERED = few
            try:
                count_steps(split, counted, bar=few == at_most)
            finally:
                selection.GATHERED = computed.GATHERED = at_most


def count_steps(split, counted, bar, budget=4000, steps=4):
    n, model = torch.distributed.get_world_size(), SPLITS[split](nn.Sequential(nn.Linear(90, 90)))
    optimizer = ID3AdamW(model.named_parameters(), budget=budget, total_steps=steps)
    for step in range(steps + 2):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        counted.clear()
        optimizer.step()
        expected = computed.Run(8190, budget, steps, n, tensors=2).choice_bytes if step < steps else 0
        agreement = step == 0  # the first step compares the settings, in one message
        assert sum(counted[agreement:]) == expected, (step, counted, expected)
        assert not bar or expected <= 16 * (budget // steps) * n
    assert optimizer.n_active == budget
    held = optimizer.memory_report()["moments"] // 8
    own = sum(shard.n_active for shard in optimizer._unmasking.active.shards)
    assert held <= 1.05 * max(own, budget / n), (held, own)


@contextmanager
def counted_bytes():
    """A list that gets the bytes that this rank sends in each collective, by rings."""
    found, dist = [], torch.distributed
    gather, reduce = dist.all_gather_single, dist.all_reduce

    def gathered(out, row, group):
        found.append(row.nbytes * (dist.get_world_size(group) - 1))
        return gather(out, row, group=group)

    def reduced(tensor, group):
        n = dist.get_world_size(group)
        found.append(2 * tensor.nbytes * (n - 1) // n)
        return reduce(tensor, group=group)

    dist.all_gather_single, dist.all_reduce = gathered, reduced
    try:
        yield found
    finally:
        dist.all_gather_single, dist.all_reduce = gather, reduce


def refused(split):
    """What is not covered is refused by name, before anything changes."""
    strided = [_StridedShard(0, split_factor=4), Shard(0)]
    partial = DTensor.from_local(torch.ones(4), mesh_of("dp"), [Partial()])
    scattered = DTensor.from_local(torch.ones(4), mesh_of("dp", "tp"), strided)
    overlapping = [placed_over(mesh_of("dp")), placed_over(mesh_of("dp", "tp")["dp"])]
    model = SPLITS[split](tiny())
    optimizer = ID3AdamW(model.named_parameters(), budget=9, total_steps=2)
    expect(ValueError, "0: expected Shard or Replicate", lambda: step([partial]))
    expect(ValueError, "0: expected parts that are blocks", lambda: step([scattered]))
    expect(ValueError, "1: expected the dimensions of one mesh", lambda: step(overlapping))
    expect(
        ValueError, "capturable: does not apply to DTensor", lambda: step([overlapping[0]], capturable=True)
    )
    for option in ({"tensor_cap": 0.5}, {"prune": Prune(2)}):
        message = f"{next(iter(option))}: does not apply to DTensor"
        expect(ValueError, message, lambda option=option: step([overlapping[0]], **option))
    for heuristic in (Relative(), Running("sum")):
        message = f"heuristic: does not apply to DTensor parameters: {type(heuristic).__name__} needs"
        expect(ValueError, message, lambda h=heuristic: step([overlapping[0]], heuristic=h))
    expect(
        ValueError,
        "0.weight: expected a whole parameter with sparse",
        lambda: sparse_backward(model, optimizer),
    )


def placed_over(mesh):
    return distribute_tensor(torch.ones(8), mesh, [Shard(0)])


def step(tensors, **options):
    params = [nn.Parameter(t) for t in tensors]
    named = [(str(i), p) for i, p in enumerate(params)]
    optimizer = ID3AdamW(named, budget=2, total_steps=2, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


if __name__ == "__main__":
    main(globals())
