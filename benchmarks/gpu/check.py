"""`make gpu-check`: build, tests, sanitizer, measurements and whole training steps on a machine with a GPU.

Each part runs in processes of its own with a limit in seconds; one that fails or is cut off stops no other
part. The results file is rewritten after every row; a part that runs once more replaces its earlier results.
Without a GPU `--quick` runs the same code on the CPU with toy models, to see that it runs.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.bars import bars_of, with_ratios
from benchmarks.gpu.processes import Deadline, stream, together
from benchmarks.gpu.tables import summary_table
from benchmarks.render import ROOT

TOOLS = ("memcheck", "racecheck", "initcheck")
METHODS = ("full", "lora", "shira", "dense masking", "id3", "id3 released")
_NEED_NO_GPU = ("test_triton_compile.py", "test_cuda_compile.py", "test_cuda_emulated.py")
Save = Callable[[dict], None]


def _module(name: str, quick: bool) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", f"benchmarks.gpu.{name}", *["--quick"] * quick]


def build(limit: float, quick: bool, save: Save) -> None:
    if quick:
        save({"skipped": "quick"})
        return
    command = {"build": [sys.executable, "setup.py", "build_ext", "--inplace"]}
    save(together(command, limit, TORCH_CUDA_ARCH_LIST=_architecture())["build"])


def _architecture() -> str:
    """This GPU's alone, which compiles in a third of the time; setup.py's own list where it is not known."""
    script = "import torch; print('.'.join(map(str, torch.cuda.get_device_capability())))"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip()


def tests(limit: float, quick: bool, save: Save) -> None:
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-rfEs"]
    pytest += ["--maxfail=25"]
    ignored = [f"--ignore=tests/kernels/{name}" for name in _NEED_NO_GPU]
    commands = {"gpu": [*pytest, "tests/gpu"]}
    if not quick:
        commands |= {name: [*pytest, "tests/kernels", *ignored, "-k", name] for name in ("cuda", "triton")}
    save(together(commands, limit))


def first(limit: float, quick: bool, save: Save) -> None:
    """What is most worth knowing, in a minute: whether every op agrees with the reference, and the stream's
    share of the copy's rate."""
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-q"]
    deadline, rows = Deadline(limit), []
    found = together({"agreement": [*pytest, "tests/gpu/test_agreement.py"]}, limit)
    save(found)
    model = "tiny bfloat16 5.0%" if quick else "184M bfloat16 0.1%"
    backend = "cpu" if quick else "cuda"
    stream([*_module("bench", quick), "bandwidth", f"id3 {backend} {model}"], deadline.left(), rows.append)
    measured = [row for row in rows if not row.get("done")]
    save(found | {"rows": with_ratios(measured)})
    print(f"ops agree with the reference: {found['agreement']['ok']}")
    for row in with_ratios(measured):
        if row["measure"] == "select" and "over_copy" in row:
            print(f"{row['method']}: the selection runs at {row['over_copy']:.0%} of the copy's rate")


def sanitize(limit: float, quick: bool, save: Save) -> None:
    """The kernels on small shapes, one allocation per tensor, so that the tools see each tensor's borders."""
    run = [sys.executable, "-m", "benchmarks.gpu.sanitized"]
    if quick:
        save(together({"plain": [*run, "reference"]}, limit))
        return
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--print-limit", "20", "--tool"]
    commands = {tool: [*sanitizer, tool, *run, "cuda"] for tool in TOOLS}
    commands["memcheck, triton"] = [*sanitizer, "memcheck", *run, "triton"]
    save(together(commands, limit, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))


