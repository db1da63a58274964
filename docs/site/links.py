"""An mkdocs hook: pages of the site that are files of the repository, and links that leave `docs/`.

On a code host, `docs/trainers.md` links to `../examples/peft_lora.py`, and the README to `docs/trainers.md`.
Both are outside of the site, so that every relative link is resolved in the repository first, then in the
site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
# Page of the site: the file of the repository that it shows.
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
EXAMPLES = "guide/examples.md"
COPIED = (".png", ".json", ".svg")  # what else may be linked outside of docs/, by ending
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


def on_files(files, config):
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown, page, config, files):
    own = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = _CODE.split(markdown)
    for i in range(0, len(parts), 2):  # the odd ones are code
        parts[i] = _LINK.sub(lambda m: m[1] + _in_site(m[2], own, page, config, files) + m[3], parts[i])
        parts[i] = parts[i].replace("<details>", '<details markdown="1">')
    return "".join(parts)


def _in_site(link, own, page, config, files):
    """The link from `page`, whose file in the repository is `own`, as the site needs it."""
    if re.match(r"[a-z]+:|#", link):
        return link
    path, _, anchor = link.partition("#")
    target = posixpath.normpath(posixpath.join(posixpath.dirname(own), path))
    in_site = _page_of(target, config, files)
    if in_site is None:
        return link  # mkdocs warns of it
    if target.startswith("examples/"):
        anchor = Path(target).stem
    relative = posixpath.relpath(in_site, posixpath.dirname(page.file.src_uri) or ".")
    return f"{relative}#{anchor}" if anchor else relative


def _page_of(target, config, files):
    """The file of the site that shows the repository's `target`; None where there is none."""
    pages = {source: page for page, source in PAGES.items()}
    if target in pages:
        return pages[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    if target == "examples" or re.fullmatch(r"examples/\w+\.py", target):
        return EXAMPLES
    if target.endswith(COPIED) and (ROOT / target).is_file():
        if files.get_file_from_path(target) is None:
            files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
        return target
    return None
