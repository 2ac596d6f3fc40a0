"""The floors of the package: imports go downward, or stay on a floor."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dynquant"

# From the ground up. A folder is named for all of its files; what is not named is in front.
FLOORS = (
    {"_C", "whole_files"},
    {"ops", "qconfig"},
    {"nn", "observer", "stubs"},
    {"swap", "fused"},
)
FRONT = len(FLOORS)
FOLDERS_IN_FRONT = {"onnx", "transformers"}


def floor_of(part):
    return next((number for number, parts in enumerate(FLOORS) if part in parts), FRONT)


def imported(file):
    """The names of the modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "dynquant":
                names = [f"dynquant.{alias.name}" for alias in node.names]
        else:
            continue
        yield from names


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda one: one.name)
def test_imports_go_downward(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    names = [name.split(".") for name in imported(file)]
    parts = {path[1] for path in names if path[0] == "dynquant" and len(path) > 1}
    above = {part for part in parts if floor_of(part) > floor_of(own)}
    assert not above, f"{own} is on floor {floor_of(own)}, and imports what is above: {above}"
    assert not {path[0] for path in names} & {"benchmarks", "tests", "tools"}


def test_every_folder_has_a_floor():
    folders = {one.name for one in PACKAGE.iterdir() if (one / "__init__.py").exists()}
    assert all(floor_of(folder) < FRONT for folder in folders - FOLDERS_IN_FRONT), folders
