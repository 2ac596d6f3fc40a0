"""docs/ops.md has every op with its schema."""

import re
from pathlib import Path

import torch

import dynquant  # noqa: F401

TEXT = (Path(__file__).parent.parent / "docs/ops.md").read_text()


def operators():
    schemas = torch._C._jit_get_all_schemas()
    return {
        schema.name.partition("::")[2]: schema
        for schema in schemas
        if schema.name.startswith("dynquant::") and not schema.overload_name
    }


def test_every_op_and_its_schema():
    parts = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    sections = {part.partition("\n")[0]: part for part in parts}
    ops = operators()
    assert sections.keys() == ops.keys()
    for name, section in sections.items():
        shown = re.search(r"```\n(.*?)```", section, re.DOTALL)[1]
        assert " ".join(shown.split()) == str(ops[name]).removeprefix("dynquant::"), name
        assert "```python" in section, name
