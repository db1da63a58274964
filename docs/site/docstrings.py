"""A griffe extension: docstrings are plain sentences; the site shows arguments as a list.

A sentence that begins with `name:` or `name, other:`, names of the object's own arguments or fields, becomes
an item. `Returns`, `Raises` and `Mutates` begin a paragraph.
"""

import re

import griffe

_NAMES = re.compile(r"(?:(?<=^)|(?<=[.;)] )|(?<=[.;:)]\n))([a-z_]\w*(?:, [a-z_]\w*)*): ", re.MULTILINE)
_OUTCOME = re.compile(r"(?<=[.)])\s(?=(?:Returns|Raises|Mutates|The arithmetic|Result and errors)\b)")


class Arguments(griffe.Extension):
    """Rewrites the docstrings of functions, classes and their methods."""

    def on_function(self, *, func, **kwargs):
        _rewrite(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls, **kwargs):
        made = cls.members.get("__init__")
        names = {parameter.name for parameter in made.parameters} if made is not None else set()
        _rewrite(cls, names | set(cls.members))


def _rewrite(thing, names):
    if thing.docstring is None:
        return
    paragraphs = thing.docstring.value.split("\n\n")
    thing.docstring.value = "\n\n".join(_paragraph(text, names) for text in paragraphs)


def _paragraph(text, names):
    known = names | {f"{name}_options" for name in names}
    starts = [m for m in _NAMES.finditer(text) if set(m[1].split(", ")) <= known]
    if not starts:
        return _OUTCOME.sub("\n\n", text)
    items = [text[: starts[0].start()].strip()]
    bounds = [*(m.start() for m in starts), len(text)]
    for m, end in zip(starts, bounds[1:], strict=True):
        words = ", ".join(f"`{name}`" for name in m[1].split(", "))
        said, *after = _OUTCOME.split(text[m.end() : end].strip(), maxsplit=1)
        items.append(f"- {words}: " + " ".join(said.split()))
        if after:
            items.append("\n" + _OUTCOME.sub("\n\n", after[0]) + "\n")
    return "\n".join(["\n".join(items[:1]), "", *items[1:]]).strip()
