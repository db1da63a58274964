"""`python -m benchmarks report FILE`: bars anew, picture, and the CPU's blocks of the two pages."""

import argparse
import json
from pathlib import Path

from benchmarks.bars import bars_of
from benchmarks.pages import CPU_PAGES
from benchmarks.picture import draw
from benchmarks.render import Pages


def publish(results: dict, path: Path, update_pages: bool, pages: Pages = CPU_PAGES) -> None:
    """Writes the results file and its picture, with `update_pages` the two pages; prints the tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    picture = path.with_suffix(".png")
    draw(results, picture)
    if update_pages:
        pages.update(results, picture)
    print(pages.sections(results, picture)[pages.page])
    print(f"\n{path}\n{picture}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("results", type=Path, help="a results file of `python -m benchmarks`")
    parser.add_argument("--update-pages", action="store_true", help="put the tables into the two pages")
    options = parser.parse_args(arguments)
    results = json.loads(options.results.read_text())
    # Limits move between releases; the rows stay what was measured.
    results["bars"] = bars_of(results["rows"], results["memory"])
    publish(results, options.results, options.update_pages)
