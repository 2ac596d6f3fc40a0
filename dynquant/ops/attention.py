"""Attention, whole and in parts: what tracing and users read.

The schemas and the implementations are in csrc/ops.
"""

import torch

from dynquant.ops.blocks import check_ends, check_norm, check_norm_parts, columns_of, tensors_of
from dynquant.ops.library import FLOAT_DTYPES, check_bits, check_device, check_dtype, fake


def _check_heads(name, x, axes="rows, heads"):
    torch._check(
        x.dim() == 4,
        lambda: f"{name} must have four dimensions [B, {axes}, D], got {list(x.shape)}",
    )


@fake("rotary")
def _(x, cos, sin):
    """Rotary position embedding: x * cos + (-second half of x, first half of x) * sin, in fp32.

    Args:
        x: fp32, bf16 or fp16 [B, L, H, D], any strides.
        cos, sin: fp32, bf16 or fp16 [L, R] or [B, L, R], R even and at most D: the first R values
            of a head are turned, by pairs that lie R / 2 apart.

    Returns:
        A tensor of x's shape and dtype, contiguous.

    Raises:
        RuntimeError: another dtype, device or shape.
    """
    check_device(x=x, cos=cos, sin=sin)
    check_dtype("x", x, *FLOAT_DTYPES)
    _check_heads("x", x)
    _check_angles(cos, sin, x.shape[0], x.shape[1], x.shape[3])
    return x.new_empty(x.shape)


def _check_scales(name, values, scales):
    torch._check(
        (values.dtype == torch.int8) == (scales is not None),
        lambda: f"{name}_scale goes with a {name} in int8 and with no other, got {values.dtype}",
    )
    if scales is not None:
        check_dtype(f"{name}_scale", scales, torch.float32)
        torch._check(
            scales.shape == values.shape[:3],
            lambda: (
                f"{name}_scale must have the shape {list(values.shape[:3])}, "
                f"got {list(scales.shape)}"
            ),
        )


def _check_angles(cos, sin, batch, rows, dim):
    for name, values in (("cos", cos), ("sin", sin)):
        check_dtype(name, values, *FLOAT_DTYPES)
        torch._check(
            values.dim() in (2, 3)
            and values.shape[-2] == rows
            and (values.dim() == 2 or values.shape[0] in (1, batch)),
            lambda name=name, values=values: (
                f"{name} must have the shape [{rows}, R] or [{batch}, {rows}, R], "
                f"got {list(values.shape)}"
            ),
        )
        torch._check(
            0 < values.shape[-1] <= dim and values.shape[-1] % 2 == 0,
            lambda name=name, values=values: (
                f"{name} must turn an even number of values of a head of {dim}, "
                f"got {list(values.shape)}"
            ),
        )
    torch._check(
        cos.shape == sin.shape,
        lambda: f"cos and sin must have one shape, got {list(cos.shape)} and {list(sin.shape)}",
    )


def _check_turned(cos, sin, *sizes):
    """Angles that may be left out."""
    torch._check(
        (cos is None) == (sin is None), lambda: "cos and sin must both be given or neither"
    )
    if cos is not None:
        _check_angles(cos, sin, *sizes)


