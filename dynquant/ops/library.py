"""Loads the compiled ops; what registering their fakes takes, and the checks that these share."""

import os
from pathlib import Path

import torch

from dynquant import _C
from dynquant.ops import cuda


def unsupported_isa(name, setting="DYNQUANT_ISA="):
    """The message about an instruction set that cannot run here, and what asked for it."""
    available = ", ".join(_C.available())
    return f"{setting}{name} is not supported here; available: {available}"


torch.ops.load_library(Path(__file__).parents[1] / "libdynquant.so")
if _C.current_isa() is None:
    raise RuntimeError(unsupported_isa(os.environ.get("DYNQUANT_ISA")))
_keep = os.environ.get("DYNQUANT_KEEP_MEMORY", "")  # csrc/ops/kept_memory.cpp reads it
if _keep not in ("", "0", "1"):
    raise RuntimeError(f"DYNQUANT_KEEP_MEMORY={_keep} is not supported; allowed: 0, 1")

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.float16, torch.bfloat16)
OPS = torch.ops.dynquant
LIBRARY = torch.library.Library("dynquant", "FRAGMENT")
cuda.load(LIBRARY)


def fake(name):
    """Registers a function as an op's fake, and its docstring as the op's."""

    def register(function):
        getattr(OPS, name.partition(".")[0]).__doc__ = function.__doc__
        return torch.library.register_fake(f"dynquant::{name}", function, lib=LIBRARY)

    return register


def check_dtype(name, tensor, *allowed):
    torch._check(
        tensor.dtype in allowed,
        lambda: f"{name} must have dtype {', '.join(map(str, allowed))}, got {tensor.dtype}",
    )


def check_bits(name, bits, symmetric):
    torch._check(bits in (8, 16), lambda: f"{name} must be 8 or 16, got {bits}")
    torch._check(
        bits == 8 or not symmetric,
        lambda: f"{name} = 16 is asymmetric: symmetric activations have 8 bits",
    )


def check_device(**tensors):
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    torch._check(
        len(set(devices.values())) == 1,
        lambda: f"arguments must be on one device, got {devices}",
    )


def unpacked_groups(packed, n, k, size):
    """The rows [n, k] of groups, each of which is packed in the first `size` bytes of a row."""
    rows = n // packed.shape[0]
    return torch.cat([OPS.unpack_weight(one[:size], rows, k) for one in packed])


def dequantized(packed, weight_scale, n, k):
    """The weight [n, k] in fp32 that a packed one stands for."""
    return OPS.unpack_weight(packed, n, k).to(torch.float32) * weight_scale[:, None]


def leading_shape(name, tensor):
    """The leading shape of a tensor of rows."""
    torch._check(tensor.dim() >= 1, lambda: f"{name} must have at least one dimension")
    return tensor.shape[:-1]


def check_matrix(name, tensor):
    torch._check(tensor.dim() == 2, lambda: f"{name} must have two dimensions [N, K]")
    torch._check(
        tensor.shape[1] <= _C.max_k,
        lambda: f"{name} has K = {tensor.shape[1]}, more than {_C.max_k}",
    )


def check_per_row(name, tensor, rows, dtype):
    check_dtype(name, tensor, dtype)
    lead = rows.shape[:-1]
    torch._check(
        tensor.shape == lead or tensor.shape == (1,),
        lambda: f"{name} must have the shape [1] or {list(lead)}, got {list(tensor.shape)}",
    )


def columns(packed, k, weight_scale, bias):
    """N, and the checks of what has one value for each column."""
    check_dtype("packed", packed, torch.int8)
    check_dtype("weight_scale", weight_scale, torch.float32)
    torch._check(packed.dim() == 1, lambda: "packed must have one dimension")
    size = packed.shape[0]
    if isinstance(size, int) and isinstance(k, int):
        n = _C.columns_of(size, k)
    elif bias is not None:  # dynamic sizes: the length of packed tells N only once it is fixed
        n = bias.shape[0]
    elif weight_scale.shape[0] != 1:
        n = weight_scale.shape[0]
    else:
        n = _C.columns_of(int(size), int(k))
    check_columns(n, weight_scale, bias)
    return n


def check_columns(n, weight_scale, bias, suffix=""):
    """What has one value for each column; `suffix` ends the names of both arguments."""
    torch._check(
        weight_scale.dim() == 1 and weight_scale.shape[0] in (n, 1),
        lambda: (
            f"weight_scale{suffix} must have the shape [{n}] or [1], got {list(weight_scale.shape)}"
        ),
    )
    check_bias(n, bias, suffix)


def check_bias(n, bias, suffix=""):
    if bias is not None:
        check_dtype(f"bias{suffix}", bias, *FLOAT_DTYPES)
        torch._check(
            bias.dim() == 1 and bias.shape[0] == n,
            lambda: f"bias{suffix} must have the shape [{n}], got {list(bias.shape)}",
        )


def register_autocast(name, op, inputs):
    """Under autocast the first `inputs` arguments are cast, and the output has their dtype."""

    def register(device, key):
        excluded = torch._C.DispatchKeySet(key)

        def cast_inputs(*arguments, **options):
            dtype = torch.get_autocast_dtype(device)
            # float64 is left for the op to refuse.
            cast = (x.to(dtype) if x.dtype in FLOAT_DTYPES else x for x in arguments[:inputs])
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return op(*cast, *arguments[inputs:], **options)

        LIBRARY.impl(name, cast_inputs, key.name)

    register("cpu", torch._C.DispatchKey.AutocastCPU)
    register("cuda", torch._C.DispatchKey.AutocastCUDA)


def register_with_inference(name, shape_of, inputs):
    """The fake and autocast of an op with a gradient and of its overload without one."""
    op = getattr(OPS, name)
    for full_name, overload in ((name, op.default), (f"{name}.inference", op.inference)):
        fake(full_name)(shape_of)
        register_autocast(full_name, overload, inputs)
    # Without this the dispatcher looks for a gradient at every call.
    LIBRARY.impl(f"{name}.inference", torch.library.fallthrough_kernel, "Autograd")
