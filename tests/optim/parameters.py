"""One parameter with a gradient, for tests that need no model."""

import torch


def one_parameter(n=100, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype))
    param.grad = torch.randn(n, generator=generator).to(dtype)
    return param
