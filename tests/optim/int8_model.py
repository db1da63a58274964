"""Linear layers in 8 bits, as simple as they can be: they need no other package."""

import torch
from torch import nn


class Int8Linear(nn.Module):
    """A linear layer in 8 bits: a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, dequantize(self), self.bias)


def dequantize(module):
    return module.codes.float() * module.scale if isinstance(module, Int8Linear) else None


def quantize(model, leave=()):
    """Puts Int8Linear in place of every linear layer but those named. Returns the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name not in leave:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Int8Linear(module))
    return model
