"""`python -m benchmarks.gpu.end_to_end METHOD`: training steps of a whole model, one method a process.

Llama-3.2-3B's shapes with random weights, bfloat16, the same tokens for every method. Prints one JSON row:
tokens a second, the peak of allocated memory, and the optimizer's share of a step.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.device import DEVICE, ON_GPU, wait
from benchmarks.rivals import DenseMasking
from benchmarks.shapes import Inputs
from id3_optim import D3, ID3AdamW

SHARE, STEPS, LEARNING_RATE, RANK = 0.001, 3000, 1e-5, 32
LLAMA_3B = {
    "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
    "intermediate_size": 8192, "vocab_size": 128256, "head_dim": 128,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 500, "head_dim": 16,
}  # fmt: skip
BATCH, LENGTH = 4, 512


def _model(quick: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**(TINY if quick else LLAMA_3B), tie_word_embeddings=True, use_cache=False)
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(torch.bfloat16).train()


def _adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, lr=LEARNING_RATE, fused=True)


def _id3(model: torch.nn.Module, released: bool = False) -> ID3AdamW:
    return ID3AdamW(
        model.named_parameters(),
        lr=LEARNING_RATE,
        budget=SHARE,
        total_steps=STEPS,
        heuristic=D3(1.0, 1.0),
        release_gradients=released,
    )


def _with_adapter(config_name: str) -> Callable[[torch.nn.Module], torch.optim.Optimizer]:
    def start(model: torch.nn.Module) -> torch.optim.Optimizer:
        import peft

        linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        rank = min(RANK, model.config.hidden_size // 16)
        config = getattr(peft, config_name)(r=rank, target_modules=linear, task_type="CAUSAL_LM")
        return _adamw(peft.get_peft_model(model, config))

    return start


class _DenseMasked:
    """`DenseMasking` on a live model: its parameters and gradients are views of two flat tensors."""

    def __init__(self, model: torch.nn.Module):
        params = list(model.parameters())
        inputs = Inputs("", [p.detach() for p in params], [torch.zeros_like(p) for p in params])
        n = inputs.n_entries
        self._masking = DenseMasking(inputs, max(1, int(n * SHARE) // STEPS), 1.0)
        self._masking.start(
            torch.linspace(0, n - 1, int(n * SHARE), dtype=torch.float64, device=DEVICE).long()
        )
        flat, at = self._masking.param, 0
        for p in params:
            size = p.numel()
            p.grad = flat.grad[at : at + size].view(p.shape)
            p.data = flat.detach()[at : at + size].view(p.shape)
            at += size

    def step(self) -> None:
        self._masking.step()

    def zero_grad(self) -> None:
        self._masking.param.grad.zero_()


METHODS: dict[str, Callable] = {
    "full": _adamw,
    "lora": _with_adapter("LoraConfig"),
    "shira": _with_adapter("ShiraConfig"),
    "dense masking": _DenseMasked,
    "id3": _id3,
    "id3 released": lambda model: _id3(model, released=True),
}


def _timed_step(model, optimizer, tokens: torch.Tensor) -> tuple[float, float]:
    """Seconds of the whole step and of the optimizer in it."""
    wait()
    began = time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    wait()
    stepping = time.perf_counter()
    optimizer.step()
    wait()
    ended = time.perf_counter()
    optimizer.zero_grad()
    return ended - began, ended - stepping


def measure(method: str, quick: bool) -> dict[str, object]:
    """One row; with released gradients the optimizer's share is that of `step()`, its hooks run before it."""
    rounds, batch, length = (2, 2, 16) if quick else (10, BATCH, LENGTH)
    model = _model(quick)
    optimizer = METHODS[method](model)
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    batches = torch.randint(vocabulary, (rounds + 3, batch, length), generator=generator).to(DEVICE)
    seconds = []
    for i, tokens in enumerate(batches):
        if i == 3 and ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        seconds.append(_timed_step(model, optimizer, tokens))
    whole, stepping = (statistics.median(column) for column in zip(*seconds[3:], strict=True))
    return {
        "method": method,
        "n": sum(p.numel() for p in model.parameters()),
        "tokens_per_s": batch * length / whole,
        "step_ms": 1e3 * whole,
        "optimizer_ms": 1e3 * stepping,
        "optimizer_share": stepping / whole,
        "peak_bytes": torch.cuda.max_memory_allocated() if ON_GPU else None,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.end_to_end", description=__doc__)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--quick", action="store_true", help="a toy model")
    options = parser.parse_args()
    try:
        row = measure(options.method, options.quick)
    except torch.OutOfMemoryError as error:
        row = {"method": options.method, "skipped": f"out of memory: {str(error).splitlines()[0]}"}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
