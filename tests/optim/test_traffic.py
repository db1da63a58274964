"""The table of traffic and memory: the page has what the function computes, which `test_ranks.py` counts."""

from pathlib import Path

import pytest

from id3_optim.distributed.choice import GATHERED
from id3_optim.distributed.traffic import Replicated, Run, replicas_table, table

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def test_the_page_has_the_computed_table():
    assert "\n".join(table()) in PAGE.read_text()
    assert "\n".join(replicas_table()) in PAGE.read_text()


@pytest.mark.parametrize("ranks", [2, 4, 1024])
def test_a_choice_sends_little(ranks):
    few = Run(10**9, 1000 * 10, 10, ranks)
    assert few.choice_bytes <= 16 * 1000 * ranks
    assert few.choice_messages == (1 if 1000 * ranks <= GATHERED else 7)
    many = Run(70 * 10**9, 70 * 10**6, 1, ranks)
    assert many.choice_bytes < 300_000 < many.model_bytes


def test_one_rank_sends_nothing_and_holds_everything():
    alone, half = Run(10**9, 10**6, 100, 1), Run(10**9, 10**6, 100, 2)
    assert alone.choice_bytes == alone.choice_messages == alone.model_bytes == alone.choice_seconds == 0
    assert alone.state_bytes == 18 * 10**6 == 2 * half.state_bytes
    assert alone.weight_bytes == 4 * 10**9 == 2 * half.weight_bytes


def test_replicas_send_active_entries_alone():
    run = Replicated(10**9, 10**6, 8)
    assert run.compact_bytes <= 8 * 10**6 and run.wrapper_bytes == 500 * run.compact_bytes
    assert run.selecting_bytes < 0.51 * run.wrapper_bytes and run.mean_bytes < run.wrapper_bytes / 25
    assert Replicated(10**9, 10**6, 1).mean_bytes == 0
