"""Runs the op tests on a wheel as a user would have it: python tools/try_wheel.py --help

Each wheel goes into a virtual environment of its own with one torch after another. The tests run
from a copy outside this folder, so that nothing but the wheel can be imported, and without a
compiler: PATH holds the environment alone.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from interpreters import interpreters

ROOT = Path(__file__).resolve().parent.parent
PIN = (ROOT / "constraints.txt").read_text().strip().removeprefix("torch==")
FACTS = """
import dynquant, json, torch, torch.version
info = dynquant.info()
print(json.dumps([torch.__version__, torch.version.cuda, info["isa"], dynquant.__file__]))
"""


def python_of(wheel):
    major, minor = re.search(r"-cp(\d)(\d+)-", wheel.name).groups()
    return f"{major}.{minor}"


def run(command, **options):
    subprocess.run([str(part) for part in command], check=True, **options)


def try_in(folder, wheel, torch, tests):
    """Installs that torch and the wheel, runs the tests; one line for the table."""
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "-q", f"torch=={torch}", "numpy", "pytest", "hypothesis"])
    run([python, "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", wheel])
    with tempfile.TemporaryDirectory() as outside:
        environment = {"PATH": str(folder / "bin"), "HOME": outside, "OMP_NUM_THREADS": "2"}
        for tool in ("cc", "c++", "gcc", "g++", "clang", "nvcc"):
            assert shutil.which(tool, path=environment["PATH"]) is None, f"{tool} is on the PATH"
        shutil.copytree(ROOT / "tests", Path(outside) / "tests")
        facts = subprocess.run(
            [python, "-c", FACTS],
            cwd=outside,
            env=environment,
            capture_output=True,
            text=True,
        )
        if facts.returncode != 0:
            return f"torch {torch}: import fails:\n{facts.stderr[-2000:]}"
        version, cuda, isa, where = json.loads(facts.stdout)
        assert Path(where).is_relative_to(folder), f"dynquant is imported from {where}"
        done = subprocess.run(
            [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", "-rs", *tests],
            cwd=Path(outside) / "tests",
            env=environment,
            capture_output=True,
            text=True,
        )
        what = f"torch {version} ({'CUDA ' + cuda if cuda else 'CPU'}), {isa}"
        if done.returncode != 0:
            return f"{what}: FAILED\n{done.stdout[-4000:]}"
        skips = re.findall(r"^SKIPPED \[\d+\] [^ ]+: (.*)$", done.stdout, re.MULTILINE)
        reasons = [f"skipped: {reason}" for reason in sorted(set(skips))]
        return "\n  ".join([f"{what}: {done.stdout.splitlines()[-1]}", *reasons])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", nargs="*", type=Path, help="default: all in dist/")
    parser.add_argument("--torch", nargs="+", default=[PIN], help=f"versions; default: {PIN}")
    parser.add_argument("--tests", nargs="+", help="files of tests/; default: test_ops_*.py")
    chosen = parser.parse_args()
    wheels = chosen.wheels or sorted((ROOT / "dist").glob("*.whl"))
    if not wheels:
        parser.error("there is no wheel in dist/: make wheel builds them")
    tests = chosen.tests or sorted(path.name for path in (ROOT / "tests").glob("test_ops_*.py"))
    failed = False
    for wheel in wheels:
        interpreter = interpreters().get(python_of(wheel))
        if interpreter is None:
            print(f"{wheel.name}: skipped, this machine has no Python {python_of(wheel)}")
            continue
        print(wheel.name, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            run([interpreter, "-m", "venv", folder])
            for torch in chosen.torch:
                line = try_in(Path(folder).resolve(), wheel.resolve(), torch, tests)
                failed |= "FAILED" in line or "import fails" in line
                print(line, flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
