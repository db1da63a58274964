"""The structure of id3_kernels: imports point downwards, and private members stay in their file."""

import ast
import re
from pathlib import Path

import pytest

import id3_kernels

PACKAGE = Path(id3_kernels.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
TORCHS_OWN = {"torch._subclasses"}  # of which torch has no public form


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(module: str) -> set[str]:
    """The modules of the package that `module` imports anywhere, inside functions and for types included."""
    path, found = MODULES[module], set()
    package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {s if (s := f"{source}.{alias.name}") in MODULES else source for alias in node.names}
    return (found & set(MODULES)) - {module}


def test_imports_have_no_circle():
    done, left = set(), set(MODULES)
    while free := {module for module in left if imports_of(module) <= done}:
        done |= free
        left -= free
    assert not left, f"a circle, or modules above one: {sorted(left)}"


@pytest.mark.parametrize(
    ("lower", "upper"), [("backend", "table"), ("backend", "ops"), ("table", "ops"), ("reference", "table")]
)
def test_imports_point_downwards(lower, upper):
    lower, upper = f"id3_kernels.{lower}", f"id3_kernels.{upper}"
    below = [module for module in MODULES if f"{module}.".startswith(f"{lower}.")]
    assert not any(upper in imports_of(module) for module in below)


def test_ops_reach_their_code_through_the_table():
    expected = {f"id3_kernels.{name}" for name in ("backend", "checks", "entries", "table", "reference")}
    assert imports_of("id3_kernels.ops") == expected


def private_reaches(code: str) -> list[str]:
    """Every `x._name` whose x is not self or cls and whose name the code itself does not define."""
    tree = ast.parse(code)
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    defined |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return [
        ast.unparse(n)
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute)
        and re.match(r"_(?!_)", n.attr)
        and n.attr not in defined
        and ast.unparse(n.value) not in ("self", "cls")
        and ast.unparse(n) not in TORCHS_OWN
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_members_stay_private(path):
    assert private_reaches(path.read_text()) == []


def test_a_private_reach_is_seen():
    assert private_reaches("import backend\nbackend._load('x')") == ["backend._load"]
    assert private_reaches("class A:\n    def f(self): self._x = other._y") == ["other._y"]
