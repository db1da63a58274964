"""constraints.txt pins what pyproject.toml requires, for each Python, and names no place to load it from."""

import itertools
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
FOR_NVCC = {"nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-nvvm"}


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]


def applies(requirement: Requirement, python: str) -> bool:
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    return requirement.marker is None or requirement.marker.evaluate(environment)


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_has_one_version_that_satisfies_it(python):
    table = project()["project"]
    texts = [*table["dependencies"], *itertools.chain(*table["optional-dependencies"].values())]
    texts += project()["build-system"]["requires"]
    required = [Requirement(text) for text in texts]
    versions = {}
    for pin in filter(lambda pin: applies(pin, python), pins()):
        assert pin.name not in versions
        [specifier] = pin.specifier
        assert specifier.operator == "=="
        versions[pin.name] = specifier.version
    for requirement in required:
        if requirement.name not in ("torch", "id3-optim") and applies(requirement, python):
            assert versions[requirement.name] in requirement.specifier, requirement


def test_torch_and_its_cuda_packages_are_chosen_apart():
    names = {pin.name for pin in pins()}
    assert "torch" not in names
    assert {name for name in names if name.startswith(("cuda-", "nvidia-"))} == FOR_NVCC


def test_no_place_to_load_from():
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|^-|/|@|--", text, re.M)


def test_the_first_python_is_the_lowest_that_the_project_supports():
    assert project()["project"]["requires-python"] == f">={PYTHONS[0]}"
