"""What each process runs for `test_ranks_use.py`: what users do with split parameters beside training."""

import copy
import functools
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from split_models import expect, fsdp, hsdp, main, mesh_of, placed, tiny, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from id3_optim import (
    DeltaBank,
    DeltaSeries,
    Fisher,
    ID3AdamW,
    Random,
    ReferenceModel,
    WeightReceiver,
    fisher_scores,
    original_weights,
    save_delta,
)
from id3_optim.distributed import checkpoint
from id3_optim.integrations.run import numbers_to_log

FOLDER = Path(sys.argv[1])


def trained(model, steps=3, **options):
    """(the model, its optimizer) after steps on the same batch on all ranks."""
    given = {"lr": 0.1, "budget": 60, "total_steps": 6} | options
    optimizer = ID3AdamW(model.named_parameters(), **given)
    go_on(model, optimizer, steps)
    return model, optimizer


def go_on(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch()).square().mean().backward()
        optimizer.step()


def batch():
    return torch.linspace(-1, 1, 48).view(4, 12)


def rooted(model):
    """The first layer belongs to the root, whose whole parameters stay after a forward pass."""
    for layer in list(model)[1:]:
        fully_shard(layer, mesh=mesh_of("dp"))
    return fully_shard(model, mesh=mesh_of("dp"))


# --- original weights ------------------------------------------------------------------------------------


def reference(split):
    """The reference is the first model, and the policy is what it was: its outputs, and its gradients."""
    plain, alone = trained(tiny())
    for build in (rooted, fsdp) if split == "fsdp" else (hsdp,):
        model, optimizer = trained(build(tiny()))
        early = model(batch())
        torch.testing.assert_close(ReferenceModel(model, optimizer)(batch()), tiny()(batch()))
        torch.testing.assert_close(model(batch()), plain(batch()))
        expected = plain(batch()).square().mean()
        optimizer.zero_grad()
        alone.zero_grad()
        expected.backward()
        early.square().mean().backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(whole(q.grad), p.grad)
        with original_weights(model, optimizer):
            model(batch())
        go_on(model, optimizer, 2)
        go_on(plain, alone, 2)
        torch.testing.assert_close(model(batch()), plain(batch()))
        plain, alone = trained(tiny())


# --- scores and numbers ----------------------------------------------------------------------------------


def fisher(split):
    """Scores of the whole model choose over split parameters; split scores do too; split models have none."""
    model = fsdp(tiny())
    loss = lambda m, x: m(x).square().mean()  # noqa: E731
    expect(ValueError, "0.weight: expected a whole param", lambda: fisher_scores(model, [batch()], loss))
    scores = fisher_scores(tiny(), [batch()], loss)
    _, alone = trained(tiny(), heuristic=Fisher(scores))
    for given in (scores, {n: placed(scores[n], p) for n, p in model.named_parameters()}):
        _, optimizer = trained(fsdp(tiny()), heuristic=Fisher(given))
        pairs = zip(alone.touched(), optimizer.touched(), strict=True)
        assert all(torch.equal(one.indices, other.indices) for one, other in pairs)


