"""Any arguments whatever: a result or a Python exception, never a crash."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from op_arguments import BLOCKS, OPS, call, valid_call

DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.bool),
    *(torch.int8, torch.uint8, torch.int32, torch.int64),
)
INTEGERS = (-1, 0, 1, 4, 5, 7, 64, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63), 1 << 70)


def any_tensor(rng):
    shape = tuple(int(size) for size in rng.choice([0, 1, 3, 5, 7, 8], rng.integers(0, 5)))
    with np.errstate(all="ignore"):
        values = torch.tensor(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 40))
    tensor = torch.as_tensor(values).to(DTYPES[rng.integers(len(DTYPES))])
    change = rng.integers(9)
    if change == 0:
        return tensor.to("meta")
    if change == 1:
        return tensor.to_sparse()
    if change == 2 and tensor.ndim:
        return tensor.transpose(0, -1)
    if change == 3 and tensor.ndim:
        return tensor[..., ::2]
    if change == 4 and tensor.ndim and tensor.shape[0]:
        return tensor[:1].expand(tensor.shape)
    if change == 5 and tensor.is_floating_point():
        return tensor.requires_grad_()
    return tensor


def damaged(tensor, rng):
    """The right tensor with some bytes overwritten, a piece missing, or one too many."""
    tensor = tensor.clone()
    change = rng.integers(4)
    if change == 0 and tensor.numel():
        flat = tensor.view(-1).view(torch.uint8)
        where = rng.integers(0, min(64, flat.numel()), 3)
        flat[where] = torch.from_numpy(rng.integers(0, 256, 3, dtype=np.uint8))
        return tensor
    if change == 1 and tensor.ndim:
        return tensor[: rng.integers(0, tensor.shape[0] + 1)]
    if change == 2 and tensor.ndim:
        return torch.cat([tensor, tensor])
    return tensor[None] if change == 3 else tensor


def any_value(valid, rng):
    kind = rng.integers(4)
    if kind == 0:
        return any_tensor(rng)
    if kind == 1:
        return INTEGERS[rng.integers(len(INTEGERS))]
    if kind == 2:
        return (None, "text", 1.5, torch.float64, torch.int8, True, [], torch.empty(0))[
            rng.integers(8)
        ]
    return damaged(valid, rng) if isinstance(valid, torch.Tensor) else valid


def fuzz(count, seed):
    """How many of `count` calls gave a result and how many an exception."""
    rng = np.random.default_rng(seed)
    results = exceptions = 0
    sizes = [{"m": (3,)}, {"m": (2, 3), "n": 65}, {"m": (1,), "k": 64}, {"m": (0,)}]
    names = [*OPS, *BLOCKS]
    valid = {name: [valid_call(name, **size) for size in sizes] for name in names}
    for _ in range(count):
        name = names[rng.integers(len(names))]
        arguments = (OPS | BLOCKS)[name]
        values = dict(valid[name][rng.integers(len(sizes))])
        for argument in arguments:
            if rng.random() < min(0.3, 2 / len(arguments)):
                values[argument] = any_value(values[argument], rng)
        try:
            call(name, values)
            results += 1
        except Exception as error:
            assert str(error), f"{name}: an exception without a text"
            exceptions += 1
    return results, exceptions


def test_in_a_process_of_its_own():
    """A crash here is reported with its stack instead of ending the test run."""
    code = "import dynquant, test_ops_fuzz as t; print(*t.fuzz(3000, 1))"
    environment = os.environ | {"MALLOC_PERTURB_": "165"}
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    results, exceptions = map(int, done.stdout.split())
    assert results > 100 and exceptions > 1000


def test_in_this_process(isa):
    results, exceptions = fuzz(1000, 2)
    assert results > 30 and exceptions > 300
