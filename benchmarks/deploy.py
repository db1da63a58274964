"""`python -m benchmarks deploy`: weight updates, original weights, switches of deltas beside LoRA's merge.

Needs transformers and peft. Everything is checked to the bit in the rounds that are timed.
"""

import argparse
import copy
import json
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import nn
from transformers.models.auto import AutoModel

from benchmarks.deltas import delta_of, same_bits
from benchmarks.machine import describe, results_path
from benchmarks.release import config_of
from benchmarks.render import RESULTS, Bar, bar_rows, bars_table
from id3_optim import DeltaBank, ID3AdamW, WeightReceiver, WeightStream, diff, original_weights

SHARE = 0.0017395  # 320,000 entries of DeBERTa-v3-base
LR = 1e-4


def model_of(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return AutoModel.from_config(config_of(name), dtype=dtype).eval()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert same_bits(p.detach(), q.detach()), f"{name}: the weights differ"


class Run:
    """A bfloat16 run on random gradients, whose whole budget is active after the first step."""

    def __init__(self, name: str):
        self.model = model_of(name, torch.bfloat16)
        self.first = copy.deepcopy(self.model)
        named = self.model.named_parameters()
        self.optimizer = ID3AdamW(named, lr=LR, budget=SHARE, total_steps=1)
        self._generator = torch.Generator().manual_seed(0)

    def step(self) -> None:
        for p in self.model.parameters():
            p.grad = torch.randn(p.shape, generator=self._generator).bfloat16()
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(run) -> float:
    begin = perf_counter()
    run()
    return perf_counter() - begin


def stream_ms(run: Run, rounds: int) -> dict[str, float]:
    """Median milliseconds to make an update and to apply it, each after one step."""
    server, times, entries = copy.deepcopy(run.model), {"make": [], "apply": []}, []
    receiver, stream = WeightReceiver(server), WeightStream(run.model, run.optimizer)
    for _ in range(rounds + 1):
        run.step()
        made = []
        times["make"].append(seconds(lambda made=made: made.append(stream.next())))
        times["apply"].append(seconds(lambda made=made: receiver.apply_patch(made[0])))
        stream.acknowledge(made[0])
        entries.append(made[0].entries)
        assert_same(server, run.model)
    return {name: median(row[1:]) * 1e3 for name, row in times.items()} | {"entries": median(entries[1:])}


def originals_ms(run: Run, rounds: int) -> float:
    """Median milliseconds to enter and leave `original_weights`."""
    trained, times = copy.deepcopy(run.model), []
    for _ in range(rounds + 1):
        block = original_weights(run.model, run.optimizer)
        entered = seconds(block.__enter__)
        assert_same(run.model, run.first)
        times.append(entered + seconds(lambda block=block: block.__exit__(None, None, None)))
        assert_same(run.model, trained)
    return median(times[1:]) * 1e3


def stream_bytes(name: str, steps: int) -> dict[str, int]:
    """Bytes of a run's updates, of as many full sends, and of snapshot diffs as (int32, value) pairs."""
    run = Run(name)
    stream, total = WeightStream(run.model, run.optimizer), {"updates": 0, "full": 0, "diffs": 0}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(steps):
            before = copy.deepcopy(run.model)
            run.step()
            update = stream.next()
            update.save(Path(folder) / "update")
            stream.acknowledge(update)
            changes = diff(before, run.model, originals=False).changes
            assert update.entries == sum(c.values.numel() for c in changes.values()), "another set of entries"
            total["updates"] += (Path(folder) / "update").stat().st_size
            total["full"] += sum(p.nbytes for p in run.model.parameters())
            total["diffs"] += sum(c.indices.nbytes + c.values.nbytes for c in changes.values())
    return total


class Lora:
    """Two adapters of rank 8 on all linear layers; a switch takes one out of the weights and merges one."""

    def __init__(self, name: str):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        self.model = get_peft_model(model_of(name, torch.float32), config, adapter_name="a").eval()
        self.model.add_adapter("b", config)
        self.entries = sum(p.numel() for n, p in self.model.named_parameters() if ".lora_" in n) // 2
        self._next = "b"
        self.merge("a")

    def merge(self, adapter: str) -> None:
        self.model.set_adapter(adapter)
        self.model.merge_adapter([adapter])

    def switch(self) -> None:
        self.model.unmerge_adapter()
        self.merge(self._next)
        self._next = "a" if self._next == "b" else "b"


class Switches:
    """Two deltas of a base in a bank; `switch` puts the other one on and checks each bit."""

    def __init__(self, base: nn.Module, entries: int):
        self.model, self.tuned = copy.deepcopy(base), []
        self.bank, self._next = DeltaBank(self.model), 0
        for seed in (0, 1):
            delta = delta_of(base, seed, entries)
            self.bank.add(str(seed), delta)
            self.tuned.append(copy.deepcopy(base))
            delta.apply(self.tuned[seed])

    def switch(self) -> float:
        """Seconds."""
        taken = seconds(lambda: self.bank.use(str(self._next)))
        assert_same(self.model, self.tuned[self._next])
        self._next = 1 - self._next
        return taken


def switches_ms(name: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of a switch: of deltas, of deltas with as many entries as LoRA's, of LoRA's.

    lora: two merged adapters. lora_unmerged: `set_adapter` alone, after which each forward pass multiplies by
    the adapter's matrices too.
    """
    base, lora = model_of(name, torch.float32), Lora(name)
    entries = round(SHARE * sum(p.numel() for p in base.parameters()))
    banks = {"bank": Switches(base, entries), "bank_lora_count": Switches(base, lora.entries)}
    times: dict[str, list[float]] = {"lora": [], **{kind: [] for kind in banks}}
    for _ in range(rounds + 1):
        times["lora"].append(seconds(lora.switch))
        for kind, bank in banks.items():
            times[kind].append(bank.switch())
    for bank in banks.values():
        bank.bank.use(None)
        assert_same(bank.model, base)
    lora.model.unmerge_adapter()
    names = ["ab"[i % 2] for i in range(rounds + 1)]
    times["lora_unmerged"] = [seconds(lambda name=name: lora.model.set_adapter(name)) for name in names]
    counts = {"entries": entries, "lora_entries": lora.entries}
    return {kind: median(row[1:]) * 1e3 for kind, row in times.items()} | counts


def bars_of(results: dict) -> list[Bar]:
    stream, sent, switches = results["stream"], results["bytes"], results["switches"]
    bank, lora, same_count = switches["bank"], switches["lora"], switches["bank_lora_count"]
    return [
        Bar("an update of 320,000 active bf16 entries of 184M: made, ms", 15, stream["make"]),
        Bar("the same: applied, ms", 15, stream["apply"]),
        Bar("bytes of updates / full sends", 1 / 300, sent["updates"] / sent["full"]),
        Bar("bytes of updates / snapshot diffs as int32 and value", 1, sent["updates"] / sent["diffs"]),
        Bar("original_weights, 320,000 of 184M: entered and left, ms", 30, results["originals"]),
        Bar("a switch of deltas of 0.17 % / of merged adapters", 1 / 3, bank / lora),
        Bar("the same, deltas with as many entries as adapters", 1 / 3, same_count / lora),
    ]


def measure(options: argparse.Namespace) -> dict:
    run = Run(options.model)
    results = {"machine": describe(options.threads), "model": options.model}
    results["stream"] = stream_ms(run, options.rounds)
    results["originals"] = originals_ms(run, options.rounds)
    results["bytes"] = stream_bytes(options.bytes_model, options.steps)
    results["switches"] = switches_ms(options.model, options.rounds)
    return results


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks deploy", description=__doc__)
    parser.add_argument("--model", default="DeBERTa-v3-base", help="MiniLM-L6 or DeBERTa-v3-base")
    parser.add_argument("--bytes-model", default="MiniLM-L6", help="of the run whose bytes are counted")
    parser.add_argument("--steps", type=int, default=200, help="of that run")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "deploy")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = measure(options)
    results["bars"] = bar_rows(bars_of(results))
    path = results_path(options.output, results["machine"])
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(bars_table(results["bars"]))
