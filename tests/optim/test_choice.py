"""The choice over ranks as a pure function of what each rank holds, against one sort of everything."""

import math
import random

import numpy as np
import pytest
import torch

from id3_optim.distributed.choice import DIGIT_BITS, best, boundary

TENSORS = 5
BITS = 32 + TENSORS.bit_length()  # of a place


def oracle(place, score, k):
    """The places of the best k, ascending: one sort by numpy."""
    counted = np.flatnonzero(score > 0)
    order = counted[np.lexsort((place[counted], -score[counted].astype(np.float64)))][:k]
    return np.sort(place[order]).tolist()


def by_sort(ranks, k):
    selected = [(p, torch.where(s > 0, s, 0)) for p, s in ranks]  # as the kernels hand them on
    own = [best(p, s, torch.tensor(k), k) for p, s in selected]
    place, _ = best(*map(torch.cat, zip(*own, strict=True)), torch.tensor(k), k)
    return place[place < 1 << 62].tolist()


def by_boundary(ranks, k):
    """Every rank's generator gets the sum of what all have yielded."""
    rounds = [boundary(place, score, torch.tensor(k), BITS) for place, score in ranks]
    counts, found = [next(r) for r in rounds], []
    while not found:
        total, counts = sum(counts), []
        for r in rounds:
            try:
                counts.append(r.send(total))
            except StopIteration as end:
                found.append(end.value)
    assert len({(int(f.score), int(f.place), int(f.number)) for f in found}) == 1
    chosen = [place[f.chosen(place, score)] for f, (place, score) in zip(found, ranks, strict=True)]
    places = torch.cat(chosen).sort().values.tolist()
    assert len(places) == int(found[0].number)
    return places


def case(seed):
    """(ranks as pairs of places and scores, k): few or many ranks, ties, empty ranks, all on one, NaN."""
    draw, numbers = random.Random(seed), np.random.default_rng(seed)
    n_ranks, n = draw.choice([1, 2, 3, 4, 8, 64, 1024]), draw.choice([0, 1, 5, 60, 900])
    index = numbers.choice(1 << draw.choice([11, 31]), n, replace=False)
    place = torch.from_numpy((numbers.integers(0, TENSORS, n) << 32) | index)
    kind = draw.choice(["ties", "two values", "any", "one value", "none"])
    levels = {"ties": 4, "two values": 2, "any": 1 << 20, "one value": 1, "none": 1}[kind]
    score = numbers.integers(1, levels + 1, n) * (0 if kind == "none" else 2.0 ** draw.randint(-140, 100))
    score = score.astype(draw.choice([np.float32, np.float64]))
    for value in (np.nan, 0.0, -1.0):
        score[numbers.random(n) < draw.choice([0, 0.2])] = value
    where = draw.choice(["random", "one rank", "two ranks", "blocks"])
    owner = {
        "random": numbers.integers(0, n_ranks, n),
        "one rank": np.full(n, n_ranks - 1),
        "two ranks": numbers.integers(0, 2, n) * (n_ranks - 1),
        "blocks": np.arange(n) * n_ranks // max(n, 1),
    }[where]
    score = torch.from_numpy(score)
    ranks = [(place[owner == r], score[owner == r]) for r in range(n_ranks)]
    return ranks, draw.choice([0, 1, n // 3, n, n + 7])


def pytest_generate_tests(metafunc):
    if "seeds" in metafunc.fixturenames:
        n = metafunc.config.getoption("--choice-cases")
        metafunc.parametrize(
            "seeds", [range(first, min(first + 40, n)) for first in range(0, n, 40)], ids=str
        )


def test_ranks_choose_what_one_sort_chooses(seeds):
    for seed in seeds:
        ranks, k = case(seed)
        place, score = (torch.cat(column).numpy() for column in zip(*ranks, strict=True))
        expected = oracle(place, score, k)
        ranks = without_twins(ranks)
        assert by_sort(ranks, k) == expected, seed
        assert by_boundary(ranks, k) == expected, seed


def without_twins(ranks):
    """Ranks that hold nothing say and find the same, call by call: one of them stands for all."""
    empty = [rank for rank in ranks if not rank[0].numel()]
    return [rank for rank in ranks if rank[0].numel()] + empty[:1]


def test_infinite_scores_do_not_break_the_histogram():
    place, score = torch.arange(3), torch.tensor([math.inf, 1.0, 2.0])
    assert by_boundary([(place, score)], 2) == [0, 2]  # the kernels select no infinity; a list may hold one


def test_a_message_is_as_long_whatever_k_is():
    place, score = torch.arange(1000), torch.rand(1000)
    rounds = boundary(place, score, torch.tensor(700), BITS)
    counts, sent = next(rounds), 0
    with pytest.raises(StopIteration):
        while True:
            sent += counts.nbytes
            counts = rounds.send(counts)
    assert sent == (3 + 4) * 8 << DIGIT_BITS
