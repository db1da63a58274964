"""The measurements, each a generator of rows: `measure`, what was measured, and p20, median and p80."""

from collections.abc import Iterator

import torch

from benchmarks.gpu.cases import (
    EXP,
    Case,
    Ours,
    Selection,
    make_inputs,
    select_bytes,
    update_bytes,
)
from benchmarks.gpu.device import DEVICE, ON_GPU, give_back, peak_bytes, timed, timed_on_host, wait
from benchmarks.growth import POINTS, timed_growth
from benchmarks.ours import EPS
from benchmarks.parts import Update, wanted
from benchmarks.rivals import DenseAdamW, DenseMasking, Toolkit
from benchmarks.shapes import Inputs
from id3_kernels import Entries, available_backends, reference
from id3_kernels.table import kernels_for
from id3_optim import D3, ID3AdamW

_COPIED_BYTES = (4 << 30) if ON_GPU else (1 << 22)


def _skipped(backend: str, about: dict) -> dict | None:
    reason = available_backends()[backend]
    return about | {"measure": "step", "skipped": reason} if reason else None


def bandwidth(rounds: int) -> Iterator[dict]:
    """Copy (read and written), read alone, and the gather of sorted random entries in 32-byte sectors."""
    source = torch.zeros(_COPIED_BYTES, dtype=torch.int8, device=DEVICE).fill_(1)
    target = torch.empty_like(source)
    yield {"measure": "copy", "bytes": 2 * _COPIED_BYTES} | timed(lambda: target.copy_(source), rounds)
    words = source.view(torch.float32)
    yield {"measure": "read", "bytes": _COPIED_BYTES} | timed(words.sum, rounds)
    halves = source.view(torch.bfloat16)
    count = len(halves) // 512
    generator = torch.Generator(DEVICE).manual_seed(0)
    at = torch.randint(len(halves), (count,), generator=generator, device=DEVICE)
    for order in ("sorted", "unsorted"):
        places = at.sort().values if order == "sorted" else at
        row = {"measure": f"gather, {order}", "sectors": count, "bytes": 32 * count}
        yield row | timed(lambda places=places: halves.index_select(0, places), rounds)


def _check(kernels, *problem) -> None:
    """The gate before every timing: the selection is the reference's, over the whole model."""
    got, expected = (Selection(table, *problem).run() for table in (kernels, reference))
    assert all(map(torch.equal, got, expected)), "selection differs from the reference"


def id3(backend: str, case: Case, rounds: int) -> Iterator[dict]:
    """A whole step, eager and in a graph, its halves, and what the host spends on it."""
    about = case.about() | {"method": backend}
    if skipped := _skipped(backend, about):
        yield skipped
        return
    inputs, kernels, k = make_inputs(case.model), kernels_for(DEVICE, backend), case.counts()[2]
    ours = Ours(case, backend)
    ours.step()
    peak = peak_bytes(ours.step)
    entries = ours.entries()
    n_active = len(entries.indices)
    moved = update_bytes(case.dtype, n_active)
    _check(kernels, inputs, entries, k)
    about |= {"n_active": n_active}
    state = ours.optimizer.memory_report()["total"]
    whole = about | {"bytes": select_bytes(case) + moved, "peak_bytes": peak, "state_bytes": state}
    selection = Selection(kernels, inputs, entries, k)
    yield whole | {"measure": "select", "bytes": select_bytes(case)} | timed(selection.run, rounds)
    yield whole | {"measure": "step"} | timed(ours.step, rounds)
    yield about | {"measure": "host"} | timed_on_host(ours.step, rounds)
    update = Update(inputs.weights, inputs.grads, entries, kernels)
    sectors = {"sectors": 3 * n_active, "bytes": moved}
    yield about | {"measure": "update"} | sectors | timed(update.run, rounds)
    del ours, update
    give_back()
    if ON_GPU:
        replay = captured_step(Ours(case, backend, capturable=True))
        yield whole | {"measure": "graph"} | timed(replay, rounds)


