"""What is measured: a star around one base case, one property changed at a time."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks.floor import bare_read
from benchmarks.gate import check_selection, check_update
from benchmarks.measure import Timed
from benchmarks.ours import Ours
from benchmarks.rivals import DenseAdamW, DenseMasking, Toolkit
from benchmarks.shapes import KNOWN, MODELS, Inputs

# A budget is spent in this many steps, so k = B / 3000.
SPREAD = 3000
_READS = {"read_both", "read_grad"}
ALL_RIVALS = ("dense", "dense_plain", "toolkit", "adamw")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One measurement. `budget`: a share of N; `active`: a share of the budget; not `selects`: k = 0."""

    model: str
    dtype: str = "float32"
    budget: float = 0.0017
    exp: float = 1.0
    active: float = 0.5
    selects: bool = True
    rivals: tuple[str, ...] = ("dense", "adamw")

    def __str__(self) -> str:
        k = "" if self.selects else "-k0"
        return f"{self.model}-{self.dtype}-{self.budget:.2%}-exp{self.exp:g}-active{self.active:g}B{k}"

    def counts(self) -> tuple[int, int, int, int]:
        """N, B, |Λ| and k."""
        n_entries = KNOWN[self.model][2]
        budget = int(n_entries * self.budget)
        return n_entries, budget, int(budget * self.active), self.selects * max(1, round(budget / SPREAD))


def step_cases(quick: bool) -> list[Case]:
    """Whole steps; `quick`: the base case and bf16, on the small model."""
    if quick:
        return [Case("MiniLM-L6", rivals=ALL_RIVALS), Case("MiniLM-L6", dtype="bfloat16")]
    cases = []
    for model in MODELS:
        plain = Case(model)
        cases += [Case(model, rivals=ALL_RIVALS), replace(plain, active=1.0), replace(plain, selects=False)]
        cases += [replace(plain, exp=exp) for exp in (0.0, 2.0, 0.7)]
        cases += [replace(plain, budget=share) for share in (0.0005, 0.01, 0.05)]
        cases += [replace(plain, budget=0.05, active=1.0)]
        cases += [replace(plain, dtype="bfloat16", exp=exp) for exp in (1.0, 0.0, 2.0)]
    return cases


def part_cases(quick: bool) -> list[Case]:
    """Selection alone and update alone."""
    if quick:
        return [Case("MiniLM-L6")]
    cases = []
    for model in MODELS:
        cases += [Case(model, rivals=ALL_RIVALS)]
        cases += [Case(model, budget=share) for share in (0.0005, 0.01, 0.05)]
    return cases


def reads(ours: Ours, inputs: Inputs) -> dict[str, Timed]:
    """Bare reads, each with and without ("_plain") prefetching; `fastest_reads` leaves the faster one."""
    weights = [param.detach() for param in ours.params]
    read = {"read_both": weights + inputs.grads, "read_grad": inputs.grads}
    ways = {"": True, "_plain": False}
    return {
        name + way: Timed(partial(bare_read, tensors, prefetch))
        for name, tensors in read.items()
        for way, prefetch in ways.items()
    }


def fastest_reads(methods: dict[str, dict]) -> dict[str, dict]:
    """Medians by method, with the faster way of each read in place of both."""
    found = dict(methods)
    for name in _READS & methods.keys():
        found[name] = min(found[name], found.pop(f"{name}_plain"), key=lambda timed: timed["median_ms"])
    return found


def start_methods(case: Case, inputs: Inputs) -> dict[str, object]:
    """Every method of the case after two steps and past the gate; |Λ| is the case's plus k."""
    _, _, start, k = case.counts()
    ours = Ours(inputs, start, k, case.exp)
    ours.step()
    first = ours.active()
    check_selection(inputs, first.new_empty(0), first, case.exp)
    ours.step()
    joined = ours.active()
    check_selection(inputs, first, joined[~torch.isin(joined, first)], case.exp)
    check_update(inputs, first, ours)
    methods: dict[str, object] = {"id3": ours}
    if "dense" in case.rivals:
        methods["dense"] = DenseMasking(inputs, k, case.exp)
    if "toolkit" in case.rivals:
        methods["toolkit"] = Toolkit(inputs, k, case.exp)
    for rival in list(methods.values())[1:]:
        _start_rival(rival, case, inputs, first, joined)
    if "adamw" in case.rivals:
        methods["adamw"] = DenseAdamW(inputs)
    return methods


def _start_rival(rival, case: Case, inputs: Inputs, first: torch.Tensor, joined: torch.Tensor) -> None:
    rival.start(first)
    rival.prepare()
    if "dense_plain" in case.rivals and isinstance(rival, DenseMasking):
        winners = torch.cat([first, rival.select_plain()]).sort().values
        assert torch.equal(winners, joined), "plain dense masking: selection differs from the gate's"
    rival.step()
    # A rival computes the power of exp 0.7 in float32, which orders near ties differently; in bf16 its
    # moments are bf16 too.
    exact = case.exp in (0.0, 1.0, 2.0)
    same = torch.isin(rival.active(), joined).sum()
    assert same == len(joined) if exact else same > 0.999 * len(joined), (
        "a rival: selection differs from the gate's"
    )
    if exact and inputs.dtype == torch.float32:
        check_update(inputs, first, rival)


def slow_rounds(case: Case) -> int:
    """Rounds for the methods that take seconds at 184M."""
    return 3 if case.model == "DeBERTa-v3-base" else 7


def timed_steps(case: Case, inputs: Inputs) -> dict[str, Timed]:
    methods = start_methods(case, inputs)
    timed = {name: Timed(method.step, method.prepare) for name, method in methods.items()}
    slow = slow_rounds(case)
    if "toolkit" in methods:
        timed["toolkit"].max_rounds = slow
    if "dense_plain" in case.rivals:
        dense = methods["dense"]
        timed["dense_plain"] = Timed(dense.step_plain, dense.prepare, slow)
    if inputs.dtype != torch.float32:
        timed["id3_float32"] = Timed(_same_in_float32(case, inputs).step)
    return timed | reads(methods["id3"], inputs)


def _same_in_float32(case: Case, inputs: Inputs) -> Ours:
    wide = Inputs(inputs.model, [w.float() for w in inputs.weights], [g.float() for g in inputs.grads])
    _, _, start, k = case.counts()
    ours = Ours(wide, start, k, case.exp)
    ours.step()
    return ours
