"""Attention, from heads and whole, and rotary embeddings: what tracing and users read.

The schemas and the implementations are in csrc/ops.
"""

import torch

from dynquant.ops.blocks import check_ends, columns_of, tensors_of
from dynquant.ops.heads import (
    check_added,
    check_angles,
    check_heads,
    check_projections,
    check_scales,
    check_softmax,
    check_turned,
)
from dynquant.ops.library import FLOAT_DTYPES, check_device, check_dtype, fake


@fake("rotary")
def _(x, cos, sin, interleaved=False):
    """Rotary position embedding: x * cos + (-second half of x, first half of x) * sin, in fp32.

    Args:
        x: fp32, bf16 or fp16 [B, L, H, D], any strides.
        cos, sin: fp32, bf16 or fp16 [L, R] or [B, L, R], R even and at most D: the first R values
            of a head are turned, by pairs that lie R / 2 apart.
        interleaved: turns pairs of neighbors instead, (0, 1), (2, 3) and so on, each by one value
            of cos and sin, which are [L, R / 2] or [B, L, R / 2] then:
            (a * cos - b * sin, b * cos + a * sin) of a pair (a, b).

    Returns:
        A tensor of x's shape and dtype, contiguous.

    Raises:
        RuntimeError: another dtype, device or shape.
    """
    check_device(x=x, cos=cos, sin=sin)
    check_dtype("x", x, *FLOAT_DTYPES)
    check_heads("x", x)
    check_angles(cos, sin, interleaved, x.shape[0], x.shape[1], x.shape[3])
    return x.new_empty(x.shape)


@fake("scaled_dot_product")
def _(
    query,
    key,
    value,
    mask=None,
    position_bias=None,
    is_causal=False,
    scale=None,
    integers=True,
    key_scale=None,
    value_scale=None,
    softcap=None,
    sinks=None,
):
    """Attention of heads: softmax(query @ key.T * scale + position_bias + mask) @ value.

    In integers, a query's vector is quantized asymmetrically, those of key and value symmetrically,
    each on its own, and so is each row of probabilities times the values' scales; sums are int32,
    softmax is fp32. docs/numerics.md has every step. A row does not depend on other rows, on other
    sequences, or on masked keys behind the last one.

    Args:
        query: fp32, bf16 or fp16 [B, L, H, D], any strides.
        key, value: [B, S, KV, D] of query's dtype, any strides; KV divides H. Beside a query in
            fp32 both may be bf16 or fp16: their values are those in fp32. With integers=False both
            may be int8, and count as key * key_scale and value * value_scale.
        mask: bool (True: attended to), or floats that are added; of four dimensions that spread to
            [B, H, L, S], any strides. A row that is masked as a whole gives 0, as in torch.
        position_bias: floats likewise.
        is_causal: query i attends to the keys up to i.
        scale: 1 / sqrt(D) where it is None.
        integers: both products in integers; otherwise in fp32.
        key_scale, value_scale: fp32 [B, S, KV], the scale of each vector of key and value, any
            strides; where these are in int8.
        softcap: a score is softcap * tanh(query @ key.T * scale / softcap) before anything is
            added, as in Gemma 2 (https://arxiv.org/abs/2408.00118); None for none.
        sinks: fp32, bf16 or fp16 [H]: one more score of each row, by heads, which nothing is added
            to and whose value is zero, as in gpt-oss; or None.

    Returns:
        [B, L, H, D] in query's dtype, contiguous.

    Raises:
        RuntimeError: another dtype, device or shape; no key; more than 65,536 keys in integers;
            scales beside floats, int8 without them, or in integers; a softcap that is not positive.
    """
    check_device(**tensors_of(locals()))
    check_dtype("query", query, *FLOAT_DTYPES)
    kept = FLOAT_DTYPES if query.dtype == torch.float32 else (query.dtype,)
    check_dtype("key", key, *kept, torch.int8)
    check_dtype("value", value, key.dtype)
    for name, values in (("query", query), ("key", key), ("value", value)):
        check_heads(name, values)
    for name, values, scales in (("key", key, key_scale), ("value", value, value_scale)):
        check_scales(name, values, scales)
    torch._check(
        key.dtype != torch.int8 or not integers,
        lambda: "integers must be False where key is in int8: it takes keys in floats, got True",
    )
    batch, rows, heads, dim = query.shape
    torch._check(
        key.shape[0] == batch and key.shape[3] == dim and dim > 0,
        lambda: f"key must have the shape [{batch}, S, KV, {dim}], got {list(key.shape)}",
    )
    torch._check(
        value.shape == key.shape,
        lambda: f"value must have the shape of key, got {list(value.shape)}",
    )
    torch._check(key.shape[1] > 0, lambda: f"key must have a row at least, got {list(key.shape)}")
    kv_heads = key.shape[2]
    torch._check(
        kv_heads > 0 and heads % kv_heads == 0,
        lambda: (
            "the heads of the query must be a multiple of those of key and value, got "
            f"{heads} and {kv_heads}"
        ),
    )
    check_added(mask, position_bias, (batch, heads, rows, key.shape[1]))
    check_softmax(softcap, sinks, heads)
    return query.new_empty(query.shape)


