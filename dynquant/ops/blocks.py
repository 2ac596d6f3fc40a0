"""The float functions between products, and whole blocks as one op: what tracing and users read.

The schemas and the implementations are in csrc/ops.
"""

import torch

from dynquant.ops.library import (
    FLOAT_DTYPES,
    check_bits,
    check_device,
    check_dtype,
    columns,
    fake,
    leading_shape,
)

# The numbers of the argument `function` of activation, and `activation` of the blocks.
ACTIVATIONS = {
    "none": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "silu": 3,
    "relu": 4,
    "quick_gelu": 5,
    "sigmoid": 6,
    "tanh": 7,
    "relu_squared": 8,
}
# The numbers of the arguments norm_before and norm_after.
NORMS = {"none": 0, "layer": 1, "rms": 2, "rms_plus_one": 3}


def check_activation(name, function):
    torch._check(
        0 <= function < len(ACTIVATIONS),
        lambda: f"{name} must be one of {ACTIVATIONS}, got {function}",
    )


def _check_floats(name, x, *allowed):
    check_dtype(name, x, *(allowed or FLOAT_DTYPES))
    leading_shape(name, x)


def tensors_of(arguments):
    """Those of an op's arguments that are tensors."""
    return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}


@fake("activation")
def _(x, function):
    """An activation function of every value, in fp32, rounded to x's dtype.

    Args:
        x: fp32, bf16 or fp16 [..., K], any strides.
        function: 0 none, 1 gelu (x / 2 * (1 + erf(x / sqrt 2)), to 3 units in the last place for
            x > 0 and 2.5e-7 * max(1, |x|) elsewhere), 2 gelu by tanh, 3 silu, 4 relu, 5 quick_gelu
            (x * sigmoid(1.702 x)), 6 sigmoid, 7 tanh, 8 relu_squared.
            dynquant.ops.blocks.ACTIVATIONS has them.

    Returns:
        A tensor of x's shape and dtype, contiguous.

    Raises:
        RuntimeError: another dtype, device or function, or a scalar.
    """
    _check_floats("x", x)
    check_activation("function", function)
    return x.new_empty(x.shape)


def check_norm_parts(n, eps, weight, bias, prefix=""):
    _check_values(f"{prefix}weight", weight, n)
    _check_values(f"{prefix}bias", bias, n)
    torch._check(eps >= 0, lambda: f"{prefix}eps must not be negative, got {eps}")


def _check_values(name, values, n):
    if values is not None:
        check_dtype(name, values, *FLOAT_DTYPES)
        torch._check(
            values.dim() == 1 and values.shape[0] == n,
            lambda: f"{name} must have the shape [{n}], got {list(values.shape)}",
        )


@fake("layer_norm")
def _(x, weight=None, bias=None, eps=1e-5):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, in fp32.

    Sums are 16 partial sums in a fixed order (docs/numerics.md), so the bits are the same on every
    instruction set.

    Args:
        x: fp32, bf16 or fp16 [..., K], any strides.
        weight, bias: fp32, bf16 or fp16 [K], or None.
        eps: not negative.

    Returns:
        A tensor of x's shape and dtype, contiguous.

    Raises:
        RuntimeError: another dtype, device or shape; a negative eps.
    """
    check_device(x=x, weight=weight, bias=bias)
    _check_floats("x", x)
    check_norm_parts(x.shape[-1], eps, weight, bias)
    return x.new_empty(x.shape)


@fake("rms_norm")
def _(x, weight=None, eps=1e-6, plus_one=False):
    """x / sqrt(mean of squares + eps) * weight over the last dimension, in fp32.

    Args:
        x: fp32, bf16 or fp16 [..., K], any strides.
        weight: fp32, bf16 or fp16 [K], or None.
        eps: not negative.
        plus_one: multiplies by 1 + weight, in fp32, as Gemma's norms do.

    Returns:
        A tensor of x's shape and dtype, contiguous.

    Raises:
        RuntimeError: another dtype, device or shape; a negative eps.
    """
    check_device(x=x, weight=weight)
    _check_floats("x", x)
    check_norm_parts(x.shape[-1], eps, weight, None)
    return x.new_empty(x.shape)


@fake("softmax")
def _(x):
    """exp(x - max x) / sum over the last dimension, in fp32; a row of -Inf alone gives NaN.

    Args:
        x: fp32, bf16 or fp16 [..., K], any strides.

    Returns:
        A tensor of x's shape and dtype, contiguous.

    Raises:
        RuntimeError: another dtype or device, or a scalar.
    """
    _check_floats("x", x)
    return x.new_empty(x.shape)


def check_norm(name, norm, weight, bias, eps, n):
    """A norm over rows of n values."""
    torch._check(norm in NORMS.values(), lambda: f"{name} must be one of {NORMS}, got {norm}")
    torch._check(
        norm != NORMS["none"] or (weight is None and bias is None),
        lambda: f"{name}_weight and {name}_bias belong to a norm, and {name} is 0",
    )
    torch._check(
        norm <= NORMS["layer"] or bias is None,
        lambda: f"{name}_bias is given, and the norm of {name} = {norm} has none",
    )
    check_norm_parts(n, eps, weight, bias, f"{name}_")


def _check_residual(residual, x, n):
    if residual is not None:
        check_dtype("residual", residual, x.dtype)
        torch._check(
            residual.shape == (*x.shape[:-1], n),
            lambda: f"residual must have the shape of the result, got {list(residual.shape)}",
        )


def check_ends(x, n, given):
    """What every block ends with, by the arguments' names: residual, norms, scheme."""
    check_bits("activation_bits", given["activation_bits"], given["symmetric"])
    _check_residual(given["residual"], x, n)
    for name, width in (("norm_before", x.shape[-1]), ("norm_after", n)):
        parts = (given[f"{name}{part}"] for part in ("", "_weight", "_bias", "_eps"))
        check_norm(name, *parts, width)


