"""`id3-optim train --group-by-length`: which rows share a batch, and in which order."""

import itertools

import pytest
import torch
import transformers
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from id3_optim.cli.divergence import FiniteLoss
from id3_optim.cli.sampling import EachEpoch, GroupedByLength, grouped_by_length
from id3_optim.cli.watched_trainer import WatchedTrainer

LENGTHS = torch.randint(3, 60, (1003,), generator=torch.Generator().manual_seed(1)).tolist()


def order(seed=0, batch=8, lengths=LENGTHS):
    return grouped_by_length(lengths, batch, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "batch"), [(1003, 8), (5, 8), (8, 8), (401, 1), (0, 4)])
def test_every_row_comes_once(rows, batch):
    assert sorted(order(batch=batch, lengths=LENGTHS[:rows])) == list(range(rows))


def batches(rows, size):
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def padded(rows, batch=8):
    return sum(max(LENGTHS[i] for i in part) * len(part) for part in batches(rows, batch))


def test_little_is_padded_and_long_texts_do_not_come_first():
    rows, at_random = order(), torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(0))
    assert padded(rows) < 1.1 * sum(LENGTHS) < 1.5 * sum(LENGTHS) < padded(at_random.tolist())
    longest = [max(LENGTHS[i] for i in part) for part in batches(rows, 8)]
    falls = sum(b < a for a, b in itertools.pairwise(longest))
    assert 0.3 < falls / len(longest) < 0.7


def test_the_seed_and_the_epoch_decide_and_nothing_else():
    sampler = GroupedByLength(LENGTHS, 8, seed=3)
    first = list(sampler)
    torch.rand(5)  # a method that draws random numbers
    assert list(sampler) == first != order(seed=0) and len(sampler) == len(first)
    sampler.set_epoch(1)
    assert list(sampler) not in (first, sorted(first))


def test_a_resumed_run_of_two_processes_is_in_its_epoch():
    sampler = GroupedByLength(LENGTHS, 16, seed=0)
    shards = [BatchSamplerShard(BatchSampler(sampler, 8, False), 2, rank) for rank in (0, 1)]
    state = transformers.TrainerState(epoch=1.5)
    EachEpoch(sampler).on_epoch_begin(None, state, None)
    straight = GroupedByLength(LENGTHS, 16, seed=0)
    straight.set_epoch(1)
    both = [list(shard) for shard in shards]
    assert both[0][3] + both[1][3] == list(straight)[48:64]
    lengths = [LENGTHS[i] for i in both[0][3] + both[1][3]]
    assert max(lengths) - min(lengths) < 10, "the batches of one step are alike too"


def test_evaluation_keeps_its_order(tmp_path):
    rows = [{"input_ids": [1] * n, "labels": 0} for n in (3, 9, 4, 8, 5)]
    options = {"model": torch.nn.Linear(1, 1), "train_dataset": rows, "eval_dataset": rows}
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    trainer = WatchedTrainer(FiniteLoss(), True, args=args, **options)
    assert isinstance(trainer._get_train_sampler(), GroupedByLength)
    assert list(trainer._get_eval_sampler(rows)) == list(range(5))
