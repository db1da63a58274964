"""Comments, docstrings, errors and pages keep the rules of CONTRIBUTING.md, "Prose".

Files are collected, not listed. A failure names the line and what to write in place of the word.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pages
import pytest

ROOT = pages.ROOT
PYTHON = sorted(
    path
    for folder in ("python", "id3_kernels", "benchmarks", "examples", "docs/site")
    for path in (ROOT / folder).rglob("*.py")
)
NATIVE = sorted(
    path
    for folder in ("csrc", "benchmarks")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".h", ".cpp", ".cu", ".cuh")
)
RAISING = [path for path in PYTHON if path.relative_to(ROOT).parts[0] in ("python", "id3_kernels")]

# Each word: what to write. Programs have no persons in them, and a reader has no other file at hand.
BANNED = {
    r"can not": "cannot",
    r"(?:no|some|any|every)body|(?:some|any|every)one|no one|who|whoever|whom": "the part that acts",
    r"wish(?:es|ed)?": "requested",
    r"ask(?:s|ed|ing)?": "reads, requests, needs, calls",
    r"wants?": "needs, takes",
    r"minds?": "what changes, and when",
    r"told": "given, set, passed",
    r"others": "the noun: the other entries, the other ranks",
    r"as above|see above|as below": "the name of what it repeats",
    r"as ever": "unchanged",
    r"makes? (?:no )?sense": "the reason",
}
WORD = {re.compile(rf"\b(?:{word})\b", re.IGNORECASE): instead for word, instead in BANNED.items()}


def prose_of_python(source: str):
    """(line, text) of every comment, every docstring and every string in a `raise`."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                for i, line in enumerate(text.splitlines()):
                    yield node.body[0].lineno + i, line
        if isinstance(node, ast.Raise) and node.exc is not None:
            for part in ast.walk(node.exc):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.lineno, part.value


def prose_of_native(source: str):
    """(line, text) of every comment of C++ or CUDA. Strings hold no `//` here but in links."""
    for i, line in enumerate(source.splitlines(), 1):
        found = re.search(r"(?<!:)//(.*)$|/\*(.*?)\*/", line)
        if found:
            yield i, found[0]


def prose_of_page(text: str):
    fenced = False
    for i, line in enumerate(text.splitlines(), 1):
        fenced ^= line.startswith("```")
        if not fenced:
            yield i, line


def prose(path: Path):
    text = path.read_text()
    read = {".py": prose_of_python, ".md": prose_of_page}.get(path.suffix, prose_of_native)
    return read(text)


def banned(lines):
    """Violations as text. Code in backticks is no prose."""
    for number, line in lines:
        plain = re.sub(r"`[^`\n]*`", "code", line)
        for word, instead in WORD.items():
            if found := word.search(plain):
                yield f"line {number}: {found[0]!r} (write: {instead}) in: {line.strip()}"


ALL = [*PYTHON, *NATIVE, *pages.PAGES]


@pytest.mark.parametrize("path", ALL, ids=[str(path.relative_to(ROOT)) for path in ALL])
def test_no_banned_word(path):
    assert list(banned(prose(path))) == []


def test_the_search_for_words_finds_them():
    source = '"""A mask that nobody asked for."""\nx = "nobody"  # can not\nraise ValueError(f"{x}: told")\n'
    found = [text.split("'")[1] for text in banned(prose_of_python(source))]
    assert sorted(found) == ["asked", "can not", "nobody", "told"]
    assert [n for n, _ in prose_of_native("int x;  // one\n/* two */\n\nf();\n")] == [1, 2]
    assert not list(banned([(1, "the task masks `ask`, reminds and cannot")]))
    assert len(PYTHON) > 50 and len(NATIVE) > 20 and len(RAISING) > 40


# --- errors --------------------------------------------------------------------------------------------

# `argument: expected X, got VALUE`, then perhaps a remedy; `argument: needs X`, `argument: does not apply to
# X: reason` for arguments that exclude each other. The argument may be several (`params[3]`, `heuristic
# Fisher`, `a: b`).
SUBJECT = r"[\w{}.\[\]' ()/-]+(?:: ?[\w{}.\[\]']+){0,2}"
FORMS = (
    rf"{SUBJECT}: expected (?:.|\n)+[,:;] (?:but )?got \S(?:.|\n)*",
    rf"{SUBJECT}: (?:\{{\}} )?needs \S(?:.|\n)*",
    r"[{}.: ]+",  # another error's own text, with what it concerns
    rf"{SUBJECT}: (?:\{{\}} )?does not apply to \S.*: \S(?:.|\n)*",
)
ERRORS = ("ValueError", "TypeError", "DeltaError")


def template(node: ast.expr) -> str | None:
    """The text of a string, `{}` for each value in it; None for what is no string literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = template(node.left), template(node.right)
        return (left or "{}") + (right or "{}")
    return None


def ill_formed(source: str):
    """Raised errors whose message has none of the forms, as text."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        kind = node.exc.func.id if isinstance(node.exc.func, ast.Name) else ""
        message = template(node.exc.args[0]) if kind in ERRORS else None
        if message is not None and not any(re.fullmatch(form, message) for form in FORMS):
            yield f"line {node.lineno}: {message}"


@pytest.mark.parametrize("path", RAISING, ids=[str(path.relative_to(ROOT)) for path in RAISING])
def test_errors_name_the_argument_what_was_expected_and_what_came(path):
    assert list(ill_formed(path.read_text())) == []


@pytest.mark.parametrize(
    "message",
    [
        'f"lr: expected a number, got {lr!r}"',
        'f"param_groups[{i}]: eps: expected a number >= 0, got {eps}; use 1e-8"',
        'f"{name}: expected {p.dtype} as its parameter, " f"got {g.dtype}"',
        '"select_from: needs release_gradients=True"',
        'f"{name}: does not apply to ID3AdamW: {reason}"',
        "message",
    ],
)
def test_these_errors_have_a_form(message):
    assert list(ill_formed(f"raise ValueError({message})")) == []


@pytest.mark.parametrize(
    "message",
    [
        '"expected a number, got 3"',
        'f"lr: out of range: {lr}"',
        'f"lr: expected a number"',
        'f"lr: got {lr}"',
        'f"strategy: makes no sense with {kind}"',
        '"amsgrad: does not apply to ID3AdamW"',
    ],
)
def test_these_errors_have_none(message):
    assert len(list(ill_formed(f"raise TypeError({message})"))) == 1
