"""torch.ops.dynquant: loads the compiled ops, registers what tracing and training need.

The schemas and the implementations are in csrc/ops.
"""

from pathlib import Path

import torch

from dynquant import _C, cuda
from dynquant.isa import check_environment

torch.ops.load_library(Path(__file__).with_name("libdynquant.so"))
check_environment()

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ops = torch.ops.dynquant
_library = torch.library.Library("dynquant", "FRAGMENT")
cuda.load(_library)


def _fake(name):
    """Registers a function as an op's fake, and its docstring as the op's."""

    def register(function):
        getattr(_ops, name.partition(".")[0]).__doc__ = function.__doc__
        return torch.library.register_fake(f"dynquant::{name}", function, lib=_library)

    return register


def _check_dtype(name, tensor, *allowed):
    torch._check(
        tensor.dtype in allowed,
        lambda: f"{name} must have dtype {', '.join(map(str, allowed))}, got {tensor.dtype}",
    )


def _check_device(**tensors):
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    torch._check(
        len(set(devices.values())) == 1,
        lambda: f"arguments must be on one device, got {devices}",
    )


def _lead(name, tensor):
    """The leading shape of a tensor of rows."""
    torch._check(tensor.dim() >= 1, lambda: f"{name} must have at least one dimension")
    return tensor.shape[:-1]


def _check_matrix(name, tensor):
    torch._check(tensor.dim() == 2, lambda: f"{name} must have two dimensions [N, K]")
    torch._check(
        tensor.shape[1] <= _C.max_k,
        lambda: f"{name} has K = {tensor.shape[1]}, more than {_C.max_k}",
    )


def _check_per_row(name, tensor, rows, dtype):
    _check_dtype(name, tensor, dtype)
    lead = rows.shape[:-1]
    torch._check(
        tensor.shape == lead or tensor.shape == (1,),
        lambda: f"{name} must have the shape [1] or {list(lead)}, got {list(tensor.shape)}",
    )


def _columns(packed, k, weight_scale, bias):
    """N, and the checks of what has one value for each column."""
    _check_dtype("packed", packed, torch.int8)
    _check_dtype("weight_scale", weight_scale, torch.float32)
    torch._check(packed.dim() == 1, lambda: "packed must have one dimension")
    size = packed.shape[0]
    if isinstance(size, int) and isinstance(k, int):
        n = _C.columns_of(size, k)
    elif bias is not None:  # dynamic sizes: the length of packed tells N only once it is fixed
        n = bias.shape[0]
    elif weight_scale.shape[0] != 1:
        n = weight_scale.shape[0]
    else:
        n = _C.columns_of(int(size), int(k))
    _check_columns(n, weight_scale, bias)
    return n


def _check_columns(n, weight_scale, bias, suffix=""):
    """What has one value for each column; `suffix` ends the names of both arguments."""
    torch._check(
        weight_scale.dim() == 1 and weight_scale.shape[0] in (n, 1),
        lambda: (
            f"weight_scale{suffix} must have the shape [{n}] or [1], got {list(weight_scale.shape)}"
        ),
    )
    _check_bias(n, bias, suffix)


def _check_bias(n, bias, suffix=""):
    if bias is not None:
        _check_dtype(f"bias{suffix}", bias, *FLOAT_DTYPES)
        torch._check(
            bias.dim() == 1 and bias.shape[0] == n,
            lambda: f"bias{suffix} must have the shape [{n}], got {list(bias.shape)}",
        )


@_fake("quantize_weight")
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
    _check_dtype("weight", weight, *FLOAT_DTYPES)
    _check_matrix("weight", weight)
    scale = weight.new_empty(weight.shape[0] if per_channel else 1, dtype=torch.float32)
    return weight.new_empty(weight.shape, dtype=torch.int8), scale


@_fake("pack_weight")
def _(qweight):
    """The weight in the layout that the kernels read, the same everywhere.

    Args:
        qweight: int8 [N, K] in [-127, 127], K at most 65,536.

    Returns:
        int8 [bytes]: a header (N, K, layout version), the weight and its column sums.

    Raises:
        RuntimeError: another dtype, device or shape; a value of -128.
    """
    _check_dtype("qweight", qweight, torch.int8)
    _check_matrix("qweight", qweight)
    n, k = (int(size) for size in qweight.shape)
    return qweight.new_empty(_C.packed_bytes(n, k))


@_fake("unpack_weight")
def _(packed, n, k):
    """int8 [n, k], what pack_weight was given.

    Raises:
        RuntimeError: packed is no packed weight of this layout version, or not of that N and K.
    """
    _check_dtype("packed", packed, torch.int8)
    return packed.new_empty(n, k)


