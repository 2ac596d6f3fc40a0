"""What the compiled files export and ask for, read with nm."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import dynquant

PACKAGE = Path(dynquant.__file__).parent
ROOT = Path(__file__).parent.parent
# Of the sets; the emulator of a test is no kernel.
KERNEL_FILE = re.compile(r"(scalar|avx2|ymm_vnni|avx512vnni|amx(?!_set|_trap))\w*\.cpp\.o(bj)?")

needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")


def nm(path, *flags):
    done = subprocess.run(["nm", "-C", *flags, path], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line.strip()]


def libraries():
    return sorted(PACKAGE.glob("lib*.so"))


@pytest.fixture
def objects():
    found = (ROOT / "build").glob("cpython-*/CMakeFiles/**/*.o")  # not those of the sanitizers
    found = sorted(path for path in found if KERNEL_FILE.fullmatch(path.name))
    return found or pytest.skip(f"no kernel object files under {ROOT / 'build'}")


@needs_nm
def test_libraries_use_the_stable_abi_alone():
    """An at:: or c10:: symbol would tie the library to one version of torch."""
    assert PACKAGE / "libdynquant.so" in libraries()
    for library in libraries():
        lines = nm(library, "-D", "--undefined-only")
        assert len(lines) > 10, "nm shows no symbols"
        unstable = [line for line in lines if re.search(r"\b(at|c10|torch::autograd)::", line)]
        assert not unstable, f"{library.name} needs {unstable[:5]}"


@needs_nm
def test_libraries_need_libtorch_cpu_alone():
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    for library in libraries():
        done = subprocess.run(
            ["readelf", "-d", library], capture_output=True, text=True, check=True
        )
        needed = re.findall(r"NEEDED.*\[(.*?)\]", done.stdout)
        of_torch = {name for name in needed if re.match(r"lib(torch|c10|gomp|omp|iomp)", name)}
        assert of_torch <= {"libtorch_cpu.so"}, f"{library.name} needs {of_torch}"


@needs_nm
def test_kernel_files_define_their_table_alone(objects):
    """An inline function that leaked could replace one of the same name built for any machine."""
    for path in objects:
        symbols = [line.split(maxsplit=2) for line in nm(path, "--defined-only", "--extern-only")]
        names = [name for _, kind, name in symbols if kind in "TWVuDBRiS"]
        assert len(names) == 1, f"{path.name} defines {names}"
        assert re.match(r"dynquant::\w*(table|kernel|isa)", names[0]), f"{path.name}: {names}"


@needs_nm
def test_kernel_files_ask_for_nothing_of_the_standard_library(objects):
    for path in objects:
        wanted = [line.split()[-1] for line in nm(path, "--undefined-only")]
        foreign = [name for name in wanted if "std::" in name or "torch" in name]
        assert not foreign, f"{path.name} needs {foreign}"
