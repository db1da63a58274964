"""The quick division and root of the streaming kernels give the bits of IEEE arithmetic.

A quotient is wrongly rounded only where it lies so near to the middle between two floats that the errors of
the steps move it across. In units of 1/2 ulp / d these errors are below 10, so the near middles up to 16 are
all that can go wrong. `python tests/kernels/test_division.py` tries all of them, every root, and 10^9 random
pairs. A few roots are wrong there with a reciprocal that the hardware, whose IEEE root has the same steps,
cannot give.
"""

import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from ctypes import c_int64, c_uint32, c_uint64
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FIRST, DIVISORS = 1 << 23, 1 << 23
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def has_fma() -> bool:
    information = Path("/proc/cpuinfo")
    return information.exists() and " fma " in information.read_text()


@functools.cache
def library() -> ctypes.CDLL:
    flags = ["-O2", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", *["-mfma"] * has_fma()]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "division.so"
        command = ["g++", *flags, f"-I{HERE.parents[1] / 'csrc'}", HERE / "division.cpp", "-o", out]
        subprocess.run(command, check=True)
        loaded = ctypes.CDLL(str(out))
    for name in ("near_middles", "at_the_edges", "at_random", "roots", "without_the_correction"):
        getattr(loaded, f"wrong_{name}").restype = c_int64
    return loaded


def near_middles(first: int, step: int) -> tuple[int, int]:
    """How many quotients are wrong, and how many were tried."""
    tried = c_int64(0)
    wrong = library().wrong_near_middles(c_uint32(first), c_uint32(step), ctypes.byref(tried))
    return wrong, tried.value


def test_quotients_near_the_middle_between_two_floats():
    for first, step in ((FIRST, 997), (FIRST + DIVISORS - 2000, 1)):
        wrong, tried = near_middles(first, step)
        assert tried > 10_000
        assert wrong == 0


def test_mantissas_at_the_edges_of_a_binade():
    assert library().wrong_at_the_edges(c_uint32(300)) == 0


def test_random_pairs():
    assert library().wrong_at_random(c_int64(1_000_000), c_uint64(1)) == 0


def test_roots():
    for first, step in ((FIRST, 97), (FIRST + DIVISORS - 2000, 1), (FIRST, 1 << 12)):
        assert library().wrong_roots(c_uint32(first), c_uint32(step)) == 0


def test_an_uncorrected_quotient_is_seen_to_be_wrong():
    assert library().wrong_without_the_correction(c_int64(10_000), c_uint64(1)) > 1000


if __name__ == "__main__":
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 10**9
    print("near middles: wrong {}, tried {}".format(*near_middles(FIRST, 1)))
    print(f"roots: wrong {library().wrong_roots(c_uint32(FIRST), c_uint32(1))}, of all mantissas")
    print(f"random pairs: wrong {library().wrong_at_random(c_int64(pairs), c_uint64(2))}, tried {pairs}")
