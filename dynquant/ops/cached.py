"""Attention to what a cache holds, in parts: what tracing and users read.

The schemas and the implementations are in csrc/ops.
"""

import torch

from dynquant.ops.blocks import check_ends, check_norm, check_norm_parts, columns_of, tensors_of
from dynquant.ops.heads import check_heads, check_projections, check_scales, check_turned, swapped
from dynquant.ops.library import FLOAT_DTYPES, check_bits, check_device, check_dtype, fake


@fake("query_key_value")
def _(
    x,
    packed_q,
    weight_scale_q,
    bias_q,
    packed_k,
    weight_scale_k,
    bias_k,
    packed_v,
    weight_scale_v,
    bias_v,
    heads,
    kv_heads,
    cos=None,
    sin=None,
    norm_q_weight=None,
    norm_q_eps=0.0,
    norm_k_weight=None,
    norm_k_eps=0.0,
    norm_before=0,
    norm_before_weight=None,
    norm_before_bias=None,
    norm_before_eps=0.0,
    per_token=True,
    symmetric=False,
    activation_bits=8,
    heads_plus_one=False,
    interleaved=False,
    gated=False,
):
    """The heads of query, key and value, for an attention whose earlier tokens are in a cache.

    Equal in bits to a norm, linear_dynamic, rms_norm and rotary called one after the other on
    tensors of x's dtype.

    Args:
        x: fp32, bf16 or fp16 [B, L, K], any strides.
        packed_q, ..., kv_heads: as in attention.
        cos, sin, interleaved: as in rotary, for query and key; without cos and sin, none is turned.
        norm_q_weight, norm_q_eps, norm_k_weight, norm_k_eps: where a weight is given, fp32, bf16 or
            fp16, an RMS norm of query or key, before they are turned: of each head where the weight
            is [D], of all heads of a token together where it is [heads * D] or [kv_heads * D].
        norm_before, norm_before_weight, norm_before_bias, norm_before_eps: 0 none, 1 layer norm, 2
            RMS norm over K, 3 the same times 1 + weight, with their arguments as in layer_norm and
            rms_norm.
        per_token, symmetric, activation_bits: as in linear_dynamic.
        heads_plus_one: the norms of heads multiply by 1 + weight.
        gated: packed_q is [heads * 2 * D, K]: the D rows of each head's query, and behind them
            those of its gate, which is neither normed nor turned. Norms are of each head then.

    Returns:
        query [B, L, heads, D], gated [B, L, heads, 2 * D], key and value [B, L, kv_heads, D] in x's
        dtype, contiguous.

    Raises:
        RuntimeError: another dtype, device or shape, or a number that is not one of those named.
    """
    given = locals()
    check_device(**tensors_of(given))
    parts = (packed_k, weight_scale_k, bias_k), (packed_v, weight_scale_v, bias_v)
    dim = check_projections(x, (packed_q, weight_scale_q, bias_q), *parts, heads, kv_heads, gated)
    check_bits("activation_bits", activation_bits, symmetric)
    norm = norm_before, norm_before_weight, norm_before_bias, norm_before_eps
    check_norm("norm_before", *norm, x.shape[-1])
    _check_norm_of_heads("norm_q_", norm_q_weight, norm_q_eps, 1 if gated else heads, dim)
    _check_norm_of_heads("norm_k_", norm_k_weight, norm_k_eps, kv_heads, dim)
    batch, rows, _ = x.shape
    check_turned(cos, sin, interleaved, batch, rows, dim)
    shapes = (heads, 2 * dim if gated else dim), (kv_heads, dim), (kv_heads, dim)
    return tuple(x.new_empty((batch, rows, *shape)) for shape in shapes)


def _check_norm_of_heads(prefix, weight, eps, count, dim):
    n = dim
    if weight is not None:
        sizes = [dim] if count == 1 else [dim, count * dim]
        torch._check(
            weight.dim() == 1 and weight.shape[0] in sizes,
            lambda: (
                f"{prefix}weight must have the shape {' or '.join(f'[{size}]' for size in sizes)}, "
                f"got {list(weight.shape)}"
            ),
        )
        n = weight.shape[0]
    check_norm_parts(n, eps, weight, None, prefix)


