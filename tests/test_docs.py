"""The documents: their python blocks run, the paths and make targets that they name exist.

The blocks of one document run in order as one script, in an empty directory. A line before a block
may keep it out: `<!-- no-run: REASON -->` always, `<!-- needs: MODULE, MODULE -->` where one of
those is not installed.
"""

import fnmatch
import importlib.util
import os
import re
import runpy
from pathlib import Path

import pytest
import torch

import dynquant
import dynquant.compat

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(
    r"^(?:<!-- *(?P<mark>no-run|needs): *(?P<why>.*?) *-->\n+)?"
    r"```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
SPAN = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"[\w.*-]+(?:/[\w.*-]+)*/?")
SOURCE = re.compile(r".*\.(py|cpp|h|cu|cuh|md|toml|txt|cmake|yml|yaml|in)")
NOT_OURS = {"build", "dist", "bench"}  # what commands make


def of_each(documents):
    return pytest.mark.parametrize("document", documents, ids=[path.name for path in documents])


def is_installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a package that it would be in
        return False


def left_out(block):
    """Why a block does not run here, or None."""
    if block["mark"] == "no-run":
        return block["why"] or "no reason is given"
    if block["mark"] == "needs":
        modules = re.findall(r"[\w.]+", block["why"])
        missing = [name for name in modules if not is_installed(name)]
        if missing or not modules:
            return f"not installed: {', '.join(missing) or 'a module without a name'}"
    return None


def python_blocks(document):
    text = document.read_text()
    return text, [block for block in FENCE.finditer(text) if block["language"] == "python"]


def script(document):
    """The document with everything but the blocks that run blanked: lines keep their numbers."""
    text, blocks = python_blocks(document)
    lines = [""] * len(text.splitlines())
    for block in blocks:
        if left_out(block) is None:
            first = text.count("\n", 0, block.start("code"))
            code = block["code"].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines) + "\n"


def left_out_blocks():
    for document in DOCUMENTS:
        text, blocks = python_blocks(document)
        for block in blocks:
            if left_out(block) is not None:
                line = text.count("\n", 0, block.start("code"))
                yield pytest.param(left_out(block), id=f"{document.name}:{line}")


@pytest.fixture
def restored():
    """What documents may change for the whole process; they find nothing that tests compiled."""
    torch._dynamo.reset()
    isa, threads, state = dynquant.info()["isa"], torch.get_num_threads(), torch.get_rng_state()
    environment = dict(os.environ)
    yield
    dynquant.compat.uninstall()
    dynquant.set_isa(isa)
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.filterwarnings("ignore")  # torch announces the end of what migrating.md shows
def tables(document):
    """The tables of a document: the lines of each."""
    return re.findall(r"^\|.*\n(?:\|.*\n)+", document.read_text(encoding="utf-8"), re.MULTILINE)


@of_each(DOCUMENTS)
def test_rows_of_a_table_are_of_one_length(document):
    """A row of another table, with other columns, would tell wrong figures."""
    for table in tables(document):
        lengths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(lengths) == 1, f"{document.name}: {table.splitlines()[0]}"


@of_each([document for document in DOCUMENTS if script(document).strip()])
def test_python_blocks_run(document, tmp_path, monkeypatch, restored):
    path = tmp_path / f"{document.stem}.py"
    path.write_text(script(document))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")


@of_each(DOCUMENTS)
def test_no_block_is_overlooked(document):
    text = document.read_text()
    blocks = list(FENCE.finditer(text))
    assert len(re.findall("^ *```", text, re.MULTILINE)) == 2 * len(blocks), "a fence is not read"
    assert not {"py", "python3", "pycon"} & {block["language"] for block in blocks}


@pytest.mark.parametrize("reason", list(left_out_blocks()))
def test_left_out_block(reason):
    pytest.skip(reason)


def file_names():
    for _, below, files in os.walk(ROOT):
        below[:] = [
            name
            for name in below
            if name not in NOT_OURS and (name == ".github" or not name.startswith("."))
        ]
        yield from files


def named_paths(text):
    """Paths in backticks: below a folder of the repository, or the name of a source file."""
    for span in SPAN.findall(FENCE.sub("", text)):
        path = span.split("::")[0]
        if not PATH.fullmatch(path):
            continue
        top = path.split("/")[0]
        if ("/" in path and top not in NOT_OURS and (ROOT / top).is_dir()) or SOURCE.fullmatch(
            path
        ):
            yield path


@of_each(DOCUMENTS)
def test_paths_exist(document):
    text = document.read_text()
    for link in LINK.findall(text):
        if "://" not in link and not link.startswith("mailto:"):
            assert (document.parent / link).exists(), f"the link {link} leads nowhere"
    names = set(file_names())
    for path in named_paths(text):
        found = fnmatch.filter(names, path) or any(ROOT.glob(path.rstrip("/")))
        assert found, f"`{path}` is named, and does not exist"


@of_each(DOCUMENTS)
def test_make_targets_exist(document):
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = document.read_text()
    code = [block["code"] for block in FENCE.finditer(text)] + SPAN.findall(FENCE.sub("", text))
    for piece in code:
        for target in re.findall(r"^make ([\w-]+)", piece, re.MULTILINE):
            assert target in targets, f"make {target}: the Makefile has {', '.join(targets)}"
