"""The linear op of several groups of rows, each with a weight of its own, as experts have them.

It exists for torch.compile and torch.export, for which the sizes of the groups, which are data,
must not decide what is run.
"""

import torch

from dynquant import _C
from dynquant.ops.library import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    OPS,
    check_bits,
    check_device,
    check_dtype,
    fake,
    register_autocast,
)


@fake("linear_grouped")
def _(
    x,
    counts,
    weight,
    weight_scale,
    bias,
    n,
    per_token=True,
    symmetric=False,
    activation_bits=8,
):
    """linear_dynamic, or linear_half, of several groups of rows, each with a weight of its own.

    The groups lie one after another in x; rows after the last give zeros. There is no gradient.

    Args:
        x: fp32, bf16 or fp16 [M, K].
        counts: int64 [E], the number of rows of each group.
        weight: what pack_weight gave for each group, at the beginning of the rows of int8
            [E, bytes]; or bf16 or fp16 [E, N, K].
        weight_scale: fp32 [E, N] or [E, 1]; None where the weights have 16 bits.
        bias: fp32, bf16 or fp16 [E, N], or None.
        n: N.
        per_token, symmetric, activation_bits: as in linear_dynamic.

    Returns:
        [M, N] in x's dtype.

    Raises:
        RuntimeError: as linear_dynamic and linear_half; for more rows in groups than x has, and on
            CUDA for weights in 16 bits.
    """
    check_bits("activation_bits", activation_bits, symmetric)
    check_device(x=x, counts=counts, weight=weight, weight_scale=weight_scale, bias=bias)
    check_dtype("x", x, *FLOAT_DTYPES)
    check_dtype("counts", counts, torch.int64)
    torch._check(x.dim() == 2, lambda: "x must have two dimensions [M, K]")
    torch._check(counts.dim() == 1, lambda: "counts must have one dimension [E]")
    _check_columns("n", n)
    groups, k = counts.shape[0], x.shape[1]
    if weight_scale is None:
        check_dtype("weight", weight, *HALF_DTYPES)
        check_shapes("weight", weight, (groups, n, k))
        if bias is not None:
            _check_bias("bias", bias, groups, n)
    else:
        check_packed_groups("", weight, weight_scale, bias, groups, n, int(k))
    return x.new_empty(x.shape[0], n)


def check_packed_groups(part, weight, weight_scale, bias, groups, n, k):
    """A packed weight [n, k] for each group, its scale and its bias or None.

    Args:
        part: what their names end with, "up", or "".
    """
    end = f"_{part}" if part else ""
    _check_columns(f"n{end}", n)
    check_dtype(f"weight{end}", weight, torch.int8)
    torch._check(k <= _C.max_k, lambda: f"x has K = {k}, more than {_C.max_k}")
    size = _C.packed_bytes(n, k)
    torch._check(
        weight.dim() == 2 and weight.shape[0] == groups and weight.shape[1] >= size,
        lambda: f"weight{end} must have the shape [{groups}, {size} or more], {_found(weight)}",
    )
    check_dtype(f"weight_scale{end}", weight_scale, torch.float32)
    check_shapes(f"weight_scale{end}", weight_scale, (groups, n), (groups, 1))
    if bias is not None:
        _check_bias(f"bias{end}", bias, groups, n)


def _check_bias(name, bias, groups, n):
    check_dtype(name, bias, *FLOAT_DTYPES)
    check_shapes(name, bias, (groups, n))


def _check_columns(name, n):
    torch._check(0 <= n < 1 << 31, lambda: f"{name} must lie in [0, 2147483647], got {n}")


def check_shapes(name, tensor, *shapes):
    torch._check(
        any(tuple(tensor.shape) == shape for shape in shapes),
        lambda: f"{name} must have the shape {' or '.join(map(str, shapes))}, {_found(tensor)}",
    )


def _found(tensor):
    return f"got {list(tensor.shape)}"


register_autocast("linear_grouped", OPS.linear_grouped.default, inputs=1)
