"""What each process runs for `test_ranks_released.py`: hooks that take gradients that FSDP2 has reduced."""

import torch
from split_models import SPLITS, expect, main, tiny, whole, with_head
from torch import nn

import id3_optim
from id3_optim import ID3AdamW

OPTIONS = {"lr": 1e-2, "budget": 90, "total_steps": 5}


class Pair:
    """The same split model twice: whole gradients until the step, and gradients that hooks take."""

    def __init__(self, split, groups=None, **options):
        self.models = [SPLITS[split](tiny()) for _ in range(2)]
        self.optimizers = []
        for model, release in zip(self.models, (False, True), strict=True):
            named = list(model.named_parameters())
            named = named if groups is None else groups(named)
            self.optimizers.append(ID3AdamW(named, **OPTIONS | options, release_gradients=release))
        self.step = 0

    def backward(self, seed, scale=1.0, spoil=False):
        """spoil: one row of the first layer's gradient, which one rank holds, is infinite."""
        rank = torch.distributed.get_rank()
        x = torch.randn(3, 12, generator=torch.Generator().manual_seed(100 * seed + rank))
        for model in self.models:
            hook = model[0].register_forward_hook(_infinite_row) if spoil else None
            (model(x).square().sum() * scale).backward()
            if hook is not None:
                hook.remove()
        assert all(p.grad is None for p in self.optimizers[1].param_groups[0]["params"])

    def take_step(self):
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def check(self):
        one, other = self.optimizers
        assert one.steps_done == other.steps_done and one.n_active == other.n_active > 0
        for p, q in zip(*(model.parameters() for model in self.models), strict=True):
            assert torch.equal(whole(p), whole(q)), one.steps_done


def _infinite_row(layer, args, output):
    output.register_hook(lambda g: g.index_fill(1, torch.tensor([0]), float("inf")))


def bits(split):
    for options in (
        {},
        {"max_grad_norm": 0.1},
        {"groups": with_head, "max_grad_norm": 0.1},
        {"select_every": 2},
    ):
        pair = Pair(split, **options)
        for step in range(7):
            pair.backward(step)
            pair.take_step()
            pair.check()


def accumulation(split):
    """Micro-batches whose sums are made before they are sent, and some that send each time."""
    for sync in (False, True):
        pair = Pair(split, max_grad_norm=0.1)
        for step in range(4):
            for last in (False, True):
                for model in pair.models:
                    model.set_requires_gradient_sync(last or sync)
                pair.backward(2 * step + last)
            if (
                sync
            ):  # the scores of the last micro-batch choose, so that the entries differ from those of sums
                assert pair.optimizers[1].n_active == pair.optimizers[0].n_active
            pair.take_step()
            if not sync:
                pair.check()


def overflow(split):
    """An infinity on one rank alone stops the step of all, and each scaler halves its scale."""
    pair = Pair(
        split, budget=1.0, strategy="static"
    )  # a scaler sees the active entries of released gradients
    scalers = [id3_optim.GradScaler("cpu", init_scale=8.0) for _ in range(2)]
    for step in range(4):
        pair.backward(step, 8.0, spoil=step == 2)
        for scaler, optimizer in zip(scalers, pair.optimizers, strict=True):
            scaler.scale(torch.zeros(1))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scalers[0].get_scale() == scalers[1].get_scale() == (4.0 if step >= 2 else 8.0)
    assert pair.optimizers[0].steps_done == 3
    pair.check()


def plain(split):
    """Gradients of plain parameters are those of one process alone: refused by name."""
    model = nn.Linear(4, 4)
    make = lambda: ID3AdamW(model.named_parameters(), **OPTIONS, release_gradients=True)  # noqa: E731
    expect(ValueError, "release_gradients: expected one process, or parameters of FSDP2", make)


if __name__ == "__main__":
    main(globals())
