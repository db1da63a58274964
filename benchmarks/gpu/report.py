"""`python -m benchmarks gpu-report runs/gpu-check.json`: results file, picture and the pages' GPU tables.

Refuses what was not measured on a GPU, or with toy models.
"""

import argparse
import json
from pathlib import Path

from benchmarks.gpu.pages import GPU_PAGES, evidence
from benchmarks.gpu.picture import draw
from benchmarks.machine import slug
from benchmarks.render import RESULTS, Pages


def publish(raw: dict, folder: Path, pages: Pages | None, commit: str | None = None) -> Path:
    """Writes results file and picture into `folder`, the blocks into `pages`; returns the results file."""
    results = evidence(raw, commit)
    path = folder / f"{slug('gpu', results['machine']['gpu'])}.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    picture = path.with_suffix(".png")
    draw(results, picture)
    if pages is not None:
        pages.update(results, picture)
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu-report", description=__doc__)
    parser.add_argument("raw", type=Path, help="the file that `make gpu-check` wrote")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--commit", help="of the code that ran, where the GPU machine had no git")
    parser.add_argument("--update-pages", action="store_true", help="put the tables into the two pages")
    options = parser.parse_args(arguments)
    pages = GPU_PAGES if options.update_pages else None
    try:
        print(publish(json.loads(options.raw.read_text()), options.output, pages, options.commit))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