def columns_of(part, packed, k, weight_scale, bias):
    """N of a packed weight [N, K], and the checks of what has one value for each column."""
    try:
        return columns(packed, k, weight_scale, bias)
    except RuntimeError as error:
        raise RuntimeError(f"packed_{part}, weight_scale_{part}, bias_{part}: {error}") from None


@fake("embedding_sum")
def _(
    indices,
    table,
    type_indices=None,
    type_table=None,
    position_table=None,
    norm=0,
    norm_weight=None,
    norm_bias=None,
    norm_eps=0.0,
):
    """norm(table[indices] + type_table[type_indices] + position_table[0, 1, ...]) in one call.

    The sums are made from the left, each rounded to the tables' dtype.

    Args:
        indices: int64 or int32 [..., L].
        table: fp32, bf16 or fp16 [V, K], any strides.
        type_indices: int64 or int32 [..., L]; without them, every type is the first.
        type_table: [T, K] of table's dtype, or None.
        position_table: [at least L, K] likewise.
        norm, norm_weight, norm_bias, norm_eps: 0 none, 1 layer norm, 2 RMS norm over K, 3 the same
            times 1 + weight, with their arguments as in layer_norm and rms_norm.

    Returns:
        [..., L, K] in table's dtype.

    Raises:
        RuntimeError: another dtype, device or shape; an index that is not in its table.
    """
    check_device(**tensors_of(locals()))
    check_dtype("table", table, *FLOAT_DTYPES)
    check_dtype("indices", indices, torch.int64, torch.int32)
    length = indices.shape[-1] if indices.dim() else 1
    for name, rows, least in (
        ("table", table, 0),
        ("type_table", type_table, 1),
        ("position_table", position_table, length),
    ):
        if rows is not None:
            _check_table(name, rows, table, least)
    if type_indices is not None:
        check_dtype("type_indices", type_indices, torch.int64, torch.int32)
        torch._check(type_table is not None, lambda: "type_indices are given without type_table")
        torch._check(
            type_indices.shape == indices.shape,
            lambda: f"type_indices must have the shape of indices, got {list(type_indices.shape)}",
        )
    check_norm("norm", norm, norm_weight, norm_bias, norm_eps, table.shape[1])
    return table.new_empty((*indices.shape, table.shape[1]))


def _check_table(name, rows, table, least):
    check_dtype(name, rows, table.dtype)
    torch._check(
        rows.dim() == 2 and rows.shape[-1] == table.shape[-1] and rows.shape[0] >= least,
        lambda: (
            f"{name} must have the shape [at least {least}, {table.shape[-1]}], "
            f"got {list(rows.shape)}"
        ),
    )


