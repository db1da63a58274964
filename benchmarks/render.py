"""Markdown from results of CPUs and GPUs: tables, number formats, bars, and the marked block of a page."""

import os
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
WIDTH = 120  # characters of a line of prose
VERDICT = {True: "met", False: "**missed**", None: "not run"}

Markers = tuple[str, str]
BENCH: Markers = ("<!-- bench:begin -->", "<!-- bench:end -->")
TRAINING: Markers = ("<!-- training:begin -->", "<!-- training:end -->")
GPU: Markers = ("<!-- gpu:begin -->", "<!-- gpu:end -->")


@dataclass(frozen=True)
class Bar:
    """A promise: `value` is at most ("≤") or at least ("≥") `limit`; None: not measured.

    at_full: the same ratio with |Λ| = B, which has no limit.
    """

    what: str
    limit: float
    value: float | None
    at_full: float | None = None
    sense: str = "≤"

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.limit if self.sense == "≤" else self.value >= self.limit


def bar_rows(bars: list[Bar]) -> list[dict]:
    """The bars as a results file holds them, each with `met`."""
    return [asdict(bar) | {"met": bar.met} for bar in bars]


def table(header: list[str], rows: list[list[str]]) -> str:
    """The first column is left-aligned, the rest right-aligned."""
    align = ["---"] + ["---:"] * (len(header) - 1)
    escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in [header, align, *rows]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in escaped)


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def size(n_bytes: int | None) -> str:
    if n_bytes is None:
        return "–"
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def duration(ms: float) -> str:
    if ms >= 1e3:
        return f"{ms / 1e3:.2f} s"
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms"


def limit(bar: dict) -> str:
    """`≤ 0.55`; results files up to 0.1.0 name no sense, which is then "≤"."""
    return f"{bar.get('sense', '≤')} {bar['limit']:.3g}"


def measured(bar: dict) -> str:
    """The bar's number, of a missed bar with as many digits as tell it from the limit."""
    value, text = bar["value"], number(bar["value"])
    if bar["met"] is not False:
        return text
    longer = (f"{value:.{digits}g}" for digits in range(4, 18))
    return next(text for text in (text, *longer) if float(text) != bar["limit"])


def wrapped(section: str) -> str:
    """Lines of prose of at most WIDTH characters; those of tables and pictures stay."""
    lines = section.splitlines()
    return "\n".join(
        line if line.startswith(("|", "![")) else textwrap.fill(line, WIDTH, break_on_hyphens=False)
        for line in lines
    )


def bars_table(bars: list[dict], label: str = "ratio") -> str:
    """Every bar with its number and verdict; the last column exists where a bar has `at_full`."""
    full = any(bar.get("at_full") is not None for bar in bars)
    lines = []
    for bar in bars:
        line = [bar["what"], limit(bar), measured(bar), VERDICT[bar["met"]]]
        lines.append(line + [number(bar["at_full"])] * full)
    return table([label, "bar", "measured", "", *["at |Λ| = B"] * full], lines)


def missed(bars: list[dict]) -> str:
    """How many bars are met, then by name the missed ones (measured vs bar) and those without a number."""
    late = [f"{bar['what']} ({measured(bar)} vs {limit(bar)})" for bar in bars if bar["met"] is False]
    absent = [bar["what"] for bar in bars if bar["met"] is None]
    met = sum(bar["met"] is True for bar in bars)
    lists = [f"Missed: {'; '.join(late)}."] if late else []
    lists += [f"Not run: {'; '.join(absent)}."] if absent else []
    return " ".join([f"{met} of {len(bars)} bars are met.", *lists])


def link(target: Path, page: Path) -> str:
    """Where `page` finds a file of the same checkout; the bare name of a file elsewhere."""
    target, folder = target.resolve(), page.resolve().parent
    inside = target.is_relative_to(ROOT) or target.is_relative_to(folder)
    return Path(os.path.relpath(target, folder)).as_posix() if inside else target.name


def block(page: Path, markers: Markers) -> str:
    """What stands between the markers. ValueError where the page has none."""
    text, (begin, end) = page.read_text(), markers
    if begin not in text or end not in text:
        raise ValueError(f"{page}: expected the markers {begin} and {end}, got a page without: add both")
    return text.split(begin, 1)[1].split(end, 1)[0].strip()


def replace_block(page: Path, markers: Markers, section: str) -> None:
    """Put `section` between the markers. ValueError where the page has none."""
    block(page, markers)
    head, rest = page.read_text().split(markers[0], 1)
    tail = rest.split(markers[1], 1)[1]
    page.write_text(f"{head}{markers[0]}\n{section}\n{markers[1]}{tail}")


Section = Callable[[dict, str], str]


@dataclass(frozen=True)
class Pages:
    """The two pages of one kind of results: a short block in `readme`, every table in `page`."""

    markers: Markers
    short: Section  # (results, link to the picture) -> markdown
    long: Section
    readme: Path = README
    page: Path = PAGE

    def sections(self, results: dict, picture: Path) -> dict[Path, str]:
        sections = ((self.readme, self.short), (self.page, self.long))
        return {page: wrapped(section(results, link(picture, page))) for page, section in sections}

    def update(self, results: dict, picture: Path) -> None:
        for page, section in self.sections(results, picture).items():
            replace_block(page, self.markers, section)
