"""The rules of the house that a machine can check: reaches, circles, sizes, and the path of a step."""

import ast
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PACKAGES = {"id3_kernels": ROOT / "id3_kernels", "id3_optim": ROOT / "python" / "id3_optim"}
# torch says these things in no public way: the graph task and the engine's callbacks, for `step/passes.py`;
# what a pass reaches, who watches a gradient and what is a view, for `backward/`; the check of a loss scaler;
# fake tensors; how autograd's own functions and modules keep their parts. Python: how a process ends early.
FOREIGN = {
    "_C", "_current_graph_task_id", "_execution_engine", "_amp_foreach_non_finite_check_and_unscale_",
    "_functorch", "_will_engine_execute_node", "_autograd", "_get_current_graph_task_keep_graph", "_is_view",
    "_base", "_unsafe_view", "_backward_hooks", "_post_accumulate_grad_hooks", "_subclasses", "_nnz",
    "_modules", "_getframe", "_replace", "_fields", "_asdict", "_exit", "_run_exitfuncs",
    "_n_gpu",
}  # fmt: skip


def sources(*suffixes):
    """The project's own files, as the tree holds them: not what a build or a run has left."""
    left = {"build", "dist", "runs", "site", ".git"}
    files = {path: path.relative_to(ROOT).parts for suffix in suffixes for path in ROOT.rglob(f"*{suffix}")}
    return sorted(path for path, parts in files.items() if not left & set(parts) and parts[0][:5] != ".venv")


def modules():
    """Dotted name -> (path, tree) of every module of both packages."""
    found = {}
    for package, root in PACKAGES.items():
        for path in sorted(root.rglob("*.py")):
            parts = [package, *path.relative_to(root).with_suffix("").parts]
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path, ast.parse(path.read_text())
    return found


def private(name):
    return name.startswith("_") and not name.endswith("__")


def own_names(tree):
    """The private names that a file itself defines: functions, classes, variables and attributes of self."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def reaches(tree):
    """(line, name) of each private member of an object or module that the file does not define."""
    own = own_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own | FOREIGN:
            yield node.lineno, node.attr
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] != "torch":
            yield from ((node.lineno, alias.name) for alias in node.names if private(alias.name))


def test_no_module_reaches_into_another_ones_private_members():
    found = [
        f"{name}:{line} {member}" for name, (_, tree) in modules().items() for line, member in reaches(tree)
    ]
    assert not found, found


@pytest.mark.parametrize("line", ["optimizer._shards", "from .state import _cut", "x = backend._load('_C')"])
def test_a_reach_is_found(line):
    assert list(reaches(ast.parse(line)))


def imports(name, path, tree, known):
    """The modules of both packages that a module imports, inside functions and for type checkers too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            target = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                full = f"{target}.{alias.name}"
                if full in known:
                    yield full
                elif target in known:
                    yield target


def circles(graph):
    """The sets of modules of which each reaches each other one."""
    reached = {name: set(graph[name]) for name in graph}
    for middle in graph:
        for name in graph:
            if middle in reached[name]:
                reached[name] |= reached[middle]
    return sorted(
        {
            frozenset(n for n in reached[name] if name in reached[n])
            for name in graph
            if name in reached[name]
        },
        key=sorted,
    )


def test_no_import_circles():
    known = modules()
    graph = {name: set(imports(name, path, tree, known)) - {name} for name, (path, tree) in known.items()}
    assert sum(map(len, graph.values())) > 100  # imports are seen at all
    assert not circles(graph), [sorted(circle) for circle in circles(graph)]


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [frozenset("abc")]


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ("id3_kernels", "id3_optim"),
        ("id3_kernels.backend", "id3_kernels.table"),
        ("id3_kernels.reference", "id3_kernels.table"),
        ("id3_kernels.table", "id3_kernels.ops"),
        ("id3_optim.state", "id3_optim.step"),
        ("id3_optim.step", "id3_optim.unmasking"),
        ("id3_optim.unmasking", "id3_optim.optimizer"),
    ],
)
def test_imports_point_downwards(lower, upper):
    known = modules()
    for name, (path, tree) in known.items():
        if f"{name}.".startswith(f"{lower}."):
            above = [
                target for target in imports(name, path, tree, known) if f"{target}.".startswith(f"{upper}.")
            ]
            assert not above, (name, above)


def body_lines(function):
    """The lines of a function without its docstring and decorators."""
    first = function.body[0]
    docstring = ast.get_docstring(function) is not None
    return (
        function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if docstring else 0)
    )


def test_functions_and_files_stay_small():
    long = []
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and body_lines(node) > 40:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {body_lines(node)} lines")
    for path in sources(".py", ".cpp", ".cu", ".h"):
        n = len(path.read_text().splitlines())
        if n > 300:
            long.append(f"{path.relative_to(ROOT)}: {n} lines")
    assert not long, "\n".join(long)


def test_following_a_step_enters_few_files():
    """What somebody reads who follows `step()` from the optimizer to the kernel, each function once."""
    import id3_optim

    param = torch.nn.Parameter(torch.randn(64, 64))
    optimizer = id3_optim.ID3AdamW([param], budget=100, total_steps=10, max_grad_norm=1.0)
    home, seen, files = str(PACKAGES["id3_optim"]), set(), []

    def follow(frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(home) and code not in seen:
            seen.add(code)
            if not files or files[-1] != code.co_filename:
                files.append(code.co_filename)

    for _ in range(2):
        param.grad = torch.randn(64, 64)
        optimizer.step()
    param.grad = torch.randn(64, 64)
    sys.setprofile(follow)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    returns = len(files) - len(set(files))
    names = [str(Path(f).relative_to(home)) for f in files]
    assert len(files) <= 14 and returns <= 5, names
