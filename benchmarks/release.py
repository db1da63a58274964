"""`python -m benchmarks.release`: training steps with released gradients, with dense ones and with AdamW.

Peak memory in a fresh process for each method; times of backward and step together, interleaved in one.
Needs transformers. With `--device cuda`: what torch allocated, and times of the same.
"""

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig, DebertaV2Config, LlamaConfig
from transformers.models.auto import AutoModel, AutoModelForCausalLM

from benchmarks.machine import describe, results_path
from benchmarks.memory import EAGER_FREE, forget_peak, resident_bytes
from benchmarks.render import RESULTS, table
from id3_optim import D3, ID3AdamW

METHODS = ("released", "dense", "adamw")
SHARE = 0.0017
STEPS = 3000


def config_of(model: str):
    if model == "MiniLM-L6":
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
        return BertConfig(vocab_size=30522, num_attention_heads=12, **sizes)
    if model == "Llama-2-7B":
        sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}
        return LlamaConfig(vocab_size=32000, num_attention_heads=32, tie_word_embeddings=False, **sizes)
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
    attention = {"relative_attention": True, "position_buckets": 256, "pos_att_type": ["p2c", "c2p"]}
    return DebertaV2Config(
        vocab_size=128100,
        num_attention_heads=12,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        type_vocab_size=0,
        position_biased_input=False,
        **sizes,
        **attention,
    )


def _model(options: argparse.Namespace) -> torch.nn.Module:
    """Random weights, no dropout; bfloat16 with gradient checkpoints on a GPU."""
    torch.manual_seed(0)
    config, on_gpu = config_of(options.model), options.device != "cpu"
    auto = AutoModelForCausalLM if isinstance(config, LlamaConfig) else AutoModel
    with torch.device(options.device):
        model = auto.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
    if on_gpu:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()  # checkpoints need training mode; none of these models has dropout
    return model.eval()


def _optimizer(method: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    if method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    return ID3AdamW(
        model.named_parameters(),
        lr=1e-5,
        budget=SHARE,
        total_steps=STEPS,
        heuristic=D3(1.0, 1.0),
        schedule=lambda step, steps, budget: budget // 2 + step * max(1, budget // steps),
        release_gradients=method == "released",
    )


def _loss(model: torch.nn.Module, options: argparse.Namespace) -> torch.Tensor:
    ids = torch.arange(1, options.length + 1, device=options.device).repeat(options.batch, 1)
    if options.model == "Llama-2-7B":
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    return model(input_ids=ids)[0].float().square().mean()


def _timed_step(model, optimizer, options) -> float:
    """Seconds of backward and step."""
    loss = _loss(model, options)
    _wait(options.device)
    begin = time.perf_counter()
    loss.backward()
    optimizer.step()
    _wait(options.device)
    seconds = time.perf_counter() - begin
    optimizer.zero_grad()
    return seconds


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _resident(device: str, peak: bool) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    return resident_bytes(peak)


def _forget_peak(device: str) -> None:
    if device == "cpu":
        forget_peak()
        return
    gc.collect()
    torch.cuda.reset_peak_memory_stats()


def memory_in_process(options: argparse.Namespace) -> dict[str, object]:
    """Bytes of five steps above those of the process before the model was built."""
    torch.nn.Linear(64, 64)(torch.ones(4, 64)).sum().backward()  # threads and libraries
    start = _resident(options.device, peak=False)
    model = _model(options)
    optimizer = _optimizer(options.method, model)
    peaks, seconds = [], []
    for _ in range(5):
        _forget_peak(options.device)
        before = _resident(options.device, peak=False)
        loss = _loss(model, options)
        activations = _resident(options.device, peak=True) - before
        del loss
        seconds.append(_timed_step(model, optimizer, options))
        peaks.append(_resident(options.device, peak=True) - start)
    sizes = [p.nbytes for p in model.parameters()]
    entries = int(SHARE * sum(p.numel() for p in model.parameters()))
    return {
        "model": options.model,
        "method": options.method,
        "peak_bytes": max(peaks),
        "weight_bytes": sum(sizes),
        "largest_gradient_bytes": max(sizes),
        "activation_bytes": max(activations, 0),
        "bound_bytes": int(sum(sizes) + 1.15 * (max(sizes) + max(activations, 0) + 24 * entries)),
        "seconds": statistics.median(seconds[1:]),
    }


def times_in_process(options: argparse.Namespace) -> dict[str, object]:
    """Milliseconds of backward and step, dense and released in turns; their parameters must agree."""
    model = _model(options)
    pairs = {name: (copy.deepcopy(model), name) for name in ("dense", "released")}
    del model
    runs = {name: (net, _optimizer(method, net)) for name, (net, method) in pairs.items()}
    seconds = {name: [] for name in runs}
    for turn in range(options.rounds + 3):
        for name in sorted(runs, reverse=turn % 2 == 1):
            seconds[name].append(_timed_step(*runs[name], options))
    dense, released = (list(runs[name][0].parameters()) for name in ("dense", "released"))
    assert all(map(torch.equal, dense, released)), "released gradients changed the result"
    kept = {name: row[3:] for name, row in seconds.items()}
    ratios = [b / a for a, b in zip(kept["dense"], kept["released"], strict=True)]
    medians = {f"{name}_ms": round(statistics.median(row) * 1e3, 2) for name, row in kept.items()}
    return {"model": options.model, **medians, "ratio": round(statistics.median(ratios), 3)}


def _fresh(options: argparse.Namespace, *more: str) -> dict[str, object]:
    """The measurement in a process of its own; one of memory returns freed blocks to the system at once."""
    env = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    if any(option.startswith("--method") for option in more):
        env |= EAGER_FREE
    command = [
        sys.executable,
        "-m",
        "benchmarks.release",
        "--in-process",
        f"--device={options.device}",
        *more,
    ]
    command += [f"--batch={options.batch}", f"--length={options.length}", f"--rounds={options.rounds}"]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def tables(results: dict[str, object]) -> str:
    memory = []
    for row in results["memory"]:
        bound = f"{row['bound_bytes'] / 1e6:,.0f}" if row["method"] == "released" else ""
        memory.append([row["model"], row["method"], f"{row['peak_bytes'] / 1e6:,.0f}", bound])
    fields = ("model", "dense_ms", "released_ms", "ratio")
    times = [[str(row[field]) for field in fields] for row in results["times"]]
    memory_table = table(["model", "method", "peak, MB", "bound for released, MB"], memory)
    return memory_table + "\n\n" + table(["model", "dense, ms", "released, ms", "ratio"], times)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.release", description=__doc__)
    parser.add_argument("--model", action="append", help="MiniLM-L6, DeBERTa-v3-base or Llama-2-7B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path, default=RESULTS / "release")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    if options.in_process:
        options.model = options.model[0]
        print(json.dumps(memory_in_process(options) if options.method else times_in_process(options)))
        return
    results: dict[str, object] = {"machine": describe(options.threads), "memory": [], "times": []}
    for model in options.model or ["MiniLM-L6", "DeBERTa-v3-base"]:
        for method in METHODS:
            results["memory"].append(_fresh(options, f"--model={model}", f"--method={method}"))
        if options.device == "cpu":
            results["times"].append(_fresh(options, f"--model={model}"))
    path = results_path(options.output, results["machine"])
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(tables(results))


if __name__ == "__main__":
    main()