@fake("linear_block")
def _(
    x,
    packed,
    weight_scale,
    bias=None,
    activation=0,
    residual=None,
    norm_before=0,
    norm_before_weight=None,
    norm_before_bias=None,
    norm_before_eps=0.0,
    norm_after=0,
    norm_after_weight=None,
    norm_after_bias=None,
    norm_after_eps=0.0,
    per_token=True,
    symmetric=False,
    activation_bits=8,
    residual_last=False,
):
    """norm_after(residual + activation(linear(norm_before(x)))), all of it in one call.

    Equal in bits to a norm, linear_dynamic, activation, a sum and a norm called one after the other
    on tensors of x's dtype.

    Args:
        x: fp32, bf16 or fp16 [..., K], any strides.
        packed, weight_scale, bias: a packed weight [N, K], its scale, its bias or None.
        activation: as `function` of the op activation.
        residual: [..., N] of x's dtype, or None.
        norm_before, norm_before_weight, norm_before_bias, norm_before_eps: 0 none, 1 layer norm, 2
            RMS norm over K, 3 the same times 1 + weight, with their arguments as in layer_norm and
            rms_norm.
        norm_after, norm_after_weight, norm_after_bias, norm_after_eps: the same over N.
        per_token, symmetric, activation_bits: as in linear_dynamic.
        residual_last: the residual is added behind norm_after, and not in front of it.

    Returns:
        [..., N] in x's dtype.

    Raises:
        RuntimeError: another dtype, device or shape, or a number that is not one of those named.
    """
    given = locals()
    check_device(**tensors_of(given))
    _check_floats("x", x)
    check_activation("activation", activation)
    n = columns(packed, x.shape[-1], weight_scale, bias)
    check_ends(x, n, given)
    return x.new_empty((*x.shape[:-1], n))


@fake("feed_forward")
def _(
    x,
    packed_up,
    weight_scale_up,
    bias_up,
    packed_gate,
    weight_scale_gate,
    bias_gate,
    packed_down,
    weight_scale_down,
    bias_down,
    activation,
    split=0,
    residual=None,
    norm_before=0,
    norm_before_weight=None,
    norm_before_bias=None,
    norm_before_eps=0.0,
    norm_after=0,
    norm_after_weight=None,
    norm_after_bias=None,
    norm_after_eps=0.0,
    per_token=True,
    symmetric=False,
    activation_bits=8,
    residual_last=False,
):
    """norm_after(residual + down(activation(up(norm_before(x))))), all of it in one call.

    With a gate, activation(gate(x)) * up(x). Equal in bits to linear_dynamic, activation, a
    product, a sum and a norm called one after the other on tensors of x's dtype.

    Args:
        x: fp32, bf16 or fp16 [..., K], any strides.
        packed_up, weight_scale_up, bias_up: a packed weight [F, K], its scale, its bias or None.
        packed_gate, weight_scale_gate, bias_gate: likewise, or None without a gate of its own.
        packed_down, weight_scale_down, bias_down: a packed weight [N, F] likewise.
        activation: as `function` of the op activation.
        split: 0; 1 where packed_up is [2 F, K] and holds the gate and then what it multiplies; 2
            where it holds them the other way round.
        residual: [..., N] of x's dtype, or None.
        norm_before, norm_before_weight, norm_before_bias, norm_before_eps: 0 none, 1 layer norm, 2
            RMS norm over K, 3 the same times 1 + weight, with their arguments as in layer_norm and
            rms_norm.
        norm_after, norm_after_weight, norm_after_bias, norm_after_eps: the same over N.
        per_token, symmetric, activation_bits: as in linear_dynamic.
        residual_last: the residual is added behind norm_after, and not in front of it.

    Returns:
        [..., N] in x's dtype.

    Raises:
        RuntimeError: another dtype, device or shape, or a number that is not one of those named.
    """
    given = locals()
    check_device(**tensors_of(given))
    _check_floats("x", x)
    check_activation("activation", activation)
    torch._check(split in (0, 1, 2), lambda: f"split must be 0, 1 or 2, got {split}")
    hidden = columns_of("up", packed_up, x.shape[-1], weight_scale_up, bias_up)
    if packed_gate is not None:
        columns_of("gate", packed_gate, x.shape[-1], weight_scale_gate, bias_gate)
    if split:
        hidden = hidden // 2
    n = columns_of("down", packed_down, hidden, weight_scale_down, bias_down)
    check_ends(x, n, given)
    return x.new_empty((*x.shape[:-1], n))
