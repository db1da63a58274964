"""What each process runs for `test_ranks_large.py`: tensors of more entries than int32 counts, split.

One process has them as pieces, each rank as a part that is small enough. A limit of 100 entries stands for
2^31 - 1, and places have fewer bits than the kernels'.
"""

import ranks_run
import released_run
import torch
from split_models import SPLITS, Twins, expect, main, placed, tiny, whole

from id3_optim import Random, pieces
from id3_optim.delta.delta import Delta
from id3_optim.delta.file import Change, DeltaError

pieces.LARGEST, pieces.INDEX_BITS = 100, 5


def bits(split):
    ranks_run.bits(split)
    ranks_run.bits(split, heuristic=Random(3), strategy="static")
    ranks_run.bits(split, strategy="repeat", budget=60)


def many(split):
    ranks_run.large(split)


def deltas(split):
    ranks_run.deltas(split)
    unknown = Delta({"x": Change((1,), torch.float32, torch.tensor([0]), torch.ones(1))}, None, {})
    message = "model: expected some of the delta's 1 parameters, got none"
    expect(DeltaError, message, lambda: unknown.apply(SPLITS[split](tiny()), strict=False))


def released(split):
    released_run.bits(split)


def with_first_dense(named):
    return [{"params": named[:1], "dense": True, "lr": 1e-3}, {"params": named[1:]}]


def resumed(split):
    """Ranks go on from the state of one process, and one process from that of ranks."""
    begun, crossed = Twins(split), Twins(split)
    begun.steps(5)
    states = begun.ranks.state_dict(), begun.alone.state_dict()
    for model, state in ((crossed.one, begun.many), (crossed.many, begun.one)):
        for p, q in zip(model.parameters(), state.parameters(), strict=True):
            p.data.copy_(placed(whole(q.data), p))
    crossed.alone.load_state_dict(states[0])
    crossed.ranks.load_state_dict(states[1])
    crossed.done = begun.done
    for twins in (begun, crossed):
        twins.steps(5)
        twins.check()
    for p, q in zip(begun.one.parameters(), crossed.one.parameters(), strict=True):
        assert torch.equal(p, q)


def refused(split):
    message = r"0.weight: expected at most 2\^31 - 1 entries with dense=True, got 192"
    expect(ValueError, message, lambda: Twins(split, groups=with_first_dense).steps(1))
    pieces.LARGEST = 60
    try:
        message = "0.weight: expected a local part of at most 60 entries, got 96; split it over more"
        expect(ValueError, message, lambda: Twins(split).steps(1))
    finally:
        pieces.LARGEST = 100


if __name__ == "__main__":
    main(globals())
