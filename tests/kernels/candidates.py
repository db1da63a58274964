"""What collect_ holds of the tensors so far, in any order, and what must be among it."""

from __future__ import annotations

from dataclasses import dataclass

import cases
import numpy as np
import oracle
import torch
from torch import Tensor

from id3_kernels import Entries


@dataclass
class Candidates:
    score: Tensor
    place: Tensor
    grad: Tensor
    state: Tensor
    k: Tensor

    @classmethod
    def none(cls, backend, k: int, dtype: torch.dtype, room: int = 0) -> Candidates:
        """Nobody, with room for what the backend asks for, and for `room` at least."""
        asked, length = backend.candidate_room(k)
        room, device = max(room, asked), backend.device
        score, grad = (torch.zeros(room, dtype=dtype, device=device) for _ in range(2))
        place = torch.full((room,), -1, device=device)
        return cls(
            score, place, grad, torch.zeros(length, dtype=torch.int64, device=device), backend.count(k)
        )

    def arguments(self) -> tuple[Tensor, ...]:
        """From `best_score` to `k`."""
        return self.score, self.place, self.grad, self.state, self.k

    def best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Score, place and gradient of the k best, best first, ties to the lowest place."""
        score, place, grad = (x.cpu() for x in (self.score, self.place, self.grad))
        held = place != -1
        assert (score[held] > 0).all()
        assert not score[~held].any()
        assert not grad[~held].any()
        score, place, grad = score[held], place[held], grad[held]
        assert len(place.unique()) == len(place), "a place is held twice"
        order = np.lexsort((place.numpy(), -score.numpy()))[: max(int(self.k), 0)]
        return score[order], place[order], grad[order]

    def check(self, problem: cases.Problem, expected) -> None:
        """The k best are those of the oracle's selection, each with its gradient."""
        offsets, indices, scores = expected
        owner = np.repeat(np.arange(len(problem.params)), np.diff(offsets))
        order = np.argsort(-scores, kind="stable")
        want = (owner.astype(np.int64) << 32 | indices)[order]
        score, place, grad = self.best()
        np.testing.assert_array_equal(place.numpy(), want)
        oracle.check_bits(score, torch.from_numpy(scores[order]).to(score.dtype))
        rows = [None if g is None else torch.from_numpy(oracle.array(g)) for g in problem.grads]
        for held, at in zip(grad, want, strict=True):
            oracle.check_bits(held, rows[at >> 32][at & 0xFFFFFFFF])


def padded(entries: Entries, junk: int = 3) -> Entries:
    """The same entries with junk behind the last, as an optimizer's buffers have it."""
    behind = torch.full((junk,), -77, dtype=torch.int32, device=entries.indices.device)
    return Entries(entries.offsets, torch.cat([entries.indices, behind]))


def collect(
    backend, problem, order, held, eps, exp, *, scores=None, again=False, values=None, add=False, active=None
) -> Tensor:
    """Hands the problem's tensors to collect_ in `order`; returns the values at the active entries.

    active: offsets [..., M + 1] and indices in place of the problem's.
    """
    active = active or padded(problem.active or Entries.empty(len(problem.params)))
    offsets, indices = (x.to(backend.device) for x in active)
    if values is None:
        values = torch.full(indices.shape, 7.0, dtype=held.score.dtype, device=backend.device)
    for j in order:
        if problem.grads[j] is not None:
            backend.table.collect_(
                backend.here(problem.params[j]), backend.here(problem.grads[j]),
                None if scores is None else backend.here(scores[j]), offsets[..., j : j + 2], indices,
                values, add, j << 32, *held.arguments(), again, eps, exp,
            )  # fmt: skip
    return values