def bench(limit: float, quick: bool, save: Save) -> None:
    """Every job; a process that dies is followed by one for the jobs that are left."""
    command = _module("bench", quick)
    listed = subprocess.run([*command, "--list"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    todo, rows, failed = listed.stdout.splitlines(), [], {}
    found = {"rows": rows, "failed": failed, "not_run": todo}
    if not todo:
        failed["list"] = listed.stderr[-2000:]
    deadline = Deadline(limit)

    def take(row: dict) -> None:
        if row.get("done"):
            todo.remove(row["job"])
            if "skipped" in row:
                failed[row["job"]] = row["skipped"]
        else:
            rows.append(row)
        save(found | {"rows": with_ratios(rows)})

    while todo and deadline.left() > 5:
        before = list(todo)
        tail = stream([*command, *todo], deadline.left(), take)
        if todo == before:  # the process died before its first row
            failed[todo.pop(0)] = tail[-500:] or "no output"
    save(found | {"rows": with_ratios(rows)})


def e2e(limit: float, quick: bool, save: Save) -> None:
    """Training steps of a whole model by each method, then the table of released gradients."""
    deadline, rows = Deadline(limit), []
    found: dict = {"rows": rows, "not_run": list(METHODS)}
    for method in METHODS:
        if deadline.left() < 10:
            break
        found["not_run"].remove(method)
        count = len(rows)
        tail = stream([*_module("end_to_end", quick), method], deadline.left(), rows.append)
        if len(rows) == count:
            rows.append({"method": method, "skipped": tail[-500:]})
        save(found)
    if not quick and deadline.left() > 30:
        found["release"] = _release(deadline.left())
    save(found)


def _release(limit: float) -> dict:
    output = ROOT / "runs" / "gpu-release"
    command = [sys.executable, "-m", "benchmarks.release", "--device=cuda", "--model=Llama-2-7B"]
    found = together({"release": [*command, "--rounds=5", f"--output={output}"]}, limit)["release"]
    files = sorted(output.glob("*.json")) if found["ok"] else []
    return found | {"results": json.loads(files[-1].read_text()) if files else None}


class Part(NamedTuple):
    run: Callable[[float, bool, Save], None]
    seconds: float  # at most; `--seconds` limits all parts together


PARTS = {
    "build": Part(build, 150),
    "first": Part(first, 60),
    "tests": Part(tests, 140),
    "bench": Part(bench, 170),
    "sanitize": Part(sanitize, 90),
    "e2e": Part(e2e, 240),
}


class Check:
    """The results of one run, rewritten into `output` after every row."""

    def __init__(self, output: Path, quick: bool, seconds: float):
        self.output, self.quick, self.deadline = output, quick, Deadline(seconds)
        output.parent.mkdir(parents=True, exist_ok=True)
        self.results = json.loads(output.read_text()) if output.exists() else {}

    def write(self) -> None:
        self.results["bars"] = bars_of(self.results.get("bench", {}).get("rows", []))
        temporary = self.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1, ensure_ascii=False) + "\n")
        temporary.replace(self.output)

    def describe(self) -> str:
        """Notes the machine; returns the process's other output."""

        def take(row: dict) -> None:
            if not row.get("done"):
                self.results["machine"] = {name: value for name, value in row.items() if name != "job"}

        return stream([*_module("bench", False), "machine"], 60, take)

    def run(self, name: str) -> None:
        """One part; its error ends up in the results and stops no other part."""
        part, began = PARTS[name], time.monotonic()

        def save(found: dict) -> None:
            self.results[name] = found | {"seconds": round(time.monotonic() - began, 1)}
            self.write()

        left = self.deadline.left()
        if left < 10:
            save({"skipped": f"no time left: make gpu-check PART={name}"})
            return
        try:
            part.run(min(part.seconds, left), self.quick, save)
        except Exception as error:
            save(self.results.get(name, {}) | {"error": repr(error)})
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        if name == "build":
            self.describe()  # once more, with the backends that were built


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="toy models, on the CPU too")
    parser.add_argument("--seconds", type=float, default=480, help="for everything together (default: 480)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu-check.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = _parse(arguments)
    check = Check(options.output, options.quick, options.seconds)
    output = check.describe()
    machine = check.results.get("machine", {})
    if not options.quick and not machine.get("is_gpu"):
        sys.exit(
            f"machine: expected a GPU that torch sees, got {machine.get('gpu', 'no description')!r}; "
            f"--quick tries the code on the CPU\n{output}"
        )
    check.results["quick"] = options.quick
    for name in options.part:
        check.run(name)
    check.write()
    print(summary_table(check.results))
    print(options.output)
