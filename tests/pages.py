"""The pages that people read: README, CONTRIBUTING and docs/, with their code, sections and links."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks in `language`, in order."""
    return [code for kind, code in _FENCE.findall(text) if kind == language]


def without_code(text: str) -> str:
    """The page's prose: no fenced blocks, no code in backticks."""
    return re.sub(r"`[^`\n]+`", "code", _FENCE.sub("", text))


def headings(text: str) -> list[str]:
    """The headings without their marks."""
    return re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
