"""The files of dist/, where `make wheel` and `make sdist` have put any."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import dynquant

ROOT = Path(__file__).parent.parent
WHEELS = sorted((ROOT / "dist").glob("*.whl"))
SDISTS = sorted((ROOT / "dist").glob("*.tar.gz"))
OLDEST = (2, 28)  # of torch's own wheels


@pytest.fixture(params=WHEELS or [None], ids=lambda path: path and path.name)
def wheel(request):
    if request.param is None:
        pytest.skip("no wheel in dist/: make wheel builds them")
    return request.param


@pytest.fixture
def libraries(wheel, tmp_path):
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    return sorted(tmp_path.rglob("*.so*"))


def readelf(path, *flags):
    return subprocess.run(
        ["readelf", "-W", *flags, path], check=True, capture_output=True, text=True
    ).stdout


def test_wheel_runs_where_torch_runs(wheel):
    major, minor = re.search(r"manylinux_(\d+)_(\d+)_\w+\.whl$", wheel.name).groups()
    assert (int(major), int(minor)) <= OLDEST


def test_wheel_holds_the_package_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0].split("-")[0] for name in names}
    assert tops == {"dynquant"}, "torch's libraries, or others, were packed in"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    python = re.search(r"-cp(\d+)-", wheel.name)[1]
    modules = [name for name in names if name.startswith("dynquant/_C")]
    assert len(modules) == 1 and f"-{python}-" in modules[0], modules


def test_wheel_names_no_folder_of_the_builder(libraries):
    for library in libraries:
        paths = re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", readelf(library, "-d"))
        assert set(paths) <= {"$ORIGIN"}, library.name


def test_wheel_is_stripped(libraries):
    for library in libraries:
        sections = readelf(library, "-S")
        assert ".symtab" not in sections and ".debug_info" not in sections, library.name


def test_wheel_exports_no_symbol_of_others(libraries):
    """The stand-ins for younger glibc and libstdc++ must serve this library alone."""
    for library in libraries:
        for line in readelf(library, "--dyn-syms").splitlines():
            fields = line.split()
            if len(fields) == 8 and fields[4] == "GLOBAL" and fields[6] != "UND":
                assert not re.match(r"pthread_|_*libc_|_ZNSt15__exception_ptr|_ZSt", fields[7]), (
                    f"{library.name} exports {fields[7]}"
                )


def test_source_distribution_holds_what_is_compiled():
    if not SDISTS:
        pytest.skip("no source distribution in dist/: make sdist builds it")
    with tarfile.open(SDISTS[-1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(
        ["git", "ls-files", "csrc", "cmake", "tests", "tools", "dynquant", "*.txt", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    missing = set(listed.stdout.split()) - held
    assert not missing


def test_building_names_every_tool_that_is_missing():
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=ROOT,
        env={"PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    for remedy in ("pip install cmake", "pip install ninja", "apt install g++"):
        assert remedy in done.stderr


def test_changelog_begins_with_the_version():
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    first = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first[1] == project[1] == dynquant.__version__
