"""The numeric specification in numpy: the oracle of every test, which asks for equal bits.

Arithmetic is IEEE fp32, round to nearest even, subnormals kept, one rounding for each operation as
written. Floats arrive as float32 arrays, since bf16 and fp16 widen to fp32 without loss; a result
in a narrower dtype comes back as the float32 array that holds its exact values.

Activations have 8 bits, or, where they are asymmetric, 16: q = 256 * h + l, two bytes whose sums
are exact on their own and joined in float.

A row is the last axis. `scale` and `zero_point` have the shape x.shape[:-1] (per_token) or [1].
"""

import numpy as np

F = np.float32  # written at every constant, so that none widens an operation to float64
ignoring_overflow = np.errstate(all="ignore")


def quantize_weight(w, per_channel=True):
    """w [N, K] -> q int8 [N, K] in -127..127, scale [N] or [1]."""
    if not np.isfinite(w).all():
        raise ValueError("weight holds NaN or Inf")
    amax = np.max(np.abs(w), axis=1 if per_channel else None, initial=F(0))
    scale = np.atleast_1d(amax / F(127))
    vanishing = scale < F(2.0**-126)
    scale = np.where(vanishing, F(1), scale)
    q = np.clip(np.rint(w / scale[:, None]), F(-127), F(127))
    return np.where(vanishing[:, None], F(0), q).astype(np.int8), scale


@ignoring_overflow
def _qparams(x, per_token, symmetric, bits):
    """scale, zero_point and the factor `inv` (0 where every q of the row is 0)."""
    rows = x if per_token else x.reshape(1, -1)
    lo = np.min(rows, axis=-1, initial=F(0))  # NaN in the row makes both NaN
    hi = np.max(rows, axis=-1, initial=F(0))
    span, steps = (np.maximum(-lo, hi), F(127)) if symmetric else (hi - lo, F(2**bits - 1))
    scale, inv = span / steps, steps / span
    zero_point = np.zeros_like(span) if symmetric else np.clip(np.rint(-lo * inv), F(0), steps)
    broken = ~np.isfinite(span)  # NaN or Inf in the row, or hi - lo overflows
    flat = ~broken & ~np.isfinite(inv)  # the range is 0 or tiny
    scale = np.where(broken, F(np.nan), np.where(flat, F(1), scale))
    void = broken | flat
    return scale, np.where(void, F(0), zero_point).astype(np.int32), np.where(void, F(0), inv)


def choose_qparams(x, per_token=True, symmetric=False, bits=8):
    scale, zero_point, _ = _qparams(x, per_token, symmetric, bits)
    return scale, zero_point


def _per_row(v, lead):
    """v against the rows of an array whose leading shape is `lead`."""
    return v[..., None] if v.shape == lead else v


def _to_integers(scaled, zero_point, symmetric, bits):
    if symmetric:
        q, dtype = np.clip(np.rint(scaled), F(-127), F(127)), np.int8
    else:
        q = np.clip(np.rint(scaled) + zero_point.astype(F), F(0), F(2**bits - 1))
        dtype = {8: np.uint8, 16: np.uint16}[bits]
    return np.where(np.isnan(q), F(0), q).astype(dtype)


@ignoring_overflow
def quantize_activation(x, per_token=True, symmetric=False, bits=8):
    """x [..., K] -> q uint8, in 16 bits uint16 (symmetric: int8) [..., K], scale, zero_point."""
    scale, zero_point, inv = _qparams(x, per_token, symmetric, bits)
    lead = x.shape[:-1]
    inv = _per_row(inv, lead)
    used = np.where(inv == 0, F(0), x)  # 0 * Inf would be NaN
    zero = _per_row(zero_point, lead)
    return _to_integers(used * inv, zero, symmetric, bits), scale, zero_point


@ignoring_overflow
def quantize_with(x, scale, zero_point, symmetric=False, bits=8):
    """q from given parameters; a quotient that is NaN gives 0."""
    lead = x.shape[:-1]
    return _to_integers(x / _per_row(scale, lead), _per_row(zero_point, lead), symmetric, bits)


def int_mm(q, zero_point, w):
    """q [..., K], w int8 [N, K] -> int32 [..., N]; float64 holds every such sum exactly."""
    centered = q.astype(np.float64) - _per_row(zero_point, q.shape[:-1])
    acc = (centered @ w.T.astype(np.float64)).astype(np.int64)
    assert np.abs(acc).max(initial=0) < 2**31, "the sum does not fit int32"
    return acc.astype(np.int32)


@ignoring_overflow
def rescale(acc, scale, weight_scale, bias, dtype):
    """acc [..., N], int32 or float32 -> y [..., N], rounded to `dtype` by its name."""
    y = (acc.astype(F) * _per_row(scale, acc.shape[:-1])) * weight_scale
    if bias is not None:
        y = y + bias
    return round_to(y, dtype)


@ignoring_overflow
def round_to(y, dtype):
    """float32 -> the nearest values of 'float32', 'float16' or 'bfloat16', ties to even."""
    if dtype == "float32":
        return y
    if dtype == "float16":
        return y.astype(np.float16).astype(F)
    assert dtype == "bfloat16", dtype
    bits = y.view(np.uint32)
    to_even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + to_even) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(y), F(np.nan), rounded.view(F))


def scaled_mm(q, scale, zero_point, w, weight_scale, bias, dtype):
    if q.dtype == np.uint16:
        high, low = int_mm(q >> 8, zero_point >> 8, w), int_mm(q & 255, zero_point & 255, w)
        acc = F(256) * high.astype(F) + low.astype(F)
    else:
        acc = int_mm(q, zero_point, w)
    return rescale(acc, scale, weight_scale, bias, dtype)


