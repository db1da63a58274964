"""A replica of data parallelism without a wrapper, beside one process that gets the means of gradients."""

from contextlib import contextmanager

import torch
from split_models import gradient, tiny
from torch import distributed as dist
from torch import nn

from id3_optim import ID3AdamW, compatibility

compatibility.world_size = lambda: 1  # `Pair.alone` is a process by itself
OPTIONS = {"lr": 1e-2, "budget": 120, "total_steps": 12}


class Pair:
    """`ours`, one of the replicas, and `alone`, a process that gets the mean of their gradients."""

    def __init__(self, dtype=None, groups=None, release=False, select_from="last", model=tiny, **options):
        """dtype: None for the model's own."""
        self.models, self.optimizers, self.done = [model(), model()], [], 0
        for net in self.models if dtype else ():
            net.to(dtype)
        if release:
            options |= {"release_gradients": True, "select_from": select_from}
        for net, group in zip(self.models, (dist.group.WORLD, None), strict=True):
            named = list(net.named_parameters())
            named = named if groups is None else groups(named)
            self.optimizers.append(ID3AdamW(named, **OPTIONS | options, process_group=group))
        self.ours, self.alone = self.optimizers

    def own(self, name, p, rank, micro=0):
        return gradient(name, p, 100 * self.done + 10 * micro + rank)

    def give(self, micro=0, scale=1.0, without=()):
        """One backward pass of both. without: (rank, name) of gradients that are missing."""
        rank, size = dist.get_rank(), dist.get_world_size()
        ours, alone = (dict(net.named_parameters()) for net in self.models)
        given, mean = {}, {}
        for name, p in ours.items():
            parts = {r: scale * self.own(name, p, r, micro) for r in range(size) if (r, name) not in without}
            if rank in parts:
                given[name] = parts[rank]
            if parts:
                mean[name] = sum(g / size for g in parts.values())
        for params, grads in ((ours, given), (alone, mean)):
            sum((params[name] * g).sum() for name, g in grads.items()).backward()

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1

    def steps(self, n):
        for _ in range(n):
            self.give()
            self.step()
        return self

    def check(self, exact=True, tolerance=1e-6):
        same_everywhere(self.ours, self.models[0])
        assert self.ours.steps_done == self.alone.steps_done
        for a, b in zip(self.ours.touched(), self.alone.touched(), strict=True):
            assert torch.equal(a.indices, b.indices), self.done
        dense = {p for g in self.alone.param_groups if g["dense"] for p in g["params"]}
        for (name, p), q in zip(self.models[0].named_parameters(), self.models[1].parameters(), strict=True):
            if exact and q not in dense:
                assert torch.equal(p, q), f"{name} differs after {self.done} steps"
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        return self


def same_everywhere(optimizer, model):
    """All replicas have the same bits of parameters and state."""
    tensors = [p.detach() for p in model.parameters()]
    for state in optimizer.state_dict()["state"].values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    for tensor in tensors:
        rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, tensor.contiguous())
        assert all(torch.equal(row, rows[0]) for row in rows)


def share_of_magnitude(param, grad):
    return grad.abs() / (param.abs() + 1)


@contextmanager
def small(module, name, value):
    """Blocks and lists so small that a tiny model fills many of them."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


@contextmanager
def counted_bytes():
    """A list that gets the bytes that this rank sends in each collective, by rings."""
    found, names = [], ("all_gather_single", "all_reduce", "reduce_scatter_single", "reduce")
    before = {name: getattr(dist, name) for name in names}

    def counting(name, factor, of):
        def call(*arguments, group, **options):
            n = dist.get_world_size(group)
            found.append(arguments[of].nbytes * factor(n))
            return before[name](*arguments, group=group, **options)

        return call

    part = lambda n: (n - 1) / n  # noqa: E731
    counts = (lambda n: n - 1, 1), (lambda n: 2 * part(n), 0), (part, 1), (lambda n: 1, 0)
    for name, (factor, of) in zip(names, counts, strict=True):
        setattr(dist, name, counting(name, factor, of))
    try:
        yield found
    finally:
        for name in names:
            setattr(dist, name, before[name])


# --- a model of layers that sparse_backward changes --------------------------------------------------------


class Net(nn.Module):
    """An embedding, a layer that is called twice, a tied weight, norms and biases."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.norm = nn.Embedding(60, 20), nn.Linear(20, 33), nn.LayerNorm(33)
        self.down, self.again, self.head = nn.Linear(33, 20), nn.Linear(20, 20), nn.Linear(20, 60, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.down(self.norm(self.up(self.embed(ids))))
        return self.head(self.again(self.again(x).tanh()))


def loss_of(net, seed):
    ids = torch.randint(0, 40, (4, 7), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(net(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def averaged(net, seeds):
    """Gives the plain net the mean of the gradients of batches."""
    for seed in seeds:
        (loss_of(net, seed) / len(seeds)).backward()
