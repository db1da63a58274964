"""A small folder of data in the formats that the grids of the evidence read."""

import json
from pathlib import Path

from benchmarks.quality import tasks


def write_data(folder: Path) -> Path:
    """GLUE's form: tab-separated, and a quote mark is text."""
    (folder / "CoLA").mkdir(parents=True)
    telling = {"good": 1, "bad": 0, "fine": 1, "awful": 0}
    lines = [f'the "film {i} was {word}\t{label}' for i in range(8) for word, label in telling.items()]
    for name in ("train.tsv", "dev.tsv"):
        (folder / "CoLA" / name).write_text("\n".join(["sentence1\tlabel", *lines, ""]))
    (folder / "math").mkdir()
    rows = [
        {"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(tasks.KEPT_ROWS + 20)
    ]
    (folder / "math" / "gsm8k.train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
