"""Ways to train a transformer: all entries, adapters, or the best 0.17 % of all entries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from transformers import BertConfig, GPT2Config, LlamaConfig
from transformers.models.auto import AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from id3_optim import D3, ID3AdamW, recipe, sparse_backward

SHARE, MORE = 0.0017, 0.01
STEPS = 3000
LENGTH = 128  # tokens of a text
LEARNING_RATE = 1e-5


def _bert():
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
    return BertConfig(vocab_size=30522, num_attention_heads=12, **sizes)


def _gpt2():
    return GPT2Config(n_embd=768, n_layer=6, n_head=12, vocab_size=50257)


def _llama():
    sizes = {"hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 2816, "vocab_size": 8192}
    return LlamaConfig(num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False, **sizes)


MODELS = {"MiniLM": _bert, "GPT-2": _gpt2, "Llama": _llama}


def random_model(name: str, dtype: torch.dtype) -> nn.Module:
    """Random weights, no dropout."""
    torch.manual_seed(0)
    auto = AutoModel if name == "MiniLM" else AutoModelForCausalLM
    return auto.from_config(MODELS[name](), dtype=dtype).eval()


def batch(model: nn.Module, tokens: int, seed: int) -> torch.Tensor:
    """Token ids [tokens / LENGTH, LENGTH]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (tokens // LENGTH, LENGTH), generator=generator)


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The next token's loss, and of an encoder a mean square."""
    if model.config.model_type == "bert":
        return model(input_ids=ids).last_hidden_state.float().square().mean()
    return model(input_ids=ids, labels=ids, use_cache=False).loss


class Method:
    """A model and how one step trains it. optimizer: None where only the passes are run."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None):
        self.model, self.optimizer = model, optimizer

    def step(self, ids: torch.Tensor) -> float:
        loss = loss_of(self.model, ids)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.item()


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)


def _full(model: nn.Module) -> Method:
    return Method(model, _adamw(model))


def _passes(model: nn.Module) -> Method:
    """Forward, and gradients of activations alone: what every method costs that trains inside the network."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda *call: call[-1].requires_grad_())
    return Method(model, None)


def _linears(model: nn.Module) -> list[str]:
    """Names of all linear layers but the one of the output."""
    head = model.get_output_embeddings()
    layers = (nn.Linear, Conv1D)
    return [name for name, m in model.named_modules() if isinstance(m, layers) and m is not head]


def _lora(model: nn.Module, rank: int) -> Method:
    from peft import LoraConfig, get_peft_model

    transposed = model.config.model_type == "gpt2"
    config = LoraConfig(r=rank, target_modules=_linears(model), fan_in_fan_out=transposed)
    return _full(get_peft_model(model, config))


def _shira(model: nn.Module) -> Method:
    """As many entries per layer as LoRA with r = 8; PEFT has it for nn.Linear alone."""
    from peft import ShiraConfig, get_peft_model

    return _full(get_peft_model(model, ShiraConfig(r=8, target_modules=_linears(model))))


def _id3(model: nn.Module, share: float, select_every: int, gradients: str) -> Method:
    """Half the budget is active from the first step on."""
    optimizer = ID3AdamW(
        model.named_parameters(),
        lr=LEARNING_RATE,
        budget=share,
        total_steps=STEPS,
        heuristic=D3(1.0, 1.0),
        schedule=lambda step, steps, budget: budget // 2 + step * max(1, budget // steps),
        select_every=select_every,
        release_gradients=gradients == "released",
    )
    method = Method(model, optimizer)
    if gradients == "sparse":
        method.handle = sparse_backward(model, optimizer)
    return method


def _recipe(model: nn.Module) -> Method:
    """A random mask outside the embeddings, all of it active: no step selects but the first."""
    optimizer = recipe(model, total_steps=STEPS, budget=SHARE, lr=LEARNING_RATE)
    method = Method(model, optimizer)
    method.handle = sparse_backward(model, optimizer)
    return method


# Between two selections a sparse step costs another time than in one: with K = 2 the two kinds alternate.
METHODS: dict[str, Callable[[nn.Module], Method]] = {
    "full": _full,
    "passes": _passes,
    "lora8": partial(_lora, rank=8),
    "lora32": partial(_lora, rank=32),
    "shira": _shira,
    "dense": partial(_id3, share=SHARE, select_every=1, gradients="dense"),
    "released": partial(_id3, share=SHARE, select_every=1, gradients="released"),
    "sparse": partial(_id3, share=SHARE, select_every=2, gradients="sparse"),
    "sparse_more": partial(_id3, share=MORE, select_every=2, gradients="sparse"),
    "recipe": _recipe,
}


def methods_of(name: str) -> list[str]:
    """The methods that the model can be trained by."""
    return [method for method in METHODS if (name, method) != ("GPT-2", "shira")]


def built(model: nn.Module, method: str) -> Method:
    return METHODS[method](copy.deepcopy(model))