@fake("attend")
def _(
    x,
    key,
    value,
    packed_out,
    weight_scale_out,
    bias_out,
    packed_q=None,
    weight_scale_q=None,
    bias_q=None,
    mask=None,
    position_bias=None,
    scale=None,
    key_scale=None,
    value_scale=None,
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
    is_causal=False,
    gate=None,
    softcap=None,
    sinks=None,
):
    """Attention to keys and values that are there already, a cache's, to its end in one call.

    norm_after(residual + out(scaled_dot_product(query, key, value) * sigmoid(gate))), in fp32,
    where the query is x, or has the heads of q(norm_before(x)). Equal in bits to a norm,
    linear_dynamic, scaled_dot_product with integers=False, a product with what activation gives,
    linear_dynamic, a sum and a norm called one after the other on tensors of x's dtype.

    Args:
        x: fp32, bf16 or fp16: the query [B, L, H, D], or where packed_q is given [B, L, K], any
            strides.
        key, value: [B, KV, S, D], as caches have them, otherwise as in scaled_dot_product.
        packed_out, weight_scale_out, bias_out: a packed weight [N, H * D], its scale, its bias or
            None.
        packed_q, weight_scale_q, bias_q: a packed weight [H * D, K] likewise, or None.
        mask, position_bias, scale: as in scaled_dot_product.
        key_scale, value_scale: [B, KV, S], otherwise as in scaled_dot_product.
        residual: [B, L, N] of x's dtype, or None.
        norm_before, norm_before_weight, norm_before_bias, norm_before_eps: 0 none, 1 layer norm, 2
            RMS norm over K, 3 the same times 1 + weight, with their arguments as in layer_norm and
            rms_norm; with packed_q.
        norm_after, norm_after_weight, norm_after_bias, norm_after_eps: the same over N.
        per_token, symmetric, activation_bits: as in linear_dynamic, for the projections.
        residual_last: the residual is added behind norm_after, and not in front of it.
        is_causal: query i attends to the keys up to i.
        gate: [B, L, H, D] of x's dtype, any strides, or None.
        softcap, sinks: as in scaled_dot_product.

    Returns:
        [B, L, N] in x's dtype.

    Raises:
        RuntimeError: another dtype, device or shape, or a number that is not one of those named.
    """
    given = locals()
    check_device(**tensors_of(given))
    check_dtype("x", x, *FLOAT_DTYPES)
    for name, values, scales in (("key", key, key_scale), ("value", value, value_scale)):
        check_heads(name, values, "heads, rows")
        check_scales(name, values, scales)
    dim = key.shape[3]
    torch._check(
        (packed_q is None) == (weight_scale_q is None),
        lambda: "packed_q and weight_scale_q must both be given or neither",
    )
    if packed_q is None:
        torch._check(bias_q is None, lambda: "bias_q is given without packed_q")
        torch._check(
            norm_before == 0,
            lambda: f"norm_before belongs to packed_q, which is not given, got {norm_before}",
        )
        query = x
        check_heads("x", query)
    else:
        torch._check(x.dim() == 3, lambda: f"x must have three dimensions, got {list(x.shape)}")
        columns = columns_of("q", packed_q, x.shape[2], weight_scale_q, bias_q)
        torch._check(
            dim > 0 and columns % dim == 0,
            lambda: f"packed_q must have N, a multiple of D = {dim}, that of key, got {columns}",
        )
        query = x.new_empty((*x.shape[:2], columns // dim, dim))
    if gate is not None:
        check_dtype("gate", gate, x.dtype)
        torch._check(
            gate.shape == query.shape,
            lambda: f"gate must have the shape {list(query.shape)}, got {list(gate.shape)}",
        )
    kept, scales = swapped(key, value), swapped(key_scale, value_scale)
    heads = torch.ops.dynquant.scaled_dot_product(
        *(query, *kept, mask, position_bias, False, scale, False, *scales, softcap, sinks)
    )
    n = columns_of("out", packed_out, heads.shape[2] * dim, weight_scale_out, bias_out)
    check_ends(heads.flatten(2) if packed_q is None else x, n, given)
    return x.new_empty((*heads.shape[:2], n))
