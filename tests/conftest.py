"""Settings of the whole suite."""

import os

import torch
from hypothesis import HealthCheck, settings

# Triton decides when it is imported whether its kernels run in the interpreter, so this comes before
# anything imports it. With a GPU they run on the GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    """`pytest tests/optim/test_choice.py --choice-cases 10000` is the long run of docs/distributed.md."""
    parser.addoption("--choice-cases", type=int, default=120, help="cases of ranks against one process")


# The same examples on each run and machine: a failure in CI is a failure here.
settings.register_profile(
    "id3", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("id3")
