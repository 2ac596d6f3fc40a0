"""The arguments that ops of attention share: heads, their scales and angles, what is added."""

import torch

from dynquant.ops.blocks import columns_of
from dynquant.ops.library import FLOAT_DTYPES, check_dtype

_FLOAT = torch.finfo(torch.float32)


def swapped(*given):
    """Tensors with their rows and heads, axes 1 and 2, the other way round; None stays None."""
    return tuple(one if one is None else one.transpose(1, 2) for one in given)


def check_heads(name, x, axes="rows, heads"):
    torch._check(
        x.dim() == 4,
        lambda: f"{name} must have four dimensions [B, {axes}, D], got {list(x.shape)}",
    )


def check_scales(name, values, scales):
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


def check_angles(cos, sin, interleaved, batch, rows, dim):
    last, of_each = ("R / 2", 2) if interleaved else ("R", 1)
    for name, values in (("cos", cos), ("sin", sin)):
        check_dtype(name, values, *FLOAT_DTYPES)
        torch._check(
            values.dim() in (2, 3)
            and values.shape[-2] == rows
            and (values.dim() == 2 or values.shape[0] in (1, batch)),
            lambda name=name, values=values: (
                f"{name} must have the shape [{rows}, {last}] or [{batch}, {rows}, {last}], "
                f"got {list(values.shape)}"
            ),
        )
        turned = values.shape[-1] * of_each
        torch._check(
            0 < turned <= dim and turned % 2 == 0,
            lambda name=name, values=values: (
                f"{name} must turn an even number R of values of a head of {dim} and have the "
                f"shape [.., {last}], got {list(values.shape)}"
            ),
        )
    torch._check(
        cos.shape == sin.shape,
        lambda: f"cos and sin must have one shape, got {list(cos.shape)} and {list(sin.shape)}",
    )


def check_turned(cos, sin, *sizes):
    """Angles that may be left out."""
    torch._check(
        (cos is None) == (sin is None), lambda: "cos and sin must both be given or neither"
    )
    if cos is not None:
        check_angles(cos, sin, *sizes)


def check_added(mask, position_bias, shape):
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


def check_softmax(softcap, sinks, heads):
    """What changes the softmax of an attention with so many heads."""
    torch._check(
        softcap is None or _FLOAT.tiny <= softcap <= _FLOAT.max,
        lambda: f"softcap must be positive and finite, got {softcap}",
    )
    if sinks is not None:
        check_dtype("sinks", sinks, *FLOAT_DTYPES)
        torch._check(
            sinks.shape == (heads,),
            lambda: f"sinks must have the shape [{heads}], got {list(sinks.shape)}",
        )


def check_projections(x, query, key, value, heads, kv_heads, gated=False):
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
    torch._check(
        not gated or key[0] is not None,
        lambda: "gated: it goes with packed_k and packed_v, which are not given",
    )
    k = x.shape[-1]
    packed, *rest = query
    of_query = 2 * heads if gated else heads
    parts = of_query if key[0] is not None else heads + 2 * kv_heads
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
