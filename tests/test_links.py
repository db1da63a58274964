"""Links between pages lead somewhere, and the site shows every page."""

import re
import unicodedata
from urllib.parse import urlsplit

import pages
import pytest

ROOT = pages.ROOT
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
# Pages of the site that are files beside docs/: docs/site/links.py makes them.
GENERATED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def anchors(text):
    """The anchors of a page that exist both on a code host and in the site."""
    found = set()
    for heading in pages.headings(text):
        named = re.search(r"\{#([\w-]+)\}\s*$", heading)
        plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)
        hosts = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        letters = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        sites = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", letters).strip().lower())
        if named:
            found.add(named[1])
        elif hosts == sites:
            found.add(hosts)
    return found


LINKS = [
    (pages.name(page), link)
    for page in [*pages.PAGES, ROOT / "CHANGELOG.md"]
    for link in LINK.findall(pages.without_code(page.read_text()))
]


@pytest.mark.parametrize("where, link", LINKS, ids=[f"{w}-{link}" for w, link in LINKS])
def test_link(where, link):
    page = ROOT / where
    parts = urlsplit(link)
    if parts.scheme:
        assert parts.scheme == "https" and parts.hostname and " " not in link
        return
    target = (page.parent / parts.path).resolve() if parts.path else page
    assert target.exists() and target.is_relative_to(ROOT)
    if parts.fragment:
        assert target.suffix == ".md" and parts.fragment in anchors(target.read_text())


def test_links_are_found():
    assert len(LINKS) > 60 and {where for where, _ in LINKS} > {"README.md", "docs/trainers.md"}
    assert LINK.findall("[a [b] c](x.md) ![p](p.png)") == ["x.md", "p.png"]
    assert anchors("# A: b\n## `c` d\n```\n# e\n```\n") == {"a-b", "c-d"}


def navigation():
    """The .md entries of mkdocs.yml's `nav`."""
    text = (ROOT / "mkdocs.yml").read_text()
    nav = text[text.index("\nnav:\n") :]
    return re.findall(r"- [^:]+: (\S+\.md)$", nav, re.MULTILINE)


def test_the_navigation_shows_every_page_once_and_nothing_else():
    entries = navigation()
    docs = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert sorted(entries) == sorted(docs | GENERATED.keys())
    assert all((ROOT / source).is_file() for source in GENERATED.values())


def test_the_api_pages_name_what_exists():
    import importlib

    documented = [
        entry
        for page in sorted((ROOT / "docs/api").glob("*.md"))
        for entry in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    ]
    for entry in documented:
        if ".integrations." in entry:
            pytest.importorskip("transformers")
        try:
            importlib.import_module(entry)
        except ModuleNotFoundError:
            module, _, member = entry.rpartition(".")
            assert hasattr(importlib.import_module(module), member), entry
    for package in ("id3_optim", "id3_kernels"):
        public = importlib.import_module(package).__all__
        assert {f"{package}.{name}" for name in public} <= set(documented)
