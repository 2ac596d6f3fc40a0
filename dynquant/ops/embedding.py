"""The ops of embeddings in 8 and 4 bits."""

import torch

from dynquant.ops.library import (
    FLOAT_DTYPES,
    LIBRARY,
    check_device,
    check_dtype,
    fake,
)


@fake("quantize_embedding")
def _(weight, bits=8):
    """The rows of an embedding table in 8 or 4 bits, each with its own scale and offset.

    With levels = 2 ** bits - 1, and lo and hi the least and greatest value of a row (+0 where that
    is a zero): scale = (hi - lo) / levels, offset = lo, and q = clamp(rint((value - lo) / scale),
    0, levels), so that a value is about q * scale + offset. A row whose scale would be below
    2 ** -126 has scale 1 and q 0. Each operation is rounded to fp32.

    Args:
        weight: fp32, bf16 or fp16 [V, D].
        bits: 8, or 4: two values to a byte, the first of them in its lower four bits; with odd D
            the upper four of the last byte are 0.

    Returns:
        rows: uint8 [V, D], or [V, (D + 1) // 2] in 4 bits.
        qparams: fp32 [V, 2], scale and offset.

    Raises:
        RuntimeError: another dtype, device, shape or number of bits; a row with NaN or Inf, or
            whose hi - lo overflows.
    """
    check_dtype("weight", weight, *FLOAT_DTYPES)
    torch._check(weight.dim() == 2, lambda: "weight must have two dimensions [V, D]")
    count, dim = weight.shape
    rows = weight.new_empty((count, _row_bytes(dim, bits)), dtype=torch.uint8)
    return rows, weight.new_empty((count, 2), dtype=torch.float32)


def _row_bytes(dim, bits):
    torch._check(bits in (8, 4), lambda: f"bits must be 8 or 4, got {bits}")
    return dim if bits == 8 else (dim + 1) // 2


def _check_table(indices, rows, qparams, bits, dim, dtype, **others):
    check_device(indices=indices, rows=rows, qparams=qparams, **others)
    check_dtype("indices", indices, torch.int64, torch.int32)
    check_dtype("rows", rows, torch.uint8)
    check_dtype("qparams", qparams, torch.float32)
    torch._check(rows.dim() == 2, lambda: "rows must have two dimensions")
    width = _row_bytes(dim, bits)
    torch._check(
        rows.shape[1] == width, lambda: f"rows must have {width} columns, got {rows.shape[1]}"
    )
    torch._check(
        qparams.dim() == 2 and qparams.shape[0] == rows.shape[0] and qparams.shape[1] == 2,
        lambda: f"qparams must have the shape [{rows.shape[0]}, 2], got {list(qparams.shape)}",
    )
    torch._check(dtype in FLOAT_DTYPES, lambda: f"dtype must be a float dtype, got {dtype}")


@fake("embedding")
def _(indices, rows, qparams, bits, dim, dtype):
    """Rows of a table that quantize_embedding gave: float(q) * scale + offset.

    Both operations are rounded to fp32, the result then to dtype.

    Args:
        indices: int64 or int32 of any shape, in [0, V).
        rows, qparams: the table.
        bits, dim: 8 or 4; D.
        dtype: torch.float32, bfloat16 or float16.

    Returns:
        [*indices.shape, dim] in dtype.

    Raises:
        RuntimeError: another dtype, device or shape, or an index that is not in the table.
    """
    _check_table(indices, rows, qparams, bits, dim, dtype)
    return indices.new_empty((*indices.shape, dim), dtype=dtype)


@fake("embedding_bag")
def _(
    indices,
    rows,
    qparams,
    bits,
    dim,
    dtype,
    offsets=None,
    per_sample_weights=None,
    mode=0,
    include_last_offset=False,
    padding_idx=-1,
):
    """Sums, means or maxima over bags of rows, as torch.nn.functional.embedding_bag's.

    In fp32, each operation rounded: a row's value is float(q) * scale + offset, times its weight
    where there are weights; values are added to 0 in the order of the indices; a mean is the sum
    divided by the number of values. Then the result is rounded to dtype. A bag without indices
    gives zeros.

    Args:
        indices: int64 or int32: [B, L], a bag in each row; or [n], with offsets.
        rows, qparams: the table that quantize_embedding gave.
        bits, dim: 8 or 4; D.
        dtype: torch.float32, bfloat16 or float16.
        offsets: int64 or int32 [B], where each bag begins, ascending from 0.
        per_sample_weights: fp32, bf16 or fp16 of the shape of indices; for sums.
        mode: 0 sum, 1 mean, 2 max.
        include_last_offset: offsets is [B + 1], and its last element ends the last bag.
        padding_idx: an index that is left out, and not counted in a mean; -1 for none.

    Returns:
        [B, dim] in dtype.

    Raises:
        RuntimeError: another dtype, device, shape or mode; an index that is not in the table;
            offsets that decrease or exceed n.
    """
    _check_table(
        indices,
        rows,
        qparams,
        bits,
        dim,
        dtype,
        offsets=offsets,
        per_sample_weights=per_sample_weights,
    )
    torch._check(mode in (0, 1, 2), lambda: f"mode must be 0, 1 or 2, got {mode}")
    torch._check(
        indices.dim() == (2 if offsets is None else 1),
        lambda: "indices must have one dimension and come with offsets, or two",
    )
    if per_sample_weights is not None:
        check_dtype("per_sample_weights", per_sample_weights, *FLOAT_DTYPES)
        torch._check(mode == 0, lambda: f"per_sample_weights need mode 0 (sum), got {mode}")
        torch._check(
            per_sample_weights.shape == indices.shape,
            lambda: "per_sample_weights must have the shape of indices",
        )
    if offsets is None:
        return indices.new_empty((indices.shape[0], dim), dtype=dtype)
    check_dtype("offsets", offsets, torch.int64, torch.int32)
    torch._check(offsets.dim() == 1, lambda: "offsets must have one dimension")
    bags = offsets.shape[0] - 1 if include_last_offset else offsets.shape[0]
    return indices.new_empty((bags, dim), dtype=dtype)


for _name in ("embedding", "embedding_bag"):  # neither has a gradient
    LIBRARY.impl(_name, torch.library.fallthrough_kernel, "Autograd")
