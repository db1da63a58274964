"""`python -m benchmarks`: run every case, then write the results file, the picture and README's tables."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.bars import Results
from benchmarks.machine import describe, slug
from benchmarks.memory import measure_memory, supported
from benchmarks.picture import draw
from benchmarks.report import collect, markdown, update_readme
from benchmarks.shapes import MODELS

HERE = Path(__file__).parent
ROOT = HERE.parent


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small model, one case of each kind")
    parser.add_argument("--threads", type=int, default=2, help="threads for every method (default: 2)")
    parser.add_argument("--rounds", type=int, help="rounds per case (default: 15, or 3 with --quick)")
    parser.add_argument("--output", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--report", type=Path, help="measure nothing: render this results file")
    parser.add_argument("--update-readme", action="store_true", help="put the tables into README.md")
    return parser.parse_args()


def _run_cases(options: argparse.Namespace, raw: Path) -> None:
    command = [sys.executable, "-m", "pytest", str(HERE), "-v", "--benchmark-only", "--benchmark-disable-gc"]
    command += ["--benchmark-columns=min,median,iqr,rounds", f"--benchmark-json={raw}"]
    command += [f"--threads={options.threads}", "-p", "no:cacheprovider"]
    command += ["--quick"] if options.quick else []
    command += [f"--rounds={options.rounds}"] if options.rounds else []
    subprocess.run(command, cwd=ROOT, check=True)


def _measure(options: argparse.Namespace) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "pytest.json"
        _run_cases(options, raw)
        models = ["MiniLM-L6"] if options.quick else list(MODELS)
        memory = measure_memory(models, options.threads) if supported() else []
        results = collect(raw, describe(options.threads), memory)
    options.output.mkdir(parents=True, exist_ok=True)
    name = slug(results["machine"]) + ("-quick" if options.quick else "")
    path = options.output / f"{name}.json"
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return path


def main() -> None:
    options = _parse()
    path = options.report or _measure(options)
    results = json.loads(path.read_text())
    picture = path.with_suffix(".png")
    draw(Results(results["rows"], results["memory"]), results["machine"], picture)
    # A results file inside the project is linked from README, which stands at its root.
    inside = picture.resolve().is_relative_to(ROOT)
    section = markdown(results, str(picture.resolve().relative_to(ROOT)) if inside else picture.name)
    if options.update_readme:
        update_readme(ROOT / "README.md", section)
    print(section)
    print(f"\n{path}\n{picture}")


if __name__ == "__main__":
    main()
