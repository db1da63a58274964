"""`python -m benchmarks quantized`: peak memory of training beside 4-bit weights, sparse and by LoRA (r = 8).

A Llama shape whose linear layers are bitsandbytes' (NF4), in a fresh process for each method, by AdamW. Needs
transformers, peft and bitsandbytes, which is no extra of this package.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.machine import describe, results_path
from benchmarks.memory import EAGER_FREE, forget_peak, resident_bytes
from benchmarks.render import RESULTS, Bar, bar_rows, bars_table
from id3_optim.quantized import QuantizedSparse

SIZES = {
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 512},
    "85M": {"hidden_size": 768, "num_hidden_layers": 10, "intermediate_size": 2048, "vocab_size": 8192},
}
METHODS = ("sparse", "qlora")
SHARE, STEPS, TOKENS = 0.0017, 6, 256


def base(size: str) -> torch.nn.Module:
    """Random weights; each linear layer of a block in 4 bits, everything frozen."""
    import bitsandbytes
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES[size], num_attention_heads=8))
    for block in model.model.layers:
        for module in list(block.modules()):
            for name, linear in list(module.named_children()):
                if type(linear) is torch.nn.Linear:
                    sizes = linear.in_features, linear.out_features
                    layer = bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32)
                    layer.load_state_dict(linear.state_dict())
                    setattr(module, name, layer.to("cpu"))
    return model.requires_grad_(False)


def sparse(model: torch.nn.Module) -> tuple[torch.nn.Module, list, Callable]:
    beside = QuantizedSparse(model, SHARE, STEPS)
    return model, [beside.values], beside.join


def qlora(model: torch.nn.Module) -> tuple[torch.nn.Module, list, Callable]:
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=8, target_modules=names))
    return model, [p for p in model.parameters() if p.requires_grad], lambda: None


def in_process(options: argparse.Namespace) -> dict[str, object]:
    """Peak bytes of training above those before the model was made, those of the model, and the losses."""
    torch.set_num_threads(options.threads)
    torch.nn.Linear(64, 64)(torch.ones(4, 64)).sum().backward()  # threads and libraries
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

    start = resident_bytes()
    model, params, before_step = {"sparse": sparse, "qlora": qlora}[options.method](base(options.size))
    optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0)
    ids = torch.arange(TOKENS)[None] % SIZES[options.size]["vocab_size"]
    forget_peak()
    loaded, losses = resident_bytes() - start, []
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    peak = resident_bytes(peak=True) - start
    trained = sum(p.numel() for p in params)
    return {"peak_bytes": peak, "loaded_bytes": loaded, "trained": trained, "losses": losses}


def fresh(options: argparse.Namespace, method: str) -> dict[str, object]:
    command = [sys.executable, "-m", "benchmarks.quantized", f"--in-process={method}"]
    command += [f"--size={options.size}", f"--threads={options.threads}"]
    env = os.environ | EAGER_FREE | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quantized", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="85M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "quantized")
    parser.add_argument("--in-process", dest="method", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.method:
        print(json.dumps(in_process(options)))
        return
    results = {"machine": describe(options.threads), "size": options.size}
    results |= {method: fresh(options, method) for method in METHODS}
    for method in METHODS:
        losses = results[method]["losses"]
        assert losses[-1] < losses[0], f"{method}: the loss does not fall"
    ratio = results["sparse"]["peak_bytes"] / results["qlora"]["peak_bytes"]
    results["bars"] = bar_rows(
        [Bar("peak memory beside 4-bit weights: sparse 0.17 % / LoRA r = 8", 1, ratio)]
    )
    path = results_path(options.output, results["machine"])
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(bars_table(results["bars"]))


if __name__ == "__main__":
    main()