def selections(backend: str, case: Case, rounds: int) -> Iterator[dict]:
    """The selection alone, of k on both sides of each border of its forms, and with 97 % zero rows."""
    about = case.about() | {"method": backend}
    if skipped := _skipped(backend, about):
        yield skipped
        return
    inputs, kernels, (n, _, k) = make_inputs(case.model), kernels_for(DEVICE, backend), case.counts()
    nothing = Entries.empty(len(inputs.weights), DEVICE)
    for name, border in (("N/16384", n // 16384), ("N/1024", n // 1024)):
        for side, wanted_ in (("below", border), ("above", border + border // 16 + 1)):
            problem = inputs, nothing, wanted_
            _check(kernels, *problem)
            row = about | {"measure": f"select, k {side} {name}", "k": wanted_}
            yield row | timed(Selection(kernels, *problem).run, rounds)
    embedding = inputs.grads[0]
    kept = embedding.clone()
    embedding.masked_fill_((torch.arange(len(embedding), device=DEVICE) % 32 != 0)[:, None], 0)
    _check(kernels, inputs, nothing, k)
    row = about | {"measure": "select, 97 % zero rows", "bytes": select_bytes(case)}
    yield row | timed(Selection(kernels, inputs, nothing, k).run, rounds)
    embedding.copy_(kept)


def captured_step(ours: Ours):
    """A function that replays one step of `ours`, captured after three eager ones on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            ours.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()

    def replay(keep_alive: Ours = ours) -> None:
        graph.replay()

    return replay


def adamw(case: Case, rounds: int) -> Iterator[dict]:
    """torch's fused AdamW on every entry: full fine-tuning."""
    method = DenseAdamW(make_inputs(case.model))
    method.step()
    about = case.about() | {"method": "AdamW(fused=True)", "measure": "step"}
    about |= {"bytes": 7 * case.counts()[0] * case.dtype.itemsize, "state_bytes": method.state_bytes()}
    about |= {"peak_bytes": peak_bytes(method.step)}
    yield about | timed(method.step, rounds)


def _rival(name: str, make, case: Case, rounds: int) -> Iterator[dict]:
    n, budget, k = case.counts()
    about = case.about() | {"method": name, "measure": "step"}
    inputs = make_inputs(case.model)
    active = torch.linspace(0, n - 1, int(case.active * budget), dtype=torch.float64, device=DEVICE)
    active = active.long().unique()
    winners = _reference_winners(inputs, active, k)
    method = make(inputs, k, EXP)
    method.start(active)
    method.prepare()
    method.step()
    found = torch.isin(winners, method.active()).float().mean()
    # A compiler's division is off in the last bit, and in bfloat16 many scores are equal.
    assert found > 0.98, f"{name}: expected the reference's winners, got {found:.1%} of them"
    method.prepare()
    about |= {"peak_bytes": peak_bytes(method.step), "state_bytes": method.state_bytes()}
    yield about | timed(method.step, rounds, method.prepare)


def _reference_winners(inputs: Inputs, active: torch.Tensor, k: int) -> torch.Tensor:
    """Positions of the best k outside `active`, all tensors laid end to end, as `active` has them."""
    starts = torch.tensor(inputs.starts, device=DEVICE)
    offsets = torch.searchsorted(active, starts)
    owner = torch.searchsorted(starts, active, right=True) - 1
    entries = Entries(offsets, (active - starts[owner]).int())
    arguments = inputs.weights, inputs.grads, *entries, *wanted(k, DEVICE), EPS, EXP
    offsets, indices, _ = reference.select_topk(*arguments)
    return starts[:-1].repeat_interleave(offsets.diff()) + indices[: offsets[-1]]


def dense(case: Case, rounds: int) -> Iterator[dict]:
    """Dense masking done well: a fused score, `torch.topk` over block maxima, a mask, fused AdamW."""
    yield from _rival("dense masking", DenseMasking, case, rounds)


def toolkit(case: Case, rounds: int) -> Iterator[dict]:
    """The method's own toolkit, where it is installed."""
    try:
        import selective_optimizers  # noqa: F401
    except ImportError as error:
        yield case.about() | {"method": "toolkit", "measure": "step", "skipped": str(error)}
        return
    yield from _rival("toolkit", Toolkit, case, rounds)


def growth(backend: str, case: Case, rounds: int) -> Iterator[dict]:
    """The update summed over a run that spends the budget step by step, over that of a static set."""
    inputs, kernels = make_inputs(case.model), kernels_for(DEVICE, backend)
    timers, _ = timed_growth(inputs, case.counts()[2], kernels, case.share)
    medians = {
        name: timed(timer.run, rounds, timer.prepare or (lambda: None))["median_ms"] / timer.per_run
        for name, timer in timers.items()
    }
    for parts in (("update",), ("update", "join")):
        summed = sum(medians[f"{part}_{point}"] for part in parts for point in range(POINTS)) / POINTS
        row = case.about() | {"method": backend, "measure": f"growth, {' and '.join(parts)}"}
        yield row | {"median_ms": summed, "static_ms": medians["static"], "ratio": summed / medians["static"]}


def profile(backend: str, case: Case, rounds: int) -> Iterator[dict]:
    """The kernels of one step: name, how often, microseconds."""
    ours = Ours(case, backend)
    for _ in range(3):
        ours.step()
    wait()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if ON_GPU else [])]) as recorded:
        ours.step()
        wait()
    field = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    found = [e for e in recorded.key_averages() if getattr(e, field) > 0]
    if ON_GPU:
        found = [e for e in found if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [{"name": e.key[:120], "count": e.count, "us": round(getattr(e, field), 2)} for e in found]
    kernels.sort(key=lambda kernel: -kernel["us"])
    yield case.about() | {"method": backend, "measure": "profile", "kernels": kernels[:40]}


def host(backend: str, case: Case, rounds: int) -> Iterator[dict]:
    """What an eager step and a hook of released gradients cost the host, with many tensors."""
    about = case.about() | {"method": backend}
    if skipped := _skipped(backend, about):
        yield skipped
        return
    ours = Ours(case, backend)
    yield about | {"measure": "host"} | timed_on_host(ours.step, rounds)
    plain, hooked = (_backward_ms(case, backend, released, rounds) for released in (False, True))
    hook_us = 1e3 * (hooked["median_ms"] - plain["median_ms"]) / about["tensors"]
    row = about | {"measure": "hook", "plain_ms": plain["median_ms"], "hook_us": round(hook_us, 3)}
    yield row | hooked


def _backward_ms(case: Case, backend: str, released: bool, rounds: int) -> dict:
    """A backward pass through every tensor, as the host sees it, with the hooks or without."""
    params = [torch.nn.Parameter(weight.clone()) for weight in make_inputs(case.model).weights]
    _, budget, k = case.counts()
    optimizer = ID3AdamW(
        params, lr=1e-6, budget=budget, total_steps=max(budget // k, 1), heuristic=D3(EPS, EXP),
        backend=backend, release_gradients=released,
    )  # fmt: skip
    losses: list[torch.Tensor] = []

    def forward() -> None:
        losses[:] = [sum((p * p).sum() for p in params)]

    def clear() -> None:
        if released:
            optimizer.step()
        optimizer.zero_grad()
        forward()

    forward()
    return timed_on_host(lambda: losses[0].backward(), rounds, clear)
