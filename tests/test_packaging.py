"""What users install: the sdist holds the source tree, the wheel its packages, and the wheel works alone.

One chain, as a release takes it: tree -> sdist -> wheel -> an environment of the wheel and its requirements.
The wheel takes the C++ extension of this environment, so that nothing is compiled.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from id3_kernels import extension

ROOT = Path(__file__).parents[1]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
TORCH_MINOR = ".".join(torch.__version__.split(".")[:2])
PACKAGES = {"id3_kernels/": "id3_kernels/", "python/id3_optim/": "id3_optim/"}  # folder -> place in a wheel
NOT_IN_AN_SDIST = {".gitignore"}

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs git's list of the source files")


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command without this environment's settings of Python, and without a network for pip."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ID3_", "TRITON_"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"ID3_CUDA": "0", "PIP_NO_INDEX": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def source_files() -> set[str]:
    """Paths that git tracks or would add."""
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).stdout
    return {path for path in listing.split("\0") if path and (ROOT / path).is_file()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Built in a copy of the tree, by the build backend alone."""
    tree = tmp_path_factory.mktemp("tree")
    for path in source_files():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, tree / path)
    run(sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('dist')", cwd=tree)
    return next((tree / "dist").glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """Built from the unpacked sdist, with the extension in the place of a compiled one."""
    built = importlib.util.find_spec("id3_kernels._C")
    if built is None:
        pytest.skip("needs the C++ extension")
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    tree = folder / sdist.name.removesuffix(".tar.gz")
    compiled = tree / f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/id3_kernels"
    compiled.mkdir(parents=True)
    shutil.copyfile(built.origin, compiled / Path(built.origin).name)
    run(sys.executable, "setup.py", "build_py", "bdist_wheel", "--skip-build", "-d", folder, cwd=tree)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """bin/ of an environment with the wheel and, as links, the packages that it requires without extras."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=False)
    bin_folder = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = bin_folder / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder)
    (folder / "required").mkdir()
    for entry in required_by(wheel):
        (folder / "required" / entry.name).symlink_to(entry)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code, cwd=folder).stdout.strip())
    (site / "required.pth").write_text(str(folder / "required"))
    return bin_folder


def required_by(wheel: Path) -> set[Path]:
    """Where this environment has the packages that the wheel requires, and what these require in turn."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    waiting = re.findall(r"^Requires-Dist: (.+)$", text, re.M)
    entries, seen = set(), set()
    while waiting:
        requirement = Requirement(waiting.pop())
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name in seen or not applies:
            continue
        seen.add(requirement.name)
        distribution = importlib.metadata.distribution(requirement.name)
        waiting += distribution.requires or []
        tops = {Path(str(file)).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        entries |= {Path(str(distribution.locate_file(top))) for top in tops}
    return entries


def test_the_sdist_holds_the_source_tree(sdist):
    with tarfile.open(sdist) as archive:
        names = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    generated = {n for n in names if n in ("PKG-INFO", "setup.cfg") or ".egg-info/" in n}
    assert sdist.name == f"id3_optim-{VERSION}.tar.gz"  # sources are for every torch
    assert names - generated == source_files() - NOT_IN_AN_SDIST


def test_the_wheel_holds_the_packages_and_the_extension(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {n for n in names if n.startswith(f"id3_optim-{VERSION}+torch{TORCH_MINOR}.dist-info/")}
    extensions = {n for n in names if re.fullmatch(r"id3_kernels/_C\..*(so|pyd)", n)}
    sources = {
        place + path.removeprefix(folder)
        for path in source_files()
        for folder, place in PACKAGES.items()
        if path.startswith(folder)
    }
    assert len(extensions) == 1 and len(sources) > 50
    assert names - metadata - extensions == sources


def test_the_wheel_names_its_torch(wheel):
    assert wheel.name.startswith(f"id3_optim-{VERSION}+torch{TORCH_MINOR}-cp{sys.version_info.major}")


SMOKE = """
import contextlib, importlib.metadata, io, json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import id3_kernels
import torch
from id3_optim import ID3AdamW
model = torch.nn.Linear(64, 8)
optimizer = ID3AdamW(model.named_parameters(), lr=1e-2, budget=90, total_steps=3)
for _ in range(3):
    model(torch.randn(4, 64)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
said = [str(w.message) for w in caught if "id3_kernels" in str(w.message)]
[script] = importlib.metadata.entry_points(group="console_scripts", name="id3-optim")
with contextlib.redirect_stdout(io.StringIO()) as env:
    script.load()(["env"])
seen = {"file": id3_kernels.__file__, "said": said, "active": optimizer.n_active}
print(json.dumps(seen | {"env": env.getvalue().splitlines()}))
"""


def smoke(clean: Path, **environment: str) -> dict:
    return json.loads(run(clean / "python", "-c", SMOKE, cwd=clean, **environment).stdout)


def test_the_wheel_works_in_a_clean_environment(clean):
    seen = smoke(clean)
    assert Path(seen["file"]).is_relative_to(clean.parent)
    assert (seen["said"], seen["active"]) == ([], 90)
    assert f"id3-optim {VERSION}+torch{TORCH_MINOR}" in seen["env"]
    assert "backend cpu: available" in seen["env"]
    assert "delta" in run(clean / "id3-optim", "--help", cwd=clean).stdout


def test_an_extension_for_another_torch_is_not_loaded(clean, tmp_path):
    """The same file, but for the release in it: what loads here must be left alone all the same."""
    binary = moved_extension(clean, tmp_path)
    release = extension.built_for(binary)
    assert release.startswith(TORCH_MINOR + ".")
    other = f"1{release[1:]}"
    mark = "built for torch "
    binary.write_bytes(binary.read_bytes().replace((mark + release).encode(), (mark + other).encode()))
    reason = f"the C++ extension is built for torch {other}, this is torch {torch.__version__}"
    assert_runs_without(clean, tmp_path, reason)


def test_an_extension_that_does_not_load_is_reported(clean, tmp_path):
    moved_extension(clean, tmp_path).write_bytes(b"not a library")
    assert_runs_without(clean, tmp_path, "the C++ extension does not load (")


def moved_extension(clean: Path, folder: Path) -> Path:
    """Copies the installed kernels into `folder`; returns the path of the extension there."""
    installed = next(clean.parent.rglob("id3_kernels/__init__.py")).parent
    shutil.copytree(installed, folder / "id3_kernels")
    return next((folder / "id3_kernels").glob("_C.*"))


def assert_runs_without(clean: Path, folder: Path, reason: str) -> None:
    """With the kernels of `folder`, a warning and `env` give `reason` in a line each, and steps are taken."""
    seen = smoke(clean, PYTHONPATH=str(folder))
    assert Path(seen["file"]).is_relative_to(folder) and seen["active"] == 90
    [line] = seen["said"]
    assert line.startswith(f"id3_kernels: {reason}") and "\n" not in line
    assert line.endswith(": CPU tensors take the pure-Python backend")
    assert any(line.startswith(f"backend cpu: {reason}") for line in seen["env"])
