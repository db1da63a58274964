"""The patch for transformers applies to the installed release, and its own tests pass on the result."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", reason="the patch is for the extra `hf`")

ROOT = Path(__file__).parent.parent
PATCH = ROOT / "docs/upstream/transformers.patch"
RELEASE = "5.24.0"

pytestmark = [
    pytest.mark.skipif(transformers.__version__ != RELEASE, reason=f"the patch is against {RELEASE}"),
    pytest.mark.skipif(shutil.which("git") is None, reason="needs git apply"),
]


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A tree with src/transformers: links to the installed files, copies of those that the patch changes."""
    tree = tmp_path_factory.mktemp("transformers")
    installed, source = Path(transformers.__file__).parent, tree / "src/transformers"
    (source / "utils").mkdir(parents=True)
    for folder in (".", "utils"):
        for path in (installed / folder).iterdir():
            if path.name != "utils" or folder == "utils":
                (source / folder / path.name).symlink_to(path)
    lines = PATCH.read_text().splitlines()
    for name in [line.removeprefix("--- a/") for line in lines if line.startswith("--- a/")]:
        link = tree / name
        original = link.resolve()
        link.unlink()
        shutil.copy(original, link)
    # Outside any repository: git would read the paths from that one's root.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    command = ["git", "apply", "--verbose", str(PATCH)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tree


def test_the_tests_of_the_patch_pass(patched):
    places = [str(patched / "src"), str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, "-m", "unittest", "-v", "tests.trainer.test_trainer_id3"]
    done = subprocess.run(command, cwd=patched, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Ran 3 tests" in done.stderr, done.stderr[-3000:]
    assert "skipped" not in done.stderr


def test_without_the_package_the_message_says_what_to_install(patched):
    program = """
import sys
sys.modules["id3_optim"] = None
from transformers import Trainer, TrainingArguments
import transformers
assert "/src/transformers/" in transformers.__file__
args = TrainingArguments("run", optim="id3_adamw", optim_args="budget=1", use_cpu=True)
from transformers import trainer_optimizer
trainer_optimizer.is_id3_optim_available = lambda: False
try:
    Trainer.get_optimizer_cls_and_kwargs(args)
except ImportError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(patched / "src")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=patched, env=environment, capture_output=True, text=True
    )
    assert "pip install id3-optim" in done.stdout, done.stderr[-2000:]
