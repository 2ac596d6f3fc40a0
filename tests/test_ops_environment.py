"""The bits do not depend on threads, on the floating-point state, or on who else calls."""

import ctypes
import ctypes.util
import itertools
import math
import platform
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_all_same
from drawn import DTYPES, ROWS, rows_of
from op_arguments import ALL_OPS, call, valid_call
from test_docs_ops import operators
from torch.utils import _pytree as pytree

ops = torch.ops.dynquant
FE_TONEAREST, FE_DOWNWARD, FE_UPWARD, FE_TOWARDZERO = 0, 0x400, 0x800, 0xC00
on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="reads the MXCSR register of x86"
)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def flushed_subnormals():
    assert torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


libm = ctypes.CDLL(ctypes.util.find_library("m"))


@contextmanager
def rounding(mode):
    before = libm.fegetround()
    assert libm.fesetround(mode) == 0
    try:
        yield
    finally:
        libm.fesetround(before)


def control_of_mxcsr():
    """The rounding mode, flush-to-zero and the exception masks; not the flags of past events."""
    environment = ctypes.create_string_buffer(64)
    assert libm.fegetenv(environment) == 0
    return struct.unpack_from("<I", environment, 28)[0] & 0xFFC0


def inputs(m=64, n=520, k=260, dtype=torch.float32):
    rng = np.random.default_rng(0)
    weight = torch.from_numpy(rng.integers(-127, 128, (n, k), dtype=np.int8))
    magnitudes = rng.choice([1e-2, 1e-38, 1e-42], n) * rng.uniform(0.5, 2, n)
    return {
        "x": rows_of(rng, m, k, tuple(ROWS)).to(dtype),
        "finite": rows_of(rng, m, k, ("normal", "subnormal", "any magnitude")).to(dtype),
        "weight": rows_of(rng, n, k, ("normal", "subnormal", "ties")).to(dtype),
        "packed": ops.pack_weight(weight),
        "scale": torch.from_numpy(magnitudes.astype(np.float32)),
        "bias": torch.from_numpy((rng.standard_normal(n) * magnitudes).astype(np.float32)),
        "n": n,
    }


def everything(given):
    """The result of every op: what must not change."""
    x, packed, scale, bias = (given[name] for name in ("x", "packed", "scale", "bias"))
    results = [*ops.quantize_weight(given["weight"]), *ops.quantize_weight(given["weight"], False)]
    for values, per_token in ((x, True), (given["finite"], False)):
        for symmetric in (False, True):
            q, row_scale, zero = ops.quantize_activation(values, per_token, symmetric)
            acc = ops.int_mm(q, zero, packed, given["n"])
            results += [q, row_scale, zero, acc]
            results += ops.choose_qparams(values, per_token, symmetric)
            results.append(ops.quantize_with(values, row_scale, zero, symmetric))
            results.append(ops.rescale(acc, row_scale, scale, bias, x.dtype))
            results.append(ops.scaled_mm(q, row_scale, zero, packed, scale, bias, x.dtype))
            results.append(ops.linear_dynamic(values, packed, scale, bias, per_token, symmetric))
    results.append(ops.linear_dynamic(x[:1], packed, scale, bias))
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 64])
def test_thread_counts(isa, m, dtype):
    given = inputs(m, dtype=dtype)
    with threads(1):
        expected = everything(given)
    for count in (2, 3):
        with threads(count):
            assert_all_same(everything(given), expected, f"{count} threads")


SMALL = {"m": (3,), "n": 5, "k": 7}
LARGE = {"m": (64,), "n": 8, "k": 1030}  # more than one thread's work
TINY = ("subnormal", "scale near the least", "symmetric scale near the least")
KINDS = (("normal", "ties"), TINY, ("any magnitude", "small", "zero"))
SCHEMES = (
    {},
    {"per_token": False, "per_channel": False, "mode": 1},
    {"symmetric": True, "zero_point": None, "relu": True, "reverse": True},
)


