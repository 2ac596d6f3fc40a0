"""The int8 op of convolutions over one dimension."""

import torch

from dynquant import _C
from dynquant.ops.library import (
    FLOAT_DTYPES,
    LIBRARY,
    check_bits,
    check_columns,
    check_device,
    check_dtype,
    columns,
    dequantized,
    register_with_inference,
    unpacked_groups,
)


def _fake_conv1d(
    x,
    packed,
    weight_scale,
    bias,
    kernel_size,
    stride=1,
    padding_left=0,
    padding_right=0,
    dilation=1,
    per_token=True,
    symmetric=False,
    activation_bits=8,
):
    """A convolution over one dimension: linear_dynamic of the windows that the kernel sees.

    Window t has the C values of each of the positions t * stride + tap * dilation - padding_left,
    one tap behind the other; positions outside of x are zeros. Each window is a row that is
    quantized on its own (per_token), or all by one range, that of x. The bits are those of
    linear_dynamic on these rows.

    Where packed has a row for each of G groups, the channels, and the N columns, are in as many
    groups, and windows of a group's channels are multiplied with its columns alone.

    Under autocast x alone is cast. The gradient of x is that of a float convolution with the
    dequantized weight; the other arguments get none. The overload `inference` is the same without
    a gradient, and cheaper to call.

    Args:
        x: fp32, bf16 or fp16 [B, C, L], any strides.
        packed: what pack_weight gave of int8 [N, kernel_size * C], one tap behind the other; or
            int8 [G, bytes], each row of which begins with what it gave of one group's
            [N / G, kernel_size * C / G].
        weight_scale: fp32 [N] or, without groups, [1].
        bias: fp32, bf16 or fp16 [N], or None.
        kernel_size, stride, dilation: of positions, from 1 on.
        padding_left, padding_right: zeros before and behind each sequence.
        per_token, symmetric, activation_bits: as in choose_qparams (there `bits`).

    Returns:
        [B, N, (L + padding_left + padding_right - dilation * (kernel_size - 1) - 1) // stride + 1]
        in x's dtype.

    Raises:
        RuntimeError: another dtype, device or shape; no channels; a kernel longer than x with its
            padding; numbers out of range; 16 bits that are to be symmetric; on CUDA.
    """
    check_bits("activation_bits", activation_bits, symmetric)
    check_device(x=x, packed=packed, weight_scale=weight_scale, bias=bias)
    check_dtype("x", x, *FLOAT_DTYPES)
    torch._check(x.dim() == 3, lambda: f"x must have the shape [B, C, L], got {list(x.shape)}")
    for name, value, least in (
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding_left", padding_left, 0),
        ("padding_right", padding_right, 0),
        ("dilation", dilation, 1),
    ):
        torch._check(
            least <= value < 1 << 31,
            lambda name=name, value=value, least=least: (
                f"{name} must lie in [{least}, 2147483647], got {value}"
            ),
        )
    batch, channels, length = x.shape
    n = _columns(packed, kernel_size, channels, weight_scale, bias)
    padded = length + padding_left + padding_right
    span = dilation * (kernel_size - 1) + 1
    torch._check(
        padded >= span,
        lambda: f"x must not be shorter, with its padding, than the kernel, {span} positions",
    )
    return x.new_empty(batch, n, (padded - span) // stride + 1)


def _columns(packed, kernel_size, channels, weight_scale, bias):
    """N, and the checks of what has one value for each column."""
    if packed.dim() != 2:
        return columns(packed, kernel_size * channels, weight_scale, bias)
    check_dtype("packed", packed, torch.int8)
    check_dtype("weight_scale", weight_scale, torch.float32)
    groups = packed.shape[0]
    torch._check(
        groups > 0 and channels > 0 and channels % groups == 0,
        lambda: f"x must have channels for each of {groups} groups, got {channels}",
    )
    k = kernel_size * channels // groups
    torch._check(k <= _C.max_k, lambda: f"x has K = {k}, more than {_C.max_k}")
    n = weight_scale.shape[0] if weight_scale.dim() == 1 else -1
    torch._check(
        n >= 0 and n % groups == 0,
        lambda: (
            f"weight_scale must have one value for each column of the {groups} groups of packed, "
            f"got {list(weight_scale.shape)}"
        ),
    )
    size = _C.packed_bytes(int(n) // groups, int(k))
    torch._check(
        packed.shape[1] >= size and packed.stride(1) == 1,
        lambda: (
            f"packed must have the shape [{groups}, {size} or more], its rows contiguous, got "
            f"{list(packed.shape)}"
        ),
    )
    check_columns(n, weight_scale, bias)
    return n


def _weight(packed, weight_scale, n, kernel_size, channels):
    """The float weight [N, C / G, kernel_size], dequantized."""
    if packed.dim() == 1:
        rows = dequantized(packed, weight_scale, n, kernel_size * channels)
    else:
        k = kernel_size * channels // packed.shape[0]
        size = _C.packed_bytes(n // packed.shape[0], k)
        integers = unpacked_groups(packed, n, k, size)
        rows = integers.to(torch.float32) * weight_scale[:, None]
    return rows.unflatten(1, (kernel_size, -1)).transpose(1, 2)


def _save_weight(ctx, inputs, output):
    x, packed, weight_scale, _, kernel_size, stride, left, right, dilation, *_ = inputs
    ctx.save_for_backward(packed, weight_scale)
    ctx.windows = kernel_size, stride, left, right, dilation
    ctx.shape, ctx.dtype, ctx.out_channels = x.shape, x.dtype, output.shape[1]


def _input_gradient(ctx, gradient):
    """That of a float convolution with the dequantized weight, in fp32; rounding passes through."""
    packed, weight_scale = ctx.saved_tensors
    kernel_size, stride, left, right, dilation = ctx.windows
    batch, channels, length = ctx.shape
    weight = _weight(packed, weight_scale, ctx.out_channels, kernel_size, channels)
    padded = torch.nn.grad.conv1d_input(
        (batch, channels, length + left + right),
        weight,
        gradient.to(torch.float32),
        stride,
        dilation=dilation,
        groups=channels // weight.shape[1],
    )
    return padded[..., left : left + length].to(ctx.dtype), *[None] * 11


torch.library.register_autograd(
    "dynquant::conv1d_dynamic", _input_gradient, setup_context=_save_weight, lib=LIBRARY
)


register_with_inference("conv1d_dynamic", _fake_conv1d, inputs=1)
