"""Tensors on a GPU that is not there: shape, dtype and device, but no values.

Asking for a value raises, and so does mixing devices.
"""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


def item(t, key):
    if isinstance(key, tuple):
        dimension = 0
        for part in key:
            if part is Ellipsis:
                dimension = t.dim() - (len(key) - 1 - key.index(Ellipsis))
                continue
            t = item_of(t, dimension, part)
            dimension += isinstance(part, slice)
        return t
    if isinstance(key, int | slice):
        return item_of(t, 0, key)
    assert key.dtype != torch.bool, "a mask asks how many of it are True"
    return torch.ops.aten.index(t, [key])


def item_of(t, dimension, key):
    if isinstance(key, int):
        return torch.select(t, dimension, key)
    begin, end, _ = key.indices(t.shape[dimension])
    return t.narrow(dimension, begin, max(end - begin, 0))


def set_item(t, key, value):
    part = item(t, key)
    part.copy_(value) if isinstance(value, torch.Tensor) else part.fill_(value)


def copy_(t, value, non_blocking=False):
    torch.broadcast_to(value, t.shape)
    assert non_blocking or t.device == value.device
    return t


def invert(t):
    return torch.bitwise_not(t)


# Python's own want a guard for the device, which a torch for CPUs does not have.
STAND_INS = {"__getitem__": item, "__setitem__": set_item, "copy_": copy_, "__invert__": invert}


class NoWaiting(TorchDispatchMode):
    """Within the block whoever copies between devices in a way that waits raises too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to = kwargs.get("device")
        if function is torch.ops.aten._to_copy.default and to is not None and to != args[0].device:
            waits = to.type == "cpu" or not kwargs.get("non_blocking")
            assert not waits, f"a copy from {args[0].device} to {to} that waits"
        return function(*args, **kwargs)


@contextlib.contextmanager
def fake_gpu(monkeypatch):
    for name, stand_in in STAND_INS.items():
        monkeypatch.setattr(FakeTensor, name, stand_in, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: "the only one")
    with FakeTensorMode(), torch.no_grad():
        yield
