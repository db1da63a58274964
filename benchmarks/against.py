"""`python -m benchmarks against TREE`: this checkout's medians beside those of another, round by round.

TREE: a checkout of the project with a built extension. Both trees run this checkout's cases, each in a
process of its own; a round of one follows a round of the other. The exit status is 1 where a median is above
`--limit` times the other tree's.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import commit
from benchmarks.measure import summary
from benchmarks.render import ROOT, table

# The packages come from the tree; `benchmarks`, and it alone, from this checkout, the working directory.
_START = """
import sys
from pathlib import Path
tree = Path(sys.argv[1])
sys.path[:0] = [str(tree), str(tree / "python")]
import id3_kernels, id3_optim
for package in (id3_kernels, id3_optim):
    assert Path(package.__file__).is_relative_to(tree), f"{package}: expected it from {tree}"
why_not = id3_kernels.available_backends()["cpu"]
assert why_not is None, f"{tree}: {why_not}"
del sys.path[:2]
from benchmarks.worker import main
main()
"""


class Worker:
    """A process that measures with the packages of `tree`."""

    def __init__(self, tree: Path, threads: int):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""}
        command, pipe = [sys.executable, "-W", "ignore", "-c", _START, str(tree)], subprocess.PIPE
        self._tree = tree
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True
        )

    def request(self, *words: str):
        """Send one request to `benchmarks.worker`, return the reply. RuntimeError where the process ended."""
        try:
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            raise RuntimeError(
                f"worker: expected a reply to {words}, got none; its traceback is above ({self._tree})"
            )
        return json.loads(reply)

    def close(self) -> None:
        self._process.communicate()


def compare(this: Worker, other: Worker, case: str, rounds: int) -> list[dict]:
    """One row per method of the case: both medians, their ratio, and whether both trees left equal bits."""
    methods = this.request("prepare", case)
    other.request("prepare", case)
    seconds = {(worker, method): [] for worker in (this, other) for method in methods}
    for turn in range(rounds):
        # The order alternates: neither tree always runs right after the other.
        for worker in (this, other) if turn % 2 == 0 else (other, this):
            for method in methods:
                seconds[worker, method].append(worker.request("time", method))
    same_bits = this.request("digest") == other.request("digest")
    rows = []
    for method in methods:
        ours, theirs = (summary(seconds[worker, method]) for worker in (this, other))
        ratio = round(ours["median_ms"] / theirs["median_ms"], 4)
        about = {"case": case, "method": method, "ratio": ratio, "same_bits": same_bits}
        rows.append(about | {"this": ours, "other": theirs})
    return rows


def slower(rows: list[dict], limit: float) -> list[dict]:
    """The rows whose ratio is above the limit."""
    return [row for row in rows if row["ratio"] > limit]


def rows_table(rows: list[dict], limit: float) -> str:
    lines = []
    for row in rows:
        medians = [f"{row[tree]['median_ms']:.3f}" for tree in ("this", "other")]
        bits = "same" if row["same_bits"] else "**differ**"
        verdict = "**slower**" if slower([row], limit) else ""
        lines.append([f"{row['case']}, {row['method']}", *medians, f"{row['ratio']:.3f}", bits, verdict])
    return table(["case", "this, ms", "other, ms", "this / other", "bits", ""], lines)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks against", description=__doc__)
    parser.add_argument("tree", type=Path, help="the other checkout, its extension built")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--full", dest="size", action="store_const", const="full", help="both models, every case"
    )
    sizes.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="a toy model")
    parser.set_defaults(size="quick")
    parser.add_argument("--case", action="append", help="a case by its printed name; several: repeat")
    parser.add_argument("--rounds", type=int, default=21, help="rounds per case (default: 21)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (default: 2)")
    parser.add_argument("--limit", type=float, default=1.03, help="the largest ratio (default: 1.03)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "against.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    trees = {"this": ROOT, "other": options.tree.resolve()}
    if not (trees["other"] / "id3_kernels").is_dir():
        sys.exit(f"tree: expected a checkout of the project, got {options.tree}, which has no id3_kernels")
    results: dict = {name: getattr(options, name) for name in ("threads", "rounds", "limit")}
    results["trees"] = {name: {"path": str(tree), "commit": commit(tree)} for name, tree in trees.items()}
    rows = results["rows"] = []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    this, other = (Worker(tree, options.threads) for tree in trees.values())
    try:
        for case in options.case or this.request("cases", options.size):
            rows += compare(this, other, case, options.rounds)
            options.output.write_text(json.dumps(results, indent=1) + "\n")
            print(
                case,
                *(f"{row['method']} {row['ratio']:.3f}" for row in rows if row["case"] == case),
                flush=True,
            )
    finally:
        this.close()
        other.close()
    print(rows_table(rows, options.limit), options.output, sep="\n")
    sys.exit(1 if slower(rows, options.limit) else 0)


if __name__ == "__main__":
    main()
