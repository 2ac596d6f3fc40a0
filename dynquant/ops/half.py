"""The linear op with weights in 16 bits."""

import torch

from dynquant.ops.library import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    LIBRARY,
    check_bias,
    check_device,
    check_dtype,
    leading_shape,
    register_with_inference,
)


def _fake_linear_half(x, half_weight, bias=None):
    """A linear layer whose weight is held in 16 bits: x @ half_weight.T + bias, computed in fp32.

    Both are widened to fp32. Each output is a sum of 16 partial sums, of which number j takes the
    products of k = j, j + 16, ... in that order, and which are then added in halves: j and j + 8,
    j and j + 4, j and j + 2, j and j + 1. Every operation is rounded on its own, so that the bits
    are the same on every instruction set, thread count and batch. The bias is added last.

    Under autocast x alone is cast. The gradient of x is that of a float linear; the other arguments
    get none. The overload `inference` is the same without a gradient, and cheaper to call.

    Args:
        x: fp32, bf16 or fp16 [..., K], any strides.
        half_weight: bf16 or fp16 [N, K].
        bias: fp32, bf16 or fp16 [N], or None.

    Returns:
        [..., N] in x's dtype.

    Raises:
        RuntimeError: another dtype, device or shape.
    """
    check_device(x=x, half_weight=half_weight, bias=bias)
    check_dtype("x", x, *FLOAT_DTYPES)
    check_dtype("half_weight", half_weight, *HALF_DTYPES)
    torch._check(half_weight.dim() == 2, lambda: "half_weight must have two dimensions [N, K]")
    lead = leading_shape("x", x)
    n, k = half_weight.shape
    torch._check(x.shape[-1] == k, lambda: f"x must have K = {k} as its last dimension")
    check_bias(n, bias)
    return x.new_empty((*lead, n))


def _save_half_weight(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(weight)
    ctx.dtype = x.dtype


def _half_input_gradient(ctx, gradient):
    (weight,) = ctx.saved_tensors
    return (gradient.to(torch.float32) @ weight.to(torch.float32)).to(ctx.dtype), None, None


torch.library.register_autograd(
    "dynquant::linear_half", _half_input_gradient, setup_context=_save_half_weight, lib=LIBRARY
)


register_with_inference("linear_half", _fake_linear_half, inputs=1)