def awkward(name, sizes, kinds, scheme, dtype):
    """A valid call of the op, with values whose last bits show how they were computed."""
    values = valid_call(name, **sizes, dtype=dtype) | scheme
    if values.get("zero_point", 0) is None:
        values["zero_point"] = torch.zeros(sizes["m"], dtype=torch.int32)
    rng = np.random.default_rng(0)
    for argument in ALL_OPS[name]:
        value = values[argument]
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            continue
        if argument.startswith(("scale", "weight_scale", "qparams", "bias")):
            magnitudes = torch.from_numpy(rng.choice([1e-2, 1e-38, 1e-42], value.shape))
            values[argument] = (value * magnitudes).to(value.dtype)
        else:
            rows = rows_of(rng, math.prod(value.shape[:-1]), value.shape[-1], kinds)
            values[argument] = rows.reshape(value.shape).clamp(-6e4, 6e4).to(value.dtype)
    return values


def calls(dtype):
    """(op, values, numbers of threads): every op, in small calls and large ones."""
    for name in ALL_OPS:
        for kinds in KINDS:
            for scheme in SCHEMES:
                yield name, awkward(name, SMALL, kinds, scheme, dtype), (1,)
        for scheme in SCHEMES[:2]:
            yield name, awkward(name, LARGE, TINY, scheme, dtype), (1, 2)


def results_of(name, values):
    return pytree.tree_leaves(call(name, values))


ENVIRONMENTS = {
    "flush to zero": flushed_subnormals,
    "upward": lambda: rounding(FE_UPWARD),
    "downward": lambda: rounding(FE_DOWNWARD),
    "toward zero": lambda: rounding(FE_TOWARDZERO),
}


@on_x86
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op_in_every_environment(isa, dtype):
    for position, (name, values, counts) in enumerate(calls(dtype)):
        expected = results_of(name, values)
        for count, environment in itertools.product(counts, ENVIRONMENTS):
            with threads(count), ENVIRONMENTS[environment]():
                before = control_of_mxcsr(), libm.fegetround()
                results = results_of(name, values)
                after = control_of_mxcsr(), libm.fegetround()
            assert after == before, "the op has changed the caller's setting"
            assert_all_same(results, expected, f"{name}, call {position}, {environment}, {count}")


def test_every_op_is_registered_by_what_sets_the_environment():
    sources = Path(__file__).parent.parent.joinpath("csrc/ops").iterdir()
    boxing = [path.name for path in sources if re.search(r"TORCH_BOX|\.impl\(", path.read_text())]
    assert boxing == ["implement.h"]


STRANGE_WORKERS = """
import torch
from test_ops_environment import *

torch.set_num_threads(2)
with rounding(FE_UPWARD), flushed_subnormals():  # threads inherit it from the one that starts them
    torch.ones(1 << 20).sqrt()
for name, values, counts in calls(torch.float32):
    if 2 in counts:
        results = [results_of(name, values)]
        with threads(1):
            results.append(results_of(name, values))
        assert_all_same(*results, name)
"""


@on_x86
def test_worker_threads_that_were_started_in_another_environment():
    done = subprocess.run(
        [sys.executable, "-c", STRANGE_WORKERS],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_every_op_is_among_them():
    assert set(ALL_OPS) == set(operators())


@on_x86
def test_an_error_restores_the_floating_point_state():
    weight = torch.full((3, 3), float("nan"))
    with rounding(FE_UPWARD):
        before = control_of_mxcsr()
        with pytest.raises(RuntimeError):
            ops.quantize_weight(weight)
        after = control_of_mxcsr()
    assert after == before


def test_several_callers_at_once(isa):
    sets = [inputs(m, n, k) for m, n, k in ((64, 520, 260), (1, 700, 300), (5, 33, 900))]
    expected = [everything(given) for given in sets]

    def repeat(worker):
        return [everything(sets[(worker + turn) % 3]) for turn in range(6)]

    with ThreadPoolExecutor(4) as pool:
        for worker, turns in enumerate(pool.map(repeat, range(4))):
            for turn, results in enumerate(turns):
                assert_all_same(results, expected[(worker + turn) % 3])


def test_the_arguments_are_not_changed(isa):
    given = inputs()
    copies = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    everything(given)
    assert_all_same([given[name] for name in copies], list(copies.values()))