def logged(split):
    """Of scores that ranks have parts of there is no threshold; of those that all have there is."""
    model = fully_shard(nn.Linear(200, 200), mesh=mesh_of("dp"))
    optimizer = ID3AdamW(model.named_parameters(), budget=10_000, total_steps=1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.n_active == 10_000 and "threshold" not in numbers_to_log(optimizer)
    assert "threshold" in numbers_to_log(trained(fsdp(tiny()))[1])


def later(split):
    """A split group after whole parameters have trained: their entries stay active, and go on."""
    first, model = nn.Parameter(torch.linspace(1, 2, 100)), tiny()
    twin = nn.Parameter(first.detach().clone())
    runs = []
    for p, layers in ((first, fsdp(tiny())), (twin, model)):
        optimizer = ID3AdamW([("first", p)], lr=0.1, budget=50, total_steps=10)
        for step in range(8):
            if step == 4:
                optimizer.add_param_group({"params": list(layers.named_parameters())})
                assert optimizer.n_active == 20
            for q in (p, *(layers.parameters() if step >= 4 else ())):
                q.grad = torch.ones_like(q)
            optimizer.step()
        runs.append((optimizer.n_active, [t.indices.tolist() for t in optimizer.touched()], p))
    assert runs[0][:2] == runs[1][:2] and torch.equal(first, twin)


# --- files -----------------------------------------------------------------------------------------------


def half(build):
    """The first layer is frozen when the run begins; the budget is a share."""
    model = build(tiny())
    model[0].requires_grad_(False)
    return model, ID3AdamW(model.named_parameters(), lr=0.1, budget=0.3, total_steps=8)


def thawed(build):
    """A run whose budget grows when its first layer thaws."""
    model, optimizer = half(build)
    go_on(model, optimizer, 2)
    model[0].requires_grad_(True)
    optimizer.grow_budget()
    go_on(model, optimizer, 2)
    return model, optimizer


def grown(split):
    """A budget that has grown resumes, in a run built as at the beginning."""
    model, optimizer = thawed(fsdp)
    checkpoint.save(FOLDER / "grown", model, optimizer)
    other, resumed = half(fsdp)
    checkpoint.load(FOLDER / "grown", other, resumed)
    assert (resumed.budget, resumed.n_active) == (optimizer.budget, optimizer.n_active)
    other[0].requires_grad_(True)
    for one in ((model, optimizer), (other, resumed)):
        go_on(*one, 3)
    assert resumed.n_active > 0 and same(model, other)


def frozen(split):
    """torch's own functions resume a run whose first layer is frozen: they load no state of frozen ones."""
    model, optimizer = half(fsdp)
    go_on(model, optimizer, 3)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer), "model": get_model_state_dict(model)}
    dcp.save(state, checkpoint_id=FOLDER / "frozen")
    other, resumed = half(fsdp)
    state = {"optimizer": get_optimizer_state_dict(other, resumed), "model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=FOLDER / "frozen")
    set_optimizer_state_dict(other, resumed, state["optimizer"])
    assert resumed.steps_done == 3 and resumed.n_active == optimizer.n_active > 0


def same(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(whole(p), whole(q)) for p, q in pairs)


def refusals(split):
    """What cannot be saved or followed says so on every rank: one that fails alone would be waited for."""
    model, optimizer = trained(fsdp(tiny()), strategy="repeat")
    for way in (checkpoint.save, checkpoint.load):
        folder = FOLDER / "repeat"
        if way is checkpoint.load:
            folder.mkdir(exist_ok=True)
            (folder / ".metadata").touch()
        expect(ValueError, "strategy: expected one whose", lambda w=way, f=folder: w(f, model, optimizer))
    model, optimizer = trained(fsdp(tiny()))
    (FOLDER / "file").touch()
    inside = FOLDER / "file" / "step-1"
    expect(OSError, r"\[Errno", lambda: checkpoint.save(inside, model, optimizer))
    unfitting(model, optimizer)
    expect(ValueError, "0.weight: expected a whole parameter for a bank", lambda: DeltaBank(model))
    expect(ValueError, "0.weight: expected a whole parameter for a rec", lambda: WeightReceiver(model))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(float("nan"))
    expect(ValueError, ".*expected finite", lambda: save_delta(FOLDER / "nan", model, optimizer))
    copy.deepcopy(optimizer._unmasking.active.ranks)


def unfitting(model, optimizer):
    """What does not fit is refused before the weights change; a full disk is an OSError on every rank."""
    folder = FOLDER / "whole"
    checkpoint.save(folder, model, optimizer)
    other = fsdp(tiny())
    weights, named = [whole(p).clone() for p in other.parameters()], list(other.named_parameters())
    groups = [{"params": named[:1], "dense": True}, {"params": named[1:]}]
    narrow = fsdp(nn.Sequential(nn.Linear(12, 15)))
    cases = {
        "total_steps: expected 7": (other, named, {"total_steps": 7}),
        "0.weight: expected a parameter to select from": (other, groups, {}),
        r"param_groups\[0\]: expected 2 parameters": (narrow, list(narrow.named_parameters()), {}),
    }
    for message, (target, params, options) in cases.items():
        own = ID3AdamW(params, **{"lr": 0.1, "budget": 60, "total_steps": 6} | options)
        expect(ValueError, message, lambda target=target, own=own: checkpoint.load(folder, target, own))
    assert all(torch.equal(w, whole(p)) for w, p in zip(weights, other.parameters(), strict=True))
    write, dcp.FileSystemWriter.write_data = dcp.FileSystemWriter.write_data, no_room
    try:
        again = functools.partial(checkpoint.save, FOLDER / "again", model, optimizer)
        expect(OSError, ".*expected every rank to write, got OSError", again)
    finally:
        dcp.FileSystemWriter.write_data = write


def no_room(*_):
    raise OSError(28, "No space left on device")


def differ(split):
    """Replicas of HSDP that would choose other entries are refused at the first step, on every rank."""
    replica = torch.distributed.get_rank() // 2
    options = {"budget": 20 + replica}, {"heuristic": Random(replica)}
    for option, name in zip(options, ("budget", "heuristic"), strict=True):
        message = f"{name}: expected the same on all 4 ranks"
        expect(ValueError, message, lambda option=option: trained(hsdp(tiny()), 1, **option))
    own = {"params": [p for _, p in hsdp(tiny()).named_parameters()], "note": object(), "place": replica}
    ID3AdamW([own], budget=9, total_steps=2).step()  # a user's own keys may differ


def stages(split):
    """The stages of a pipeline, none of whose ranks may be the first of all, write their own deltas."""
    rank = torch.distributed.get_rank()
    stage, mesh = rank // 2, mesh_of("pp", "dp")
    pairs = [torch.distributed.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    runs = {"split": (fully_shard(nn.Linear(8, 8), mesh=mesh["dp"]), {}),
            "whole": (nn.Linear(8, 8), {"process_group": pairs[stage]})}  # fmt: skip
    for name, (model, options) in runs.items():
        torch.manual_seed(0)
        optimizer = ID3AdamW(model.named_parameters(), budget=20, total_steps=2, **options)
        DeltaSeries(FOLDER / f"{name}-{stage}", model, optimizer, [20])
        for _ in range(2):
            model(torch.ones(2, 8)).square().mean().backward()
            optimizer.step()
    save_delta(FOLDER / f"stage-{stage}", runs["split"][0], optimizer_of(runs["split"][0]))
    torch.distributed.barrier()
    files = [FOLDER / f"{name}-{i}" / "delta-20.safetensors" for name in runs for i in (0, 1)]
    assert all(path.is_file() for path in (*files, FOLDER / "stage-0", FOLDER / "stage-1"))


def optimizer_of(model):
    return ID3AdamW(model.named_parameters(), budget=20, total_steps=2)


if __name__ == "__main__":
    main(globals())
