"""The tree in CONTRIBUTING.md names every module of both packages, and no module that does not exist."""

import re
from collections import defaultdict

import pages
import pytest

ROOT = pages.ROOT
TREE = pages.blocks((ROOT / "CONTRIBUTING.md").read_text(), "")[0]
PACKAGES = ("python/id3_optim", "id3_kernels")


def listed(tree: str) -> dict[str, set[str]]:
    """Folder -> the names that the tree gives for it.

    A line without indent opens a package. An indent of two spaces begins names of the package's modules, or a
    folder, whose modules come after the last colon of its text. Deeper lines continue that text.
    """
    texts, names = {}, defaultdict(set)
    package = folder = ""
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 0:
            package = line.strip().rstrip("/")
        elif indent > 2 and folder:
            texts[folder] += f" {line.strip()}"
        elif indent == 2:
            left, _, text = line.strip().partition("  ")
            folder = f"{package}/{left[:-1]}" if left.endswith("/") else ""
            if folder:
                texts[folder] = text.strip()
            else:
                names[package] |= set(re.findall(r"\w+", left))
    for folder, text in texts.items():
        names[folder] = set(re.findall(r"\w+", text.rpartition(":")[2]))
    return names


def modules(package: str) -> dict[str, set[str]]:
    """Folder -> the names of its modules, without `__init__` and `__main__`."""
    found = defaultdict(set)
    for path in (ROOT / package).rglob("*.py"):
        if not path.stem.startswith("__"):
            found[str(path.parent.relative_to(ROOT))].add(path.stem)
    return found


FOLDERS = {folder: names for package in PACKAGES for folder, names in modules(package).items()}


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_the_tree_names_every_module_of_a_folder(folder):
    assert listed(TREE)[folder] == FOLDERS[folder]


def test_the_tree_names_no_other_folder():
    of_packages = {folder for folder in listed(TREE) if folder.startswith(PACKAGES)}
    assert of_packages == set(FOLDERS) and len(FOLDERS) > 6


def test_the_folders_of_csrc_exist():
    shown = {folder for folder in listed(TREE) if folder.startswith("csrc/")}
    assert shown == {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.is_dir()}


def test_a_tree_is_read():
    tree = "a/\n  b, c,\n  d      text of d,\n         continued\n  e/     text: f,\n         g_h\nk/\n  m\n"
    assert listed(tree) == {"a": {"b", "c", "d"}, "a/e": {"f", "g_h"}, "k": {"m"}}