@_fake("choose_qparams")
def _(x, per_token=True, symmetric=False):
    """Scale (fp32) and zero point (int32) of activations, each of shape x.shape[:-1] or [1].

    Asymmetric: lo = min(0, min x), hi = max(0, max x), scale = (hi - lo) / 255, zero_point =
    clamp(rint(-lo * (255 / (hi - lo))), 0, 255). Symmetric: scale = max|x| / 127, zero_point = 0.
    A row without range has scale 1, one with NaN or Inf has scale NaN.

    Args:
        x: fp32, bf16 or fp16 [..., K], any strides.
        per_token: for each row; otherwise one for the whole tensor.
        symmetric: the scheme.

    Raises:
        RuntimeError: another dtype or device, or a scalar.
    """
    _check_dtype("x", x, *FLOAT_DTYPES)
    shape = _lead("x", x) if per_token else (1,)
    return x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


def _q_dtype(symmetric):
    return torch.int8 if symmetric else torch.uint8


@_fake("quantize_activation")
def _(x, per_token=True, symmetric=False):
    """x in 8 bits under the parameters that choose_qparams gives.

    Returns:
        q, uint8 (asymmetric) or int8 (symmetric) of x's shape; scale; zero_point.

    Raises:
        RuntimeError: as choose_qparams.
    """
    _check_dtype("x", x, *FLOAT_DTYPES)
    shape = _lead("x", x) if per_token else (1,)
    q = x.new_empty(x.shape, dtype=_q_dtype(symmetric))
    return q, x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)


@_fake("quantize_with")
def _(x, scale, zero_point, symmetric=False):
    """x in 8 bits under given parameters: clamp(rint(x / scale) + zero_point); NaN gives 0.

    Args:
        x: fp32, bf16 or fp16 [..., K].
        scale: fp32 of shape x.shape[:-1] or [1].
        zero_point: int32 likewise, in [0, 255]; 0 where symmetric.
        symmetric: q is int8 in [-127, 127]; otherwise uint8.

    Raises:
        RuntimeError: another dtype, device, shape, or, on the CPU, a zero point out of range.
    """
    _check_device(x=x, scale=scale, zero_point=zero_point)
    _check_dtype("x", x, *FLOAT_DTYPES)
    _lead("x", x)
    _check_per_row("scale", scale, x, torch.float32)
    _check_per_row("zero_point", zero_point, x, torch.int32)
    return x.new_empty(x.shape, dtype=_q_dtype(symmetric))


@_fake("int_mm")
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
    _check_device(q=q, zero_point=zero_point, packed=packed)
    _check_dtype("q", q, torch.uint8, torch.int8)
    _check_dtype("packed", packed, torch.int8)
    lead = _lead("q", q)
    _check_per_row("zero_point", zero_point, q, torch.int32)
    return q.new_empty((*lead, n), dtype=torch.int32)


@_fake("rescale")
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
    _check_device(acc=acc, scale=scale, weight_scale=weight_scale, bias=bias)
    _check_dtype("acc", acc, torch.int32)
    _lead("acc", acc)
    _check_per_row("scale", scale, acc, torch.float32)
    _check_dtype("weight_scale", weight_scale, torch.float32)
    _check_columns(acc.shape[-1], weight_scale, bias)
    return acc.new_empty(acc.shape, dtype=dtype)


@_fake("scaled_mm")
def _(q, scale, zero_point, packed, weight_scale, bias, dtype):
    """int_mm and rescale in one step, with the arguments of both; the same bits.

    Returns:
        [..., N] in dtype.

    Raises:
        RuntimeError: as int_mm and rescale.
    """
    _check_device(
        q=q, scale=scale, zero_point=zero_point, packed=packed, weight_scale=weight_scale, bias=bias
    )
    _check_dtype("q", q, torch.uint8, torch.int8)
    lead = _lead("q", q)
    _check_per_row("scale", scale, q, torch.float32)
    _check_per_row("zero_point", zero_point, q, torch.int32)
    n = _columns(packed, q.shape[-1], weight_scale, bias)
    return q.new_empty((*lead, n), dtype=dtype)


def _fake_linear(x, packed, weight_scale, bias=None, per_token=True, symmetric=False):
    """A linear layer whose input is quantized at run time: quantize_activation and scaled_mm fused.

    Under autocast x alone is cast. The gradient of x is that of a float linear with the
    dequantized weight; the other arguments get none. The overload `inference` is the same without
    a gradient, and cheaper to call.

    Args:
        x: fp32, bf16 or fp16 [..., K], any strides.
        packed: what pack_weight gave, of that K.
        weight_scale: fp32 [N] or [1].
        bias: fp32, bf16 or fp16 [N], or None.
        per_token, symmetric: as in choose_qparams.

    Returns:
        [..., N] in x's dtype.

    Raises:
        RuntimeError: another dtype, device or shape.
    """
    _check_device(x=x, packed=packed, weight_scale=weight_scale, bias=bias)
    _check_dtype("x", x, *FLOAT_DTYPES)
    lead = _lead("x", x)
    return x.new_empty((*lead, _columns(packed, x.shape[-1], weight_scale, bias)))


def _save_weight(ctx, inputs, output):
    x, packed, weight_scale, *_ = inputs
    ctx.save_for_backward(packed, weight_scale)
    ctx.in_features, ctx.out_features, ctx.dtype = x.shape[-1], output.shape[-1], x.dtype


