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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is adjusted")
def test_freed_memory_is_reused():
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    environment.pop("LD_PRELOAD", None)
    run = [sys.executable, "-c", FAULTS]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # giving the pages of every output back would fault 46,000 times


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is adjusted")
def test_what_the_user_has_set_stays():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    environment.pop("LD_PRELOAD", None)
    run = [sys.executable, "-c", FAULTS]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 10000
