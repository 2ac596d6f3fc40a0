"""Runs CMake with ninja; pyproject.toml holds everything else."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TOOLS = {
    "cmake": "cmake 3.18 or newer (apt install cmake, or pip install cmake)",
    "ninja": "ninja (pip install ninja)",
}
COMPILERS = ("c++", "g++", "clang++")  # that CMake looks for when CXX names none


def check_setuptools():
    """An older one, as a new environment of Python 3.11 holds it, cannot read pyproject.toml."""
    oldest = re.search(r"setuptools>=(\d+)", (ROOT / "pyproject.toml").read_text())[1]
    if int(setuptools.__version__.split(".")[0]) < int(oldest):
        sys.exit(
            f"dynquant is built by setuptools {oldest} or newer, and this environment has "
            f"{setuptools.__version__}: run pip install 'setuptools>={oldest}', or pip install "
            "without --no-build-isolation."
        )


def check_tools():
    missing = [what for tool, what in TOOLS.items() if shutil.which(tool) is None]
    if "CXX" not in os.environ and not any(map(shutil.which, COMPILERS)):
        missing.append("a C++17 compiler (apt install g++, or set CXX)")
    missing += [
        f"{module} (pip install {module})"
        for module in ("torch", "pybind11")
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        sys.exit(
            "dynquant is compiled when it is installed from source, and this machine lacks:\n  "
            + "\n  ".join(missing)
            + "\nInstall them, then run pip install --no-build-isolation . again."
        )


class CMakeBuild(build_ext):
    """Builds all targets at once into the package, for an editable install beside its sources."""

    def run(self):
        check_tools()
        target = ROOT / "dynquant" if self.inplace else Path(self.build_lib).resolve() / "dynquant"
        default = ROOT / "build" / sys.implementation.cache_tag
        build = Path(os.environ.get("DYNQUANT_BUILD_FOLDER", default))
        configure = [
            *("cmake", "-G", "Ninja", "-S", ROOT, "-B", build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DDYNQUANT_CUDA={os.environ.get('DYNQUANT_CUDA', 'auto')}",
            f"-DDYNQUANT_OLD_GLIBC={os.environ.get('DYNQUANT_OLD_GLIBC', 'off')}",
        ]
        for command in (configure, ["cmake", "--build", build], ["cmake", "--install", build]):
            subprocess.run(command, check=True)


check_setuptools()
setup(ext_modules=[Extension("dynquant._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