def _input_gradient(ctx, gradient):
    """That of a float linear with the dequantized weight, in fp32; rounding passes through."""
    packed, weight_scale = ctx.saved_tensors
    weight = _ops.unpack_weight(packed, ctx.out_features, ctx.in_features)
    weight = weight.to(torch.float32) * weight_scale[:, None]
    return (gradient.to(torch.float32) @ weight).to(ctx.dtype), None, None, None, None, None


torch.library.register_autograd(
    "dynquant::linear_dynamic", _input_gradient, setup_context=_save_weight, lib=_library
)


@_fake("quantize_embedding")
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
    _check_dtype("weight", weight, *FLOAT_DTYPES)
    torch._check(weight.dim() == 2, lambda: "weight must have two dimensions [V, D]")
    count, dim = weight.shape
    rows = weight.new_empty((count, _row_bytes(dim, bits)), dtype=torch.uint8)
    return rows, weight.new_empty((count, 2), dtype=torch.float32)


def _row_bytes(dim, bits):
    torch._check(bits in (8, 4), lambda: f"bits must be 8 or 4, got {bits}")
    return dim if bits == 8 else (dim + 1) // 2


def _check_table(indices, rows, qparams, bits, dim, dtype, **others):
    _check_device(indices=indices, rows=rows, qparams=qparams, **others)
    _check_dtype("indices", indices, torch.int64, torch.int32)
    _check_dtype("rows", rows, torch.uint8)
    _check_dtype("qparams", qparams, torch.float32)
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


@_fake("embedding")
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


@_fake("embedding_bag")
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
        _check_dtype("per_sample_weights", per_sample_weights, *FLOAT_DTYPES)
        torch._check(mode == 0, lambda: f"per_sample_weights need mode 0 (sum), got {mode}")
        torch._check(
            per_sample_weights.shape == indices.shape,
            lambda: "per_sample_weights must have the shape of indices",
        )
    if offsets is None:
        return indices.new_empty((indices.shape[0], dim), dtype=dtype)
    _check_dtype("offsets", offsets, torch.int64, torch.int32)
    torch._check(offsets.dim() == 1, lambda: "offsets must have one dimension")
    bags = offsets.shape[0] - 1 if include_last_offset else offsets.shape[0]
    return indices.new_empty((bags, dim), dtype=dtype)


for _name in ("embedding", "embedding_bag"):  # neither has a gradient
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")


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
    _check_device(x=x, half_weight=half_weight, bias=bias)
    _check_dtype("x", x, *FLOAT_DTYPES)
    _check_dtype("half_weight", half_weight, torch.bfloat16, torch.float16)
    torch._check(half_weight.dim() == 2, lambda: "half_weight must have two dimensions [N, K]")
    lead = _lead("x", x)
    n, k = half_weight.shape
    torch._check(x.shape[-1] == k, lambda: f"x must have K = {k} as its last dimension")
    _check_bias(n, bias)
    return x.new_empty((*lead, n))


def _save_half_weight(ctx, inputs, output):
    x, weight, _ = inputs
    ctx.save_for_backward(weight)
    ctx.dtype = x.dtype


def _half_input_gradient(ctx, gradient):
    (weight,) = ctx.saved_tensors
    return (gradient.to(torch.float32) @ weight.to(torch.float32)).to(ctx.dtype), None, None


torch.library.register_autograd(
    "dynquant::linear_half", _half_input_gradient, setup_context=_save_half_weight, lib=_library
)


def _register_autocast(name, op, inputs):
    """Under autocast the first `inputs` arguments are cast, and the output has their dtype."""

    def register(device, key):
        excluded = torch._C.DispatchKeySet(key)

        def cast_inputs(*arguments, **options):
            dtype = torch.get_autocast_dtype(device)
            # float64 is left for the op to refuse.
            cast = (x.to(dtype) if x.dtype in FLOAT_DTYPES else x for x in arguments[:inputs])
            with torch._C._ExcludeDispatchKeyGuard(excluded):
                return op(*cast, *arguments[inputs:], **options)

        _library.impl(name, cast_inputs, key.name)

    register("cpu", torch._C.DispatchKey.AutocastCPU)
    register("cuda", torch._C.DispatchKey.AutocastCUDA)


def _register_with_inference(name, fake, inputs):
    """The fake and autocast of an op with a gradient and of its overload without one."""
    op = getattr(_ops, name)
    for full_name, overload in ((name, op.default), (f"{name}.inference", op.inference)):
        _fake(full_name)(fake)
        _register_autocast(full_name, overload, inputs)
    # Without this the dispatcher looks for a gradient at every call.
    _library.impl(f"{name}.inference", torch.library.fallthrough_kernel, "Autograd")


_register_with_inference("linear_dynamic", _fake_linear, inputs=1)
_register_with_inference("linear_half", _fake_linear_half, inputs=1)