def linear_dynamic(
    x, w, weight_scale, bias, per_token=True, symmetric=False, dtype="float32", bits=8
):
    q, scale, zero_point = quantize_activation(x, per_token, symmetric, bits)
    return scaled_mm(q, scale, zero_point, w, weight_scale, bias, dtype)


def windows(x, kernel_size, stride=1, left=0, right=0, dilation=1):
    """x [B, C, L] -> [B, windows, kernel_size * C], one position of the kernel after the other."""
    x = np.pad(x, [(0, 0), (0, 0), (left, right)])
    count = (x.shape[2] - dilation * (kernel_size - 1) - 1) // stride + 1
    positions = np.arange(count)[:, None] * stride + np.arange(kernel_size) * dilation
    seen = x[:, :, positions].transpose(0, 2, 3, 1)  # [B, windows, kernel_size, C]
    return seen.reshape(len(x), count, kernel_size * x.shape[1])


def conv1d_dynamic(
    x,
    w,
    weight_scale,
    bias,
    sizes,
    per_token=True,
    symmetric=False,
    dtype="float32",
    bits=8,
    groups=1,
):
    """x [B, C, L], w int8 [N, kernel_size * C / groups], sizes: the arguments of `windows`."""
    n = len(w) // groups
    whole = None if per_token else quantize_activation(x, False, symmetric, bits)
    results = []
    for group, channels in enumerate(np.split(np.arange(x.shape[1]), groups)):
        if per_token:
            rows = windows(x[:, channels], *sizes)
            q, scale, zero_point = quantize_activation(rows, True, symmetric, bits)
        else:  # one range for all of x, of which the windows may leave something out
            q, scale, zero_point = whole
            blank = int(zero_point[0])  # what stands for the padding's zeros
            q = windows(q[:, channels].astype(np.int64) - blank, *sizes) + blank
            q = q.astype({8: np.int8 if symmetric else np.uint8, 16: np.uint16}[bits])
        own = slice(group * n, group * n + n)
        scales = weight_scale[own] if len(weight_scale) == len(w) else weight_scale
        added = None if bias is None else bias[own]
        results.append(scaled_mm(q, scale, zero_point, w[own], scales, added, dtype))
    return np.concatenate(results, axis=-1).swapaxes(1, 2)


def fma(x, y, z):
    """x * y + z in fp32 with one rounding, of fp32 values."""
    product, z = x.astype(np.float64) * y, z.astype(np.float64)  # the product is exact
    total = product + z
    back = total - product
    error = (product - (total - back)) + (z - back)  # exact too
    # Where the sum was rounded, its odd neighbour: fp64 has bits enough to round again from there.
    is_even = total.view(np.int64) & 1 == 0
    neighbour = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & np.isfinite(total) & is_even, neighbour, total).astype(F)


@ignoring_overflow
def linear_half(x, w, bias, dtype="float32"):
    """x [..., K], w [N, K] (the values of its 16 bits) -> y [..., N], in this order of sums."""
    pad = -w.shape[1] % 16
    x, w = (np.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, pad)]) for v in (x, w))
    x = x[..., None, :]
    partial = np.zeros(np.broadcast_shapes(x.shape[:-1], w.shape[:-1]) + (16,), F)
    for k in range(0, w.shape[-1], 16):
        partial = fma(x[..., k : k + 16], w[..., k : k + 16], partial)
    for step in (8, 4, 2, 1):
        partial = partial[..., :step] + partial[..., step : 2 * step]
    y = partial[..., 0] + F(0)  # never -0: whether zeros were added to it leaves no trace
    return round_to(y if bias is None else y + bias, dtype)


@ignoring_overflow
def quantize_embedding(w, bits):
    """w [V, D] -> q uint8 [V, D] (one value each, also in 4 bits), qparams [V, 2]."""
    levels = F(2**bits - 1)
    if not w.shape[1]:
        return w.astype(np.uint8), np.tile(F([1, 0]), (len(w), 1))
    lo, hi = np.min(w, axis=1) + F(0), np.max(w, axis=1) + F(0)
    span = hi - lo
    if not np.isfinite(span).all():
        raise ValueError("weight holds NaN or Inf, or spans more than fp32 can hold")
    scale = span / levels
    flat = scale < F(2.0**-126)
    scale = np.where(flat, F(1), scale)
    q = np.clip(np.rint((w - lo[:, None]) / scale[:, None]), F(0), levels)
    return np.where(flat[:, None], F(0), q).astype(np.uint8), np.stack([scale, lo], axis=1)


def two_to_a_byte(q):
    """uint8 [V, D] of 4 bits each -> [V, (D + 1) // 2], the first of two in the lower bits."""
    q = np.pad(q, [(0, 0), (0, q.shape[1] % 2)])
    return q[:, 0::2] | q[:, 1::2] << np.uint8(4)


@ignoring_overflow
def embedding(indices, q, qparams, dtype="float32"):
    scale, offset = (qparams[indices, i][..., None] for i in (0, 1))
    return round_to(q[indices].astype(F) * scale + offset, dtype)


@ignoring_overflow
def embedding_bag(bags, q, qparams, mode, weights=None, padding_idx=-1, dtype="float32"):
    """bags: a list of lists of indices; weights: likewise, for sums."""
    out = np.zeros((len(bags), q.shape[1]), F)
    for b, bag in enumerate(bags):
        total = np.full(q.shape[1], -np.inf if mode == "max" else 0, F)
        count = 0
        for i, index in enumerate(bag):
            if index == padding_idx:
                continue
            value = embedding(index, q, qparams)
            if mode == "max":
                total = np.where(value > total, value, total)
            else:
                total = total + (value if weights is None else value * weights[b][i])
            count += 1
        if count:
            out[b] = total / F(count) if mode == "mean" else total
    return round_to(out, dtype)
