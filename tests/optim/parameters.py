"""A parameter with a gradient and a tied model, for tests that need little more."""

import torch


def one_parameter(n=100, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype))
    param.grad = torch.randn(n, generator=generator).to(dtype)
    return param


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x).tanh())
