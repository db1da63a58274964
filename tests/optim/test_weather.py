"""Ranks of different settings, models and versions, and a rank that fails alone: an error on each."""

import sys

import pytest
from test_ranks import run

CHECKS = ["different fsdp", "other_model fsdp", "out_of_memory fsdp", "folders fsdp"]
if sys.platform == "linux":  # the system's limit is in force there
    CHECKS.append("no_memory_left fsdp")


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    return run(tmp_path_factory.mktemp("weather"), 2, CHECKS, "weather_run.py")


@pytest.mark.parametrize("check", CHECKS)
def test_every_rank_gets_an_error(errors, check):
    for found in errors:
        assert found[check] is None, found[check]
