"""The weights of quantised linear layers as plain tensors, for the packages that are known."""

from __future__ import annotations

from torch import Tensor, nn


def dequantized(module: nn.Module) -> Tensor | None:
    """The weight of a quantised linear layer as a plain tensor [outputs, inputs]; None for another module.

    Knows the layers of bitsandbytes in 4 and in 8 bits, and torchao's tensors in `torch.nn.Linear`.
    """
    weight = getattr(module, "weight", None)
    if weight is None:
        return None
    kind, package = type(module).__name__, type(module).__module__.partition(".")[0]
    if package == "bitsandbytes" and kind == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if package == "bitsandbytes" and kind == "Linear8bitLt":
        codes, scales = (
            held if held is not None else getattr(weight, name, None)
            for name, held in (("CB", module.state.CB), ("SCB", module.state.SCB))
        )
        if codes is None or scales is None:
            raise ValueError(
                f"model: expected 8-bit weights, got {weight.dtype}; move the model to its device"
            )
        return codes.float() * (scales.float()[:, None] / 127)
    if type(weight.data).__module__.startswith("torchao") and isinstance(module, nn.Linear):
        return weight.data.dequantize()
    return None
