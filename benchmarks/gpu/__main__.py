"""`make gpu-check`: build, tests, sanitizer, measurements and whole training steps on a machine with a GPU.

Each part runs in processes of its own with a limit in seconds; one that fails or is cut off stops no other.
The results file is rewritten after every row; a part that runs again replaces what it gave before. Without a
GPU `--quick` runs the same code on the CPU with toy models, to see that it runs.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.bars import measured_bars, with_ratios
from benchmarks.gpu.processes import ROOT, Deadline, stream, together
from benchmarks.gpu.tables import summary_table

# The most seconds of each part; `--seconds` limits all of them together.
PARTS = {"build": 150, "tests": 140, "bench": 170, "sanitize": 90, "e2e": 240}
TOOLS = ("memcheck", "racecheck", "initcheck")
METHODS = ("full", "lora", "shira", "dense masking", "id3", "id3 released")
_AHEAD = ("test_triton_compile.py", "test_cuda_compile.py", "test_cuda_emulated.py")  # need no GPU
Save = Callable[[dict], None]


def build(limit: float, quick: bool, save: Save) -> None:
    if quick:
        save({"skipped": "quick"})
        return
    command = {"build": [sys.executable, "setup.py", "build_ext", "--inplace"]}
    save(together(command, limit, TORCH_CUDA_ARCH_LIST=_architecture())["build"])


def _architecture() -> str:
    """This GPU's alone, which compiles in a third of the time; setup.py's own list where it is not known."""
    script = "import torch; print('.'.join(map(str, torch.cuda.get_device_capability())))"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return told.stdout.strip()


def tests(limit: float, quick: bool, save: Save) -> None:
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-rfEs"]
    pytest += ["--maxfail=25"]
    ignored = [f"--ignore=tests/kernels/{name}" for name in _AHEAD]
    commands = {"gpu": [*pytest, "tests/gpu"]}
    if not quick:
        commands |= {name: [*pytest, "tests/kernels", *ignored, "-k", name] for name in ("cuda", "triton")}
    save(together(commands, limit))


def sanitize(limit: float, quick: bool, save: Save) -> None:
    """The kernels on small shapes, each allocation on its own, so that its borders are seen."""
    commands = {tool: (tool, "cuda") for tool in TOOLS} | {"memcheck, triton": ("memcheck", "triton")}
    run = [sys.executable, "-m", "benchmarks.gpu.sanitized"]
    options = ["--error-exitcode", "9", "--print-limit", "20"]
    if quick:
        save(together({"plain": [*run, "reference"]}, limit))
        return
    save(
        together(
            {
                name: ["compute-sanitizer", "--tool", tool, *options, *run, backend]
                for name, (tool, backend) in commands.items()
            },
            limit,
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",
        )
    )


def bench(limit: float, quick: bool, save: Save) -> None:
    """Every job; a process that dies is followed by one for the jobs that are left."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.bench", *["--quick"] * quick]
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
        if todo == before:  # died without a word
            failed[todo.pop(0)] = tail[-500:] or "no output"
    save(found | {"rows": with_ratios(rows)})


def e2e(limit: float, quick: bool, save: Save) -> None:
    """Training steps of a whole model by each method, then the table of released gradients."""
    deadline, rows = Deadline(limit), []
    found: dict = {"rows": rows, "not_run": list(METHODS)}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.end_to_end", *["--quick"] * quick]
    for method in METHODS:
        if deadline.left() < 10:
            break
        found["not_run"].remove(method)
        count = len(rows)
        tail = stream([*command, method], deadline.left(), rows.append)
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


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=list(PARTS), help="default: all")
    parser.add_argument("--quick", action="store_true", help="toy models, on the CPU too")
    parser.add_argument("--seconds", type=float, default=480, help="for everything together (default: 480)")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu-check.json")
    return parser.parse_args()


def main() -> None:
    options = _parse()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(options.output.read_text()) if options.output.exists() else {}
    deadline = Deadline(options.seconds)

    def write() -> None:
        results["bars"] = measured_bars(results.get("bench", {}).get("rows", []))
        temporary = options.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        temporary.replace(options.output)

    said = _describe(results)
    if not options.quick and not results.get("machine", {}).get("is_gpu"):
        sys.exit(f"gpu-check: expected a GPU, torch sees none (--quick tries the code on the CPU)\n{said}")
    results["quick"] = options.quick
    for part in options.part:
        began = time.monotonic()

        def save(found: dict, part=part, began=began) -> None:
            results[part] = found | {"seconds": round(time.monotonic() - began, 1)}
            write()

        if deadline.left() < 10:
            save({"skipped": f"no time left of {options.seconds:.0f} s: make gpu-check PART={part}"})
            continue
        try:
            globals()[part](min(PARTS[part], deadline.left()), options.quick, save)
        except Exception as error:  # one part never stops the others
            save(results.get(part, {}) | {"error": repr(error)})
        print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
        if part == "build":
            _describe(results)  # now with the backends that were built
    write()
    print(summary_table(results))
    print(options.output)


def _describe(results: dict) -> str:
    """Notes the machine; returns what else was printed."""

    def take(row: dict) -> None:
        if not row.get("done"):
            results["machine"] = {name: value for name, value in row.items() if name != "job"}

    return stream([sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.bench", "machine"], 60, take)


if __name__ == "__main__":
    main()
