"""libdynquant_cuda where there is no GPU: it loads, says why it is off, and refuses clearly."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_arguments import CPU_ONLY, CUDA_OPS, OPS, valid_arguments

import dynquant

LIBRARY = Path(dynquant.__file__).with_name("libdynquant_cuda.so")
needs_library = pytest.mark.skipif(
    not LIBRARY.exists(), reason=f"dynquant was built without CUDA: {dynquant.info()['cuda']}"
)
OVERLOADS = [(name, "default") for name in CUDA_OPS] + [("linear_dynamic", "inference")]


def call_for_cuda(name, overload):
    """Calls the CUDA implementation, which then finds that its tensors are on the CPU."""
    values = valid_arguments()
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    op = getattr(getattr(torch.ops.dynquant, name), overload)
    return op.redispatch(keys, *(values[argument] for argument in OPS[name]))


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_info_says_why_cuda_is_off():
    reason = dynquant.info()["cuda"]
    assert reason.startswith("off: ") and len(reason) > 15, reason


@needs_library
def test_the_runtime_names_its_reason():
    """Asked without torch in between, which on a CPU build of it is the first reason."""
    code = """
from dynquant.ops import cuda
reason = cuda._library.dynquant_cuda_unavailable()
print("on" if reason is None else reason.decode())
"""
    answer = run_python(code).strip()
    assert answer == "on" if torch.cuda.is_available() else len(answer) > 5


@needs_library
def test_importing_starts_no_driver():
    """A process that has started CUDA cannot fork workers that use it."""
    code = """
import re
import dynquant
maps = open("/proc/self/maps").read()
print(sorted(set(re.findall(r"lib(?:cuda|nvidia-ml)\\.so", maps))))
"""
    assert run_python(code).strip() == "[]"


@needs_library
@pytest.mark.parametrize("name, overload", OVERLOADS)
def test_ops_with_a_cuda_implementation(name, overload):
    with pytest.raises(RuntimeError, match=f"{OPS[name][0]} must be on a CUDA device"):
        call_for_cuda(name, overload)


@needs_library
@pytest.mark.parametrize("name", CPU_ONLY)
def test_ops_without_one_say_so(name):
    with pytest.raises(NotImplementedError, match=f"dynquant::{name} has no CUDA kernel"):
        call_for_cuda(name, "default")


def test_without_the_library_every_op_says_so():
    code = """
import pathlib
exists = pathlib.Path.exists
pathlib.Path.exists = lambda self: self.name != "libdynquant_cuda.so" and exists(self)
import dynquant
pathlib.Path.exists = exists
from test_cuda_library import OVERLOADS, call_for_cuda
assert "DYNQUANT_CUDA=on" in dynquant.info()["cuda"]
for name, overload in OVERLOADS:
    try:
        call_for_cuda(name, overload)
    except NotImplementedError as error:
        assert name in str(error) and "DYNQUANT_CUDA=on" in str(error), error
    else:
        raise AssertionError(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@needs_library
def test_the_library_needs_no_driver_and_no_other_runtime():
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    done = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True)
    needed = re.findall(r"NEEDED.*\[(.*?)\]", done.stdout)
    assert needed, "readelf shows no dependencies"
    assert not [name for name in needed if re.match(r"lib(cuda|cudart|nv|torch_cuda|c10)", name)]


def ptx():
    """The PTX within the library, which is not compressed."""
    texts = re.findall(rb"\.version [\d.]+\s+\.target sm_\d+.*?\x00", LIBRARY.read_bytes(), re.S)
    return "\n".join(text.decode("ascii", "replace") for text in texts)


@needs_library
def test_the_arithmetic_is_ieee():
    """Nothing is contracted, approximated or flushed, and every operation names its rounding."""
    text = ptx()
    assert text.count(".entry") > 20, "no PTX was found"
    assert set(re.findall(r"\.target (sm_\d+)", text)) == {"sm_80"}
    used = set(
        re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z0-9_]+(?:\.[a-z0-9_]+)*\.f32[.\w]*)", text, re.M)
    )
    arithmetic = {
        name for name in used if re.match(r"(add|sub|mul|div|fma|mad|sqrt|rcp|ex2)\.", name)
    }
    assert arithmetic >= {"add.rn.f32", "mul.rn.f32", "div.rn.f32"}
    assert arithmetic <= {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32"}
    assert not [name for name in used if ".ftz" in name or ".approx" in name or ".sat" in name]


@needs_library
def test_machine_code_for_every_architecture():
    data = LIBRARY.read_bytes()
    for target in (b"sm_75", b"sm_80", b"sm_89", b"sm_90"):
        assert target in data, target.decode()
