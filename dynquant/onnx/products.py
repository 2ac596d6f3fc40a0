"""Products x @ weight.T + bias: int8 weights with activations quantized at run time, or floats."""

from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch

from dynquant import _C
from dynquant.onnx.builder import array_of

UINT8, INT32, FLOAT = ir.DataType.UINT8, ir.DataType.INT32, ir.DataType.FLOAT
_HEADER = np.dtype([("magic", "<u4"), ("version", "<u4"), ("n", "<i8"), ("k", "<i8")])


class Scheme(NamedTuple):
    """How x is quantized, as in a QConfig."""

    per_token: bool = True
    symmetric: bool = False
    bits: int = 8

    @property
    def is_standard(self):
        """Whether DynamicQuantizeLinear does it."""
        return not (self.per_token or self.symmetric) and self.bits == 8


class Quantized(NamedTuple):
    """Activations in bytes.

    q: uint8, of the shape of x; for integers in 16 bits with a dimension before it, for their
        higher and lower bytes.
    zero_point: a uint8 scalar where `is_scalar`; otherwise int32, which broadcasts against sums of
        products with q.
    scale: fp32, which broadcasts against the result.
    """

    q: object
    zero_point: object
    scale: object
    is_scalar: bool = False
    has_two_bytes: bool = False


def integers_of(b, x, scheme):
    """Integers, scale and zero point of fp32 x, all in fp32 and broadcasting against each other.

    The formula is that of dynquant, also for rows that are zero, tiny, huge or not finite. The zero
    point is None where symmetric.
    """
    axes = b.constant([-1], np.int64) if scheme.per_token else None
    zero = b.constant(0)
    low = b("Min", b("ReduceMin", x, axes, keepdims=1), zero)
    high = b("Max", b("ReduceMax", x, axes, keepdims=1), zero)
    if scheme.symmetric:
        span, steps = b("Max", b("Neg", low), high), b.constant(127)
    else:
        span, steps = b("Sub", high, low), b.constant(2**scheme.bits - 1)
    inv = b("Div", steps, span)
    is_tiny = b("IsInf", inv)
    inv = b("Where", is_tiny, zero, inv)
    scale = b("Where", is_tiny, b.constant(1), b("Div", span, steps))
    scaled = b("Mul", x, inv)
    # ReduceMin and ReduceMax of ONNX Runtime pass NaN over; a sum, here of finite values that are
    # not large, has it.
    is_nan = b("IsNaN", b("ReduceSum", scaled, axes, keepdims=1))
    scale = b("Where", b("Or", b("IsInf", span), is_nan), b.constant(np.nan), scale)
    if scheme.symmetric:
        return limited(b, scaled, None, scheme), scale, None
    zero_point = b("Clip", b("Round", b("Mul", b("Neg", low), inv)), zero, steps)
    return limited(b, scaled, zero_point, scheme), scale, zero_point


def limited(b, scaled, zero_point, scheme):
    """The integers of x / scale, in fp32."""
    q = b("Round", scaled)
    if scheme.symmetric:
        return b("Clip", q, b.constant(-127), b.constant(127))
    return b("Clip", b("Add", q, zero_point), b.constant(0), b.constant(2**scheme.bits - 1))


def quantized(b, x, scheme):
    """x, fp32 [..., K], Quantized as dynquant does it."""
    if scheme.is_standard:
        q, scale, zero_point = b("DynamicQuantizeLinear", x, outputs=3)
        return Quantized(q, zero_point, scale, is_scalar=True)
    q, scale, zero_point = integers_of(b, x, scheme)
    return in_bytes(b, q, zero_point, scale, scheme)


def in_bytes(b, q, zero_point, scale, scheme):
    """The Quantized of integers and their zero point in fp32, which is None where symmetric."""
    if scheme.symmetric:
        shifted = b("Cast", b("Add", q, b.constant(128)), to=int(UINT8))
        return Quantized(shifted, b.constant(128, np.uint8), scale, is_scalar=True)
    if scheme.bits == 16:
        q, zero_point = _both_bytes(b, q), _both_bytes(b, zero_point)
    q, zero_point = b("Cast", q, to=int(UINT8)), b("Cast", zero_point, to=int(INT32))
    return Quantized(q, zero_point, scale, has_two_bytes=scheme.bits == 16)