def _check_added(mask, position_bias, shape):
    for name, values, dtypes in (
        ("mask", mask, (torch.bool, *FLOAT_DTYPES)),
        ("position_bias", position_bias, FLOAT_DTYPES),
    ):
        if values is None:
            continue
        check_dtype(name, values, *dtypes)
        torch._check(
            values.dim() == 4
            and all(one in (1, full) for one, full in zip(values.shape, shape, strict=True)),
            lambda name=name, values=values: (
                f"{name} must spread to {list(shape)}, got {list(values.shape)}"
            ),
        )


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

    Returns:
        [B, L, H, D] in query's dtype, contiguous.

    Raises:
        RuntimeError: another dtype, device or shape; no key; more than 65,536 keys in integers;
            scales beside floats, int8 without them, or in integers.
    """
    check_device(**tensors_of(locals()))
    check_dtype("query", query, *FLOAT_DTYPES)
    kept = FLOAT_DTYPES if query.dtype == torch.float32 else (query.dtype,)
    check_dtype("key", key, *kept, torch.int8)
    check_dtype("value", value, key.dtype)
    for name, values in (("query", query), ("key", key), ("value", value)):
        _check_heads(name, values)
    for name, values, scales in (("key", key, key_scale), ("value", value, value_scale)):
        _check_scales(name, values, scales)
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
    _check_added(mask, position_bias, (batch, heads, rows, key.shape[1]))
    return query.new_empty(query.shape)


def _check_projections(x, query, key, value, heads, kv_heads):
    """D, and the checks of what gives query, key and value: packed weight, scale and bias each."""
    check_dtype("x", x, *FLOAT_DTYPES)
    torch._check(x.dim() == 3, lambda: f"x must have three dimensions, got {list(x.shape)}")
    torch._check(heads > 0, lambda: f"heads must be positive, got {heads}")
    torch._check(
        kv_heads > 0 and heads % kv_heads == 0,
        lambda: f"kv_heads must be positive and divide heads = {heads}, got {kv_heads}",
    )
    torch._check(
        (key[0] is None) == (value[0] is None),
        lambda: "packed_k and packed_v must both be given or neither",
    )
    k = x.shape[-1]
    packed, *rest = query
    parts = heads if key[0] is not None else heads + 2 * kv_heads
    columns = columns_of("q", packed, k, *rest)
    torch._check(
        columns > 0 and columns % parts == 0,
        lambda: f"packed_q must have N, a multiple of {parts}, got {columns}",
    )
    dim = columns // parts
    for part, (packed, *rest) in (("k", key), ("v", value)):
        if packed is not None:
            found = columns_of(part, packed, k, *rest)
            torch._check(
                found == kv_heads * dim,
                lambda part=part, found=found: (
                    f"packed_{part} must have the shape [{kv_heads * dim}, {k}], got N = {found}"
                ),
            )
    return dim


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
):
    """The heads of query, key and value, for an attention whose earlier tokens are in a cache.

    Equal in bits to a norm, linear_dynamic, rms_norm and rotary called one after the other on
    tensors of x's dtype.

    Args:
        x: fp32, bf16 or fp16 [B, L, K], any strides.
        packed_q, ..., kv_heads: as in attention.
        cos, sin: as in rotary, for query and key, or None.
        norm_q_weight, norm_q_eps, norm_k_weight, norm_k_eps: where a weight is given, fp32, bf16 or
            fp16 [D], an RMS norm of each head of query or key, before they are turned.
        norm_before, norm_before_weight, norm_before_bias, norm_before_eps: 0 none, 1 layer norm, 2
            RMS norm over K, with their arguments as in layer_norm and rms_norm.
        per_token, symmetric, activation_bits: as in linear_dynamic.

    Returns:
        query [B, L, heads, D], key and value [B, L, kv_heads, D] in x's dtype, contiguous.

    Raises:
        RuntimeError: another dtype, device or shape, or a number that is not one of those named.
    """
    given = locals()
    check_device(**tensors_of(given))
    parts = (packed_k, weight_scale_k, bias_k), (packed_v, weight_scale_v, bias_v)
    dim = _check_projections(x, (packed_q, weight_scale_q, bias_q), *parts, heads, kv_heads)
    check_bits("activation_bits", activation_bits, symmetric)
    norm = norm_before, norm_before_weight, norm_before_bias, norm_before_eps
    check_norm("norm_before", *norm, x.shape[-1])
    check_norm_parts(dim, norm_q_eps, norm_q_weight, None, "norm_q_")
    check_norm_parts(dim, norm_k_eps, norm_k_weight, None, "norm_k_")
    batch, rows, _ = x.shape
    _check_turned(cos, sin, batch, rows, dim)
    counts = heads, kv_heads, kv_heads
    return tuple(x.new_empty((batch, rows, count, dim)) for count in counts)


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
):
    """Attention to keys and values that are there already, a cache's, to its end in one call.

    norm_after(residual + out(scaled_dot_product(query, key, value))), in fp32, where the query is
    x, or has the heads of q(norm_before(x)). Equal in bits to a norm, linear_dynamic,
    scaled_dot_product with integers=False, linear_dynamic, a sum and a norm called one after the
    other on tensors of x's dtype.

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
            RMS norm over K, with their arguments as in layer_norm and rms_norm; with packed_q.
        norm_after, norm_after_weight, norm_after_bias, norm_after_eps: the same over N.
        per_token, symmetric, activation_bits: as in linear_dynamic, for the projections.

    Returns:
        [B, L, N] in x's dtype.

    Raises:
        RuntimeError: another dtype, device or shape, or a number that is not one of those named.
    """
    given = locals()
    check_device(**tensors_of(given))
    check_dtype("x", x, *FLOAT_DTYPES)
    for name, values, scales in (("key", key, key_scale), ("value", value, value_scale)):
        _check_heads(name, values, "heads, rows")
        _check_scales(name, values, scales)
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
        _check_heads("x", query)
    else:
        torch._check(x.dim() == 3, lambda: f"x must have three dimensions, got {list(x.shape)}")
        columns = columns_of("q", packed_q, x.shape[2], weight_scale_q, bias_q)
        torch._check(
            dim > 0 and columns % dim == 0,
            lambda: f"packed_q must have N, a multiple of D = {dim}, that of key, got {columns}",
        )
        query = x.new_empty((*x.shape[:2], columns // dim, dim))
    kept = (one.transpose(1, 2) for one in (key, value))
    scales = (one if one is None else one.transpose(1, 2) for one in (key_scale, value_scale))
    heads = torch.ops.dynquant.scaled_dot_product(
        query, *kept, mask, position_bias, False, scale, False, *scales
    )
    n = columns_of("out", packed_out, heads.shape[2] * dim, weight_scale_out, bias_out)
    check_ends(heads.flatten(2) if packed_q is None else x, n, given)
    return x.new_empty((*heads.shape[:2], n))


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
        cos, sin: as in rotary, or None.
        residual: [B, L, N] of x's dtype, or None.
        norm_before, norm_before_weight, norm_before_bias, norm_before_eps: 0 none, 1 layer norm, 2
            RMS norm over K, with their arguments as in layer_norm and rms_norm.
        norm_after, norm_after_weight, norm_after_bias, norm_after_eps: the same over N.
        per_token, symmetric, activation_bits: as in linear_dynamic, for the four projections.

    Returns:
        [B, L, N] in x's dtype.

    Raises:
        RuntimeError: another dtype, device or shape, or a number that is not one of those named.
    """
    given = locals()
    check_device(**tensors_of(given))
    parts = (packed_k, weight_scale_k, bias_k), (packed_v, weight_scale_v, bias_v)
    dim = _check_projections(x, (packed_q, weight_scale_q, bias_q), *parts, heads, kv_heads)
    batch, rows, _ = x.shape
    n = columns_of("out", packed_out, heads * dim, weight_scale_out, bias_out)
    _check_added(mask, position_bias, (batch, heads, rows, rows))
    _check_turned(cos, sin, batch, rows, dim)
    check_ends(x, n, given)
    return x.new_empty((batch, rows, n))
