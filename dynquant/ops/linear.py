"""The int8 ops: weights, activations, products."""

import torch

from dynquant import _C
from dynquant.ops.library import (
    FLOAT_DTYPES,
    LIBRARY,
    check_bits,
    check_columns,
    check_device,
    check_dtype,
    check_matrix,
    check_per_row,
    columns,
    dequantized,
    fake,
    leading_shape,
    register_with_inference,
)


@fake("quantize_weight")
def _(weight, per_channel=True):
    """The symmetric int8 form of a weight: clamp(rint(weight / scale), -127, 127).

    Args:
        weight: fp32, bf16 or fp16 [N, K], K at most 65,536.
        per_channel: one scale, max|row| / 127, for each row; otherwise one for all.

    Returns:
        int8 [N, K] and fp32 [N] (or [1]).

    Raises:
        RuntimeError: another dtype, device or shape; NaN or Inf in the weight.
    """
    check_dtype("weight", weight, *FLOAT_DTYPES)
    check_matrix("weight", weight)
    scale = weight.new_empty(weight.shape[0] if per_channel else 1, dtype=torch.float32)
    return weight.new_empty(weight.shape, dtype=torch.int8), scale


@fake("pack_weight")
def _(qweight):
    """The weight in the layout that the kernels read, the same everywhere.

    Args:
        qweight: int8 [N, K] in [-127, 127], K at most 65,536.

    Returns:
        int8 [bytes]: a header (N, K, layout version), the weight and its column sums.

    Raises:
        RuntimeError: another dtype, device or shape; on CUDA, a value of -128.
    """
    check_dtype("qweight", qweight, torch.int8)
    check_matrix("qweight", qweight)
    n, k = (int(size) for size in qweight.shape)
    return qweight.new_empty(_C.packed_bytes(n, k))


@fake("unpack_weight")
def _(packed, n, k):
    """int8 [n, k], what pack_weight was given.

    Raises:
        RuntimeError: packed is not a packed weight of this layout version, or not of that N and K.
    """
    check_dtype("packed", packed, torch.int8)
    return packed.new_empty(n, k)


@fake("choose_qparams")
def _(x, per_token=True, symmetric=False, bits=8):
    """Scale (fp32) and zero point (int32) of activations, each of shape x.shape[:-1] or [1].

    Asymmetric: lo = min(0, min x), hi = max(0, max x), scale = (hi - lo) / 255, zero_point =
    clamp(rint(-lo * (255 / (hi - lo))), 0, 255). Symmetric: scale = max|x| / 127, zero_point = 0.
    In 16 bits (asymmetric) 65535 takes the place of 255.
    A row without range has scale 1, one with NaN or Inf has scale NaN.

    Args:
        x: fp32, bf16 or fp16 [..., K], any strides.
        per_token: for each row; otherwise one for the whole tensor.
        symmetric: the scheme.
        bits: 8 or 16.

    Raises:
        RuntimeError: another dtype or device, or a scalar; 16 bits that are to be symmetric, or
            on CUDA.
    """
    check_bits("bits", bits, symmetric)
    check_dtype("x", x, *FLOAT_DTYPES)
    shape = leading_shape("x", x) if per_token else (1,)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


def _q_dtype(symmetric, bits):
    if symmetric:
        return torch.int8
    return torch.uint16 if bits == 16 else torch.uint8


@fake("quantize_activation")
def _(x, per_token=True, symmetric=False, bits=8):
    """x in 8 or 16 bits under the parameters that choose_qparams gives.

    Returns:
        q, uint8 (asymmetric; in 16 bits uint16) or int8 (symmetric) of x's shape; scale;
        zero_point.

    Raises:
        RuntimeError: as choose_qparams.
    """
    check_bits("bits", bits, symmetric)
    check_dtype("x", x, *FLOAT_DTYPES)
    shape = leading_shape("x", x) if per_token else (1,)
    q = x.new_empty(x.shape, dtype=_q_dtype(symmetric, bits))
    return q, x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


@fake("quantize_with")
def _(x, scale, zero_point, symmetric=False, bits=8):
    """x in 8 or 16 bits under given parameters: clamp(rint(x / scale) + zero_point); NaN gives 0.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        scale: fp32 of shape x.shape[:-1] or [1].
        zero_point: int32 likewise, in [0, 255], in 16 bits [0, 65535]; 0 where symmetric.
        symmetric: q is int8 in [-127, 127]; otherwise uint8, in 16 bits uint16.
        bits: 8 or 16.

    Raises:
        RuntimeError: another dtype, device, shape, or, on the CPU, a zero point out of range; 16
            bits that are to be symmetric, or on CUDA.
    """
    check_bits("bits", bits, symmetric)
    check_device(x=x, scale=scale, zero_point=zero_point)
    check_dtype("x", x, *FLOAT_DTYPES)
    leading_shape("x", x)
    check_per_row("scale", scale, x, torch.float32)
    check_per_row("zero_point", zero_point, x, torch.int32)
    return x.new_empty(x.shape, dtype=_q_dtype(symmetric, bits))