@fake("relative_attention")
def _(
    query,
    key,
    value,
    position_key=None,
    position_query=None,
    mask=None,
    scale=None,
    integers=True,
):
    """Attention of heads whose scores have terms for how far a key lies from a query.

    softmax((query @ key.T + c2p + p2c) * scale + mask) @ value, where for query i and key j, with
    p = j - i + L - 1, c2p is query i times vector p of position_key, and p2c key j times vector p
    of position_query: the disentangled attention of DeBERTa (https://arxiv.org/abs/2006.03654).

    Equal in bits to scaled_dot_product with position_bias = (c2p + p2c) * scale in fp32. In
    integers, the vectors of query and key are quantized asymmetrically for these two terms, those
    of distances symmetrically, each on its own.

    Args:
        query: fp32, bf16 or fp16 [B, L, H, D], any strides.
        key, value: [B, S, H, D] of query's dtype, any strides.
        position_key, position_query: [L + S - 1, H, D] of query's dtype, any strides; None for no
            such term.
        mask, scale, integers: as in scaled_dot_product.

    Returns:
        [B, L, H, D] in query's dtype, contiguous.

    Raises:
        RuntimeError: another dtype, device or shape; no key; more than 65,536 keys in integers.
    """
    check_device(**tensors_of(locals()))
    check_dtype("query", query, *FLOAT_DTYPES)
    for name, values in (("key", key), ("value", value)):
        check_dtype(name, values, query.dtype)
    result = torch.ops.dynquant.scaled_dot_product(
        query, key, value, mask, None, False, scale, integers
    )
    torch._check(
        key.shape[2] == query.shape[2],
        lambda: f"key must have as many heads as query, {query.shape[2]}, got {list(key.shape)}",
    )
    for name, values in (("position_key", position_key), ("position_query", position_query)):
        if values is None:
            continue
        check_dtype(name, values, query.dtype)
        wanted = (query.shape[1] + key.shape[1] - 1, *query.shape[2:])
        torch._check(
            values.shape == wanted,
            lambda name=name, values=values, wanted=wanted: (
                f"{name} must have the shape {list(wanted)}, got {list(values.shape)}"
            ),
        )
    return result


@fake("attention")
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
    packed_out,
    weight_scale_out,
    bias_out,
    heads,
    kv_heads,
    mask=None,
    position_bias=None,
    is_causal=False,
    scale=None,
    cos=None,
    sin=None,
    integers=True,
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
    interleaved=False,
):
    """Self attention in one call: projections, heads, output projection, residual and norm.

    norm_after(residual + out(scaled_dot_product(q, k, v))), with q, k and v from norm_before(x),
    q and k turned by cos and sin where these are given. Equal in bits to linear_dynamic, rotary,
    scaled_dot_product, a sum and a norm called one after the other on tensors of x's dtype.

    Args:
        x: fp32, bf16 or fp16 [B, L, K], any strides.
        packed_q, weight_scale_q, bias_q: a packed weight [heads * D, K], its scale, its bias or
            None.
        packed_k, weight_scale_k, bias_k, packed_v, weight_scale_v, bias_v: packed weights
            [kv_heads * D, K] likewise. Without them packed_q holds the rows of all three, one after
            the other.
        packed_out, weight_scale_out, bias_out: a packed weight [N, heads * D] likewise.
        heads, kv_heads: kv_heads divides heads.
        mask, position_bias, is_causal, scale, integers: as in scaled_dot_product.
        cos, sin, interleaved: as in rotary; without cos and sin, nothing is turned.
        residual: [B, L, N] of x's dtype, or None.
        norm_before, norm_before_weight, norm_before_bias, norm_before_eps: 0 none, 1 layer norm, 2
            RMS norm over K, 3 the same times 1 + weight, with their arguments as in layer_norm and
            rms_norm.
        norm_after, norm_after_weight, norm_after_bias, norm_after_eps: the same over N.
        per_token, symmetric, activation_bits: as in linear_dynamic, for the four projections.
        residual_last: the residual is added behind norm_after, and not in front of it.

    Returns:
        [B, L, N] in x's dtype.

    Raises:
        RuntimeError: another dtype, device or shape, or a number that is not one of those named.
    """
    given = locals()
    check_device(**tensors_of(given))
    parts = (packed_k, weight_scale_k, bias_k), (packed_v, weight_scale_v, bias_v)
    dim = check_projections(x, (packed_q, weight_scale_q, bias_q), *parts, heads, kv_heads)
    batch, rows, _ = x.shape
    n = columns_of("out", packed_out, heads * dim, weight_scale_out, bias_out)
    check_added(mask, position_bias, (batch, heads, rows, rows))
    check_turned(cos, sin, interleaved, batch, rows, dim)
    check_ends(x, n, given)
    return x.new_empty((batch, rows, n))