def _both_bytes(b, q):
    """[2, ...], the higher and the lower bytes of integers below 65536, all in fp32."""
    high = b("Floor", b("Mul", q, b.constant(1 / 256)))
    low = b("Sub", q, b("Mul", high, b.constant(256)))
    first = b.constant([0], np.int64)
    return b("Concat", *(b("Unsqueeze", one, first) for one in (high, low)), axis=0)


def _unpacked(bytes_):
    """The rows [N, K] of the packed weight that `bytes_` begin with."""
    n, k = (int(bytes_[: _HEADER.itemsize].view(_HEADER)[0][key]) for key in ("n", "k"))
    packed = torch.from_numpy(bytes_[: _C.packed_bytes(n, k)].copy())
    return torch.ops.dynquant.unpack_weight(packed, n, k).numpy()


class Int8Weight:
    """A packed weight as constants: int8 [K, N], or uint8 with the zero point 128, and its sums.

    Of several, one in each row, the constants have the number of rows as their first dimension.
    """

    def __init__(self, b, packed, unsigned):
        bytes_ = array_of(packed)
        if bytes_.ndim == 1:
            rows = _unpacked(bytes_)
        else:
            rows = np.stack([_unpacked(row) for row in bytes_])
        name = packed.name.replace("packed", "weight")
        if unsigned:
            shifted = (rows.astype(np.int16) + 128).astype(np.uint8)
            self._matrix = b.named(f"{name}_uint8", np.ascontiguousarray(shifted.swapaxes(-1, -2)))
            self._zero_point = b.constant(128, np.uint8)
        else:
            self._matrix = b.named(f"{name}_int8", np.ascontiguousarray(rows.swapaxes(-1, -2)))
            self._zero_point = None
        sums = rows.sum(-1, dtype=np.int32)
        sums = sums if bytes_.ndim == 1 else sums[:, None]
        self._sums = lambda b: b.named(f"{name}_sums", sums)

    def sums_of(self, b, quantized):
        """Sums of products with a Quantized, in fp32; exact, but for the sum of two bytes' sums."""
        q, zero_point, _, is_scalar, has_two_bytes = quantized
        inputs = [q, self._matrix, zero_point if is_scalar else None, self._zero_point]
        while inputs[-1] is None:
            inputs.pop()
        sums = b("MatMulInteger", *inputs)
        if not is_scalar:
            sums = b("Sub", sums, b("Mul", zero_point, self._sums(b)))
        sums = b("Cast", sums, to=int(FLOAT))
        if not has_two_bytes:
            return sums
        high, low = (b("Gather", sums, b.constant(place, np.int64), axis=0) for place in (0, 1))
        return b("Add", b("Mul", high, b.constant(256)), low)


class Int8Product:
    """x @ weight.T + bias with an int8 weight.

    Args:
        packed, weight_scale, bias: the arguments of the op linear_dynamic, as ir.Values.
        scheme: how x is quantized.
        unsigned: whether the weight becomes uint8.
    """

    def __init__(self, b, packed, weight_scale, bias, scheme, unsigned):
        self._weight = Int8Weight(b, packed, unsigned)
        self._weight_scale, self._scheme = weight_scale, scheme
        self._bias = None if bias is None else b.floats(bias)

    def __call__(self, b, x):
        """fp32 [..., N] of fp32 x [..., K]."""
        return self.of_quantized(b, quantized(b, x, self._scheme))

    def of_quantized(self, b, quantized):
        sums = self._weight.sums_of(b, quantized)
        if self._scheme.is_standard:  # in the order in which ONNX Runtime finds one fused operator
            y = b("Mul", sums, b("Mul", quantized.scale, self._weight_scale))
        else:
            y = b("Mul", b("Mul", sums, quantized.scale), self._weight_scale)
        return y if self._bias is None else b("Add", y, self._bias)


class FloatProduct:
    """x @ weight.T + bias with a weight [N, K] in 16 or 32 bits, in fp32."""

    def __init__(self, b, weight, bias):
        matrix = b.named(f"{weight.name}_transposed", lambda: array_of(weight).T.copy())
        self._matrix = b.floats(matrix)
        self._bias = None if bias is None else b.floats(bias)

    def __call__(self, b, x):
        y = b("MatMul", x, self._matrix)
        return y if self._bias is None else b("Add", y, self._bias)


def product_of(b, weight, weight_scale, bias, scheme, unsigned):
    """The Int8Product or, without a scale, the FloatProduct of a weight."""
    if weight_scale is None:
        return FloatProduct(b, weight, bias)
    return Int8Product(b, weight, weight_scale, bias, scheme, unsigned)
