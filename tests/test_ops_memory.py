"""What the allocator keeps between calls."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
import dynquant

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

q, scale = torch.ops.dynquant.quantize_weight(torch.randn(1536, 384))
packed = torch.ops.dynquant.pack_weight(q)
x = torch.randn(512, 384)

def call():  # blocks of 3 MiB, some alive together
    kept = [torch.relu(torch.ops.dynquant.linear_dynamic(x, packed, scale)) for _ in range(3)]

for _ in range(10):  # until the heap has found its size
    call()
before = faults()
for _ in range(20):
    call()
print(faults() - before)
"""


# Whether a block of 31 MiB comes from pages of its own, which are given back when it is freed.
# Faults cannot show it for sure: the heap's end may happen to be held by something else.
OWN_PAGES = """
import ctypes
import torch
import dynquant

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_int) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo.restype = Info
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
q, scale = torch.ops.dynquant.quantize_weight(torch.randn(1536, 384))
packed = torch.ops.dynquant.pack_weight(q)
torch.ops.dynquant.linear_dynamic(torch.randn(512, 384), packed, scale)
before = libc.mallinfo().hblks
libc.malloc(31 << 20)
print(libc.mallinfo().hblks - before)
"""

SCRATCH = """
import torch
import dynquant
from pathlib import Path

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20

ops = torch.ops.dynquant
packed, scale = [], []
for n, k in ((4096, 8), (4096, 1024)):
    weight, one = ops.quantize_weight(torch.randn(n, k))
    packed.append(ops.pack_weight(weight))
    scale.append(one)

def call(batch):
    state = torch.zeros(batch, 1024)
    ops.lstm_dynamic.inference(
        torch.zeros(1, batch, 8), state, state, packed[0], scale[0], None, packed[1], scale[1], None
    )

call(64)
before = resident()
call(3000)
print(resident() - before)
"""

on_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is adjusted"
)


def printed(code, **variables):
    """What the code prints, in a process without settings of the allocator but these."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    environment.pop("LD_PRELOAD", None)
    run = [sys.executable, "-c", code]
    environment |= variables
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


@on_glibc
def test_freed_memory_is_reused():
    assert printed(FAULTS) < 1000  # giving the pages of every output back would fault 46,000 times


@on_glibc
def test_what_the_user_has_set_stays():
    assert printed(FAULTS, MALLOC_MMAP_THRESHOLD_="131072") > 10000


@on_glibc
def test_the_allocator_can_be_left_alone():
    assert printed(OWN_PAGES) == 0
    assert printed(OWN_PAGES, DYNQUANT_KEEP_MEMORY="0") == 1


def test_another_value_is_an_error():
    run = [sys.executable, "-c", "import dynquant"]
    environment = {**os.environ, "DYNQUANT_KEEP_MEMORY": "no"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert "DYNQUANT_KEEP_MEMORY=no is not supported; allowed: 0, 1" in done.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_a_large_call_gives_its_memory_back():
    # Its products alone are 94 MiB; glibc is told to keep nothing else.
    assert printed(SCRATCH, MALLOC_MMAP_THRESHOLD_="1048576", OMP_NUM_THREADS="1") < 24
