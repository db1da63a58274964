"""torch's own description of AdamW (`optim_db`), turned into inputs for ID3AdamW with every entry active."""

import copy

import torch
from torch.testing._internal.common_optimizers import optim_db

from id3_optim import ID3AdamW

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
EVERY_ENTRY = {"budget": 1.0, "strategy": "static", "total_steps": 1}
NAMES = ["weight", "bias"]  # of `matrix_and_vector`
REFUSED = {"amsgrad", "foreach", "fused", "differentiable"}  # does not apply: see `validation`


def inputs(dtype=torch.float32, tensor_lr=False):
    """torch's keyword arguments for AdamW, by what they are about; those that ID3AdamW refuses left out."""
    found = {i.desc: i.kwargs for i in INFO.optim_inputs_func(device="cpu", dtype=dtype)}
    found = {about: kwargs for about, kwargs in found.items() if not REFUSED & kwargs.keys()}
    if tensor_lr:
        found["tensor lr"] = {"lr": torch.tensor(1e-3)}
        found["tensor betas"] = {"betas": (torch.tensor(0.9), torch.tensor([[0.99]]))}
    return found


def id3(params, **kwargs):
    """ID3AdamW that stands where torch.optim.AdamW stood."""
    return ID3AdamW(params, **EVERY_ENTRY | copy.deepcopy(kwargs))


def adamw(params, **kwargs):
    return torch.optim.AdamW(params, foreach=False, **copy.deepcopy(kwargs))


def quadratic(weight, bias, x):
    """torch's loss for its optimizer tests."""
    return (weight.mv(x) + bias).pow(2).sum()


def matrix_and_vector(contiguous=True, dtype=torch.float32):
    torch.manual_seed(3)
    weight, bias = torch.randn(10, 5, 2, dtype=dtype), torch.randn(10, 2, dtype=dtype)
    weight, bias = weight[..., 0], bias[..., 0]
    if contiguous:
        weight, bias = weight.contiguous(), bias.contiguous()
    return torch.nn.Parameter(weight), torch.nn.Parameter(bias)


def check_parity(ours, theirs, lr=1e-3, rtol=1e-6, atol=2e-5):
    """|difference| <= rtol * |value| + atol * lr, the contract's bound in float32."""
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=rtol, atol=atol * float(lr))


def descend(optimizer, params, x, steps=20, schedulers=()):
    """The losses of a run, as torch's tests run one."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = quadratic(*params, x)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        for scheduler in schedulers:
            late = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(loss.item()) if late else scheduler.step()
    return losses


def begun(about="default", named=False, steps=3):
    """Parameters and an optimizer after a few steps."""
    params = matrix_and_vector()
    optimizer = id3(
        list(zip(NAMES, params, strict=True)) if named else params, **inputs(tensor_lr=True)[about]
    )
    descend(optimizer, params, torch.ones(5), steps)
    return params, optimizer


def twin_of(params, named=False, about="default"):
    """Copies of the parameters, and a fresh optimizer of them."""
    params = [torch.nn.Parameter(p.detach().clone()) for p in params]
    return params, id3(
        list(zip(NAMES, params, strict=True)) if named else params, **inputs(tensor_lr=True)[about]
    )


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
