"""Every test that docs/coverage.md names exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = sorted(set(re.findall(r"`(tests/[\w/:.]+)`", (ROOT / "docs/coverage.md").read_text())))


def definition(body, name):
    kinds = (ast.FunctionDef, ast.ClassDef)
    found = [node for node in body if isinstance(node, kinds) and node.name == name]
    assert found, f"nothing is called {name}"
    return found[0].body


@pytest.mark.parametrize("named", NAMED)
def test_exists(named):
    file, *path = named.split("::")
    body = ast.parse((ROOT / file).read_text()).body
    for name in path:
        body = definition(body, name)


def test_every_row_names_a_test():
    for line in (ROOT / "docs/coverage.md").read_text().splitlines():
        if line.startswith("| ") and not line.endswith("| test |"):
            assert "`tests/" in line.split("|")[-2], line
