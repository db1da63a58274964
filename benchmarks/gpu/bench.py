"""`python -m benchmarks.gpu.bench JOB …`: measures each job and prints its rows, a line of JSON each.

A job that fails ends the process, since a GPU that faulted takes no more work; `benchmarks.gpu` continues
with the next job in a new process.
"""

import argparse
import json
import sys
import traceback
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu import rows
from benchmarks.gpu.cases import Case
from benchmarks.gpu.device import BACKENDS, ON_GPU, describe, give_back

SMALL, LARGE = ("184M float32", "184M bfloat16"), "1.3B bfloat16"


def jobs(quick: bool) -> dict[str, Callable[[int], Iterator[dict]]]:
    """Every job by name, the most important first; each takes the number of rounds."""
    small, large = (("tiny float32",), "tiny bfloat16") if quick else (SMALL, LARGE)
    huge = () if quick else (Case("6.7B bfloat16"),)
    share, more = (0.05, 0.1) if quick else (0.001, 0.01)
    case, wide = Case(large, share), Case(large, more)
    found: dict[str, Callable] = {"machine": lambda _: iter([describe()]), "bandwidth": rows.bandwidth}

    def add(kind: str, case: Case, run: Callable, *first) -> None:
        at = f"{case.model} {case.share:.1%}" + ("" if case.active == 0.5 else " full")
        found[" ".join([kind, *first, at])] = lambda rounds: run(*first, case, rounds)

    for one in (case, *(Case(name, share) for name in small)):
        for backend in BACKENDS:
            add("id3", one, rows.id3, backend)
        add("adamw", one, rows.adamw)
    add("dense", case, rows.dense)
    for backend in BACKENDS:
        for one in (wide, Case(large, more, 1.0), *huge):
            add("id3", one, rows.id3, backend)
        add("selections", case, rows.selections, backend)
        add("profile", case, rows.profile, backend)
        add("growth", wide, rows.growth, backend)
        add("host", Case("300 tensors"), rows.host, backend)
    add("dense", wide, rows.dense)
    for one in (Case(name, share) for name in small):
        add("dense", one, rows.dense)
    for one in huge:
        add("adamw", one, rows.adamw)
    add("toolkit", Case(small[0], share), rows.toolkit)
    add("toolkit", case, rows.toolkit)
    return found


def _run(job: str, quick: bool) -> bool:
    """Prints the job's rows, then that it is done; False where it failed."""
    error = None
    try:
        for row in jobs(quick)[job](5 if quick else 30):
            print(json.dumps({"job": job} | row), flush=True)
    except torch.OutOfMemoryError as short:
        error = str(short).splitlines()[0]
    except Exception as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
    print(json.dumps({"job": job, "done": True} | ({"skipped": error} if error else {})), flush=True)
    give_back()
    return error is None or not ON_GPU


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bench", description=__doc__)
    parser.add_argument("job", nargs="*")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true", help="print the names of the jobs")
    options = parser.parse_args()
    if options.list:
        print("\n".join(jobs(options.quick)))
    sys.exit(0 if all(_run(job, options.quick) for job in options.job) else 1)


if __name__ == "__main__":
    main()