@fake("int_mm")
def _(q, zero_point, packed, n):
    """(q - zero_point) @ weight.T in int32, exact.

    Args:
        q: uint8 or int8 [..., K].
        zero_point: int32 of shape q.shape[:-1] or [1], within q's dtype.
        packed: what pack_weight gave.
        n: its N.

    Returns:
        int32 [..., n].

    Raises:
        RuntimeError: another dtype, device, shape, or, on the CPU, a zero point out of range.
    """
    check_device(q=q, zero_point=zero_point, packed=packed)
    check_dtype("q", q, torch.uint8, torch.int8)
    check_dtype("packed", packed, torch.int8)
    lead = leading_shape("q", q)
    check_per_row("zero_point", zero_point, q, torch.int32)
    return q.new_empty((*lead, n), dtype=torch.int32)


@fake("rescale")
def _(acc, scale, weight_scale, bias, dtype):
    """(float(acc) * scale) * weight_scale + bias, each step rounded to fp32, then to dtype.

    Args:
        acc: int32 [..., N].
        scale: fp32 of shape acc.shape[:-1] or [1].
        weight_scale: fp32 [N] or [1].
        bias: fp32, bf16 or fp16 [N], or None.
        dtype: torch.float32, bfloat16 or float16.

    Raises:
        RuntimeError: another dtype, device or shape.
    """
    check_device(acc=acc, scale=scale, weight_scale=weight_scale, bias=bias)
    check_dtype("acc", acc, torch.int32)
    leading_shape("acc", acc)
    check_per_row("scale", scale, acc, torch.float32)
    check_dtype("weight_scale", weight_scale, torch.float32)
    check_columns(acc.shape[-1], weight_scale, bias)
    return acc.new_empty(acc.shape, dtype=dtype)


@fake("scaled_mm")
def _(q, scale, zero_point, packed, weight_scale, bias, dtype):
    """int_mm and rescale in one step, with the arguments of both; the same bits.

    q may also be uint16 (on the CPU), a byte h and a byte l: then 256 * float(acc of h) +
    float(acc of l), rounded once, takes the place of float(acc).

    Returns:
        [..., N] in dtype.

    Raises:
        RuntimeError: as int_mm and rescale.
    """
    check_device(
        q=q, scale=scale, zero_point=zero_point, packed=packed, weight_scale=weight_scale, bias=bias
    )
    check_dtype("q", q, torch.uint8, torch.int8, torch.uint16)
    lead = leading_shape("q", q)
    check_per_row("scale", scale, q, torch.float32)
    check_per_row("zero_point", zero_point, q, torch.int32)
    n = columns(packed, q.shape[-1], weight_scale, bias)
    return q.new_empty((*lead, n), dtype=dtype)


def _fake_linear(
    x, packed, weight_scale, bias=None, per_token=True, symmetric=False, activation_bits=8
):
    """A linear layer whose input is quantized at run time: quantize_activation and scaled_mm fused.

    Under autocast x alone is cast. The gradient of x is that of a float linear with the
    dequantized weight; the other arguments get none. The overload `inference` is the same without
    a gradient, and cheaper to call.

    Args:
        x: fp32, bf16 or fp16 [..., K], any strides.
        packed: what pack_weight gave, of that K.
        weight_scale: fp32 [N] or [1].
        bias: fp32, bf16 or fp16 [N], or None.
        per_token, symmetric, activation_bits: as in choose_qparams (there `bits`).

    Returns:
        [..., N] in x's dtype.

    Raises:
        RuntimeError: another dtype, device or shape; 16 bits that are to be symmetric, or on CUDA.
    """
    check_bits("activation_bits", activation_bits, symmetric)
    check_device(x=x, packed=packed, weight_scale=weight_scale, bias=bias)
    check_dtype("x", x, *FLOAT_DTYPES)
    lead = leading_shape("x", x)
    return x.new_empty((*lead, columns(packed, x.shape[-1], weight_scale, bias)))


def _save_weight(ctx, inputs, output):
    x, packed, weight_scale, *_ = inputs
    ctx.save_for_backward(packed, weight_scale)
    ctx.in_features, ctx.out_features, ctx.dtype = x.shape[-1], output.shape[-1], x.dtype


def _input_gradient(ctx, gradient):
    """That of a float linear with the dequantized weight, in fp32; rounding passes through."""
    packed, weight_scale = ctx.saved_tensors
    weight = dequantized(packed, weight_scale, ctx.out_features, ctx.in_features)
    return (gradient.to(torch.float32) @ weight).to(ctx.dtype), None, None, None, None, None, None


torch.library.register_autograd(
    "dynquant::linear_dynamic", _input_gradient, setup_context=_save_weight, lib=LIBRARY
)


register_with_inference("linear_dynamic", _fake_linear, inputs=1)
