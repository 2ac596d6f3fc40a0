"""The ops beside what else a process does: signals, torch's own matrix products, later threads.

Each of these could disturb a unit with state of its own, as AMX is; all run on any machine.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from compare import assert_all_same
from op_arguments import ALL_OPS, call, valid_call
from torch.utils import _pytree as pytree

SIZES = ({"m": (3,)}, {"m": (40,), "n": 70, "k": 130})


def arguments():
    return {(name, i): valid_call(name, **SIZES[i]) for name in ALL_OPS for i in (0, 1)}


def all_calls(given):
    return [one for (name, _), values in given.items() for one in leaves(name, values)]


def leaves(name, values):
    return pytree.tree_leaves(call(name, values))


def in_a_process(code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


SIGNALS = """
import ctypes, signal, sys

class Stack(ctypes.Structure):
    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

class AlternateStack:
    memory = ctypes.create_string_buffer(8192)  # SIGSTKSZ, as programs have it from old headers

    def use(self):
        libc = ctypes.CDLL(None, use_errno=True)
        stack = Stack(ctypes.addressof(self.memory), 0, len(self.memory))
        return libc.sigaltstack(ctypes.byref(stack), None) == 0

before = {before}
used = before and AlternateStack().use()
import dynquant
has_amx = "amx" in dynquant.info()["available"]
if not before:
    used = AlternateStack().use()
# With AMX the system saves more than such a stack holds, and refuses the one or the other.
assert used or has_amx
if before and used:
    assert not has_amx
from test_ops_shared_process import *
given = arguments()
expected = all_calls(given)

count = 0
def handler(number, frame):  # Python's own C function, on the alternate stack, calls for this one
    global count
    count += 1
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 1e-3, 3e-4)
for _ in range(400):
    assert_all_same(all_calls(given), expected)
    if count > 200:
        break
signal.setitimer(signal.ITIMER_REAL, 0)
assert count > 200, count
"""


@pytest.mark.skipif(sys.platform != "linux", reason="sigaltstack as Linux has it")
@pytest.mark.parametrize("before", [True, False], ids=["before import", "after import"])
def test_signals_on_a_small_alternate_stack(before):
    in_a_process(SIGNALS.replace("{before}", str(before)))


def test_alternating_with_products_of_torch(isa):
    """oneDNN's own use of AMX, in the same threads: neither changes the other's results."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(96, 256, generator=generator).bfloat16() for _ in range(2))
    integers, scale = torch.ops.dynquant.quantize_weight(weight)
    packed = torch.ops.dynquant.pack_weight(integers)

    def both():
        return [torch.ops.dynquant.linear_dynamic(x, packed, scale), x @ weight.T]

    expected = both()

    def alternate(_):
        torch.set_num_threads(2)
        for _ in range(10):
            assert_all_same(both(), expected)

    before = torch.get_num_threads()
    alternate(0)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(alternate, range(4)))
    torch.set_num_threads(before)


LATER = """
import dynquant
import torch
torch.set_num_threads(1)
from test_ops_shared_process import *
generator = torch.Generator().manual_seed(0)
x, weight = torch.randn(512, 512, generator=generator), torch.randn(512, 512, generator=generator)
packed = torch.ops.dynquant.pack_weight(torch.ops.dynquant.quantize_weight(weight)[0])
given, scale = arguments(), torch.ones(512)
expected = all_calls(given), torch.ops.dynquant.linear_dynamic(x, packed, scale)
for count in (3, 2, 5):
    torch.set_num_threads(count)
    assert_all_same(all_calls(given), expected[0])
    assert_all_same([torch.ops.dynquant.linear_dynamic(x, packed, scale)], expected[1:])
"""


def test_threads_that_torch_makes_later():
    """The permission for AMX, asked for by one thread, holds for those that come after it."""
    in_a_process(LATER)
