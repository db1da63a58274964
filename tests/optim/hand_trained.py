"""A model with parameters of many kinds, and a stand-in for an optimizer that trained some of its entries."""

import torch
from torch import Tensor, nn

from id3_optim.optimizer import Touched

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Net(nn.Module):
    """0-d to 4-d parameters, channels_last and transposed strides, a tied weight and a head."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.scale = nn.Parameter(torch.randn(()))
        self.embed = nn.Embedding(20, 6)
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.across = nn.Parameter(torch.randn(7, 4).t())
        self.output = nn.Linear(6, 20)
        self.output.weight = self.embed.weight
        self.head = nn.Linear(6, 3)
        self.to(dtype)


class HandTrained:
    """What `save_delta` needs of an optimizer, for a model whose entries were changed by hand."""

    def __init__(self, touched: list[Touched], dense: list[Tensor], step: int = 7):
        self.param_groups = [{"params": [t.param for t in touched], "dense": False}]
        self.param_groups += [{"params": dense, "dense": True}]
        self._touched, self._step = touched, step

    def touched(self):
        return iter(self._touched)

    def settings(self):
        return {"method": "id3", "budget": 12, "step": self._step, "heuristic": {"name": "d3", "exp": 2.0}}


@torch.no_grad()
def train_by_hand(
    model: nn.Module, keep_originals: bool = True, share: float = 0.3, seed: int = 1
) -> HandTrained:
    """Changes a random share of the entries of every parameter, and all of those named head.*."""
    generator = torch.Generator().manual_seed(seed)
    touched, dense = [], []
    for name, param in model.named_parameters():
        if name.startswith("head."):
            param.add_(1.0)
            dense.append(param)
            continue
        count = max(1, int(share * param.numel()))
        indices = torch.randperm(param.numel(), generator=generator)[:count].sort().values
        flat = param.reshape(-1)
        originals = flat[indices]
        flat = flat.clone()
        flat[indices] = torch.randn(count, generator=generator).to(flat.dtype)
        param.copy_(flat.view(param.shape))
        touched.append(Touched(param, indices.int(), originals if keep_originals else None))
    return HandTrained(touched, dense)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's bit patterns, in logical order: equal exactly when the model is bit-identical."""
    named = model.named_parameters()
    return {
        n: p.detach().clone(memory_format=torch.contiguous_format).view(BITS[p.element_size()])
        for n, p in named
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
