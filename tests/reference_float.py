"""The float functions' and the blocks' part of the numeric specification in numpy, bit for bit.

Everything in fp32, each operation rounded on its own. Sums over a row are 16 partial sums, of which
number j takes the values j, j + 16, ... in turn; then j takes in j + 8, j + 4, j + 2, j + 1.
"""

import numpy as np
import reference as ref
import reference_rnn
from reference import F, ignoring_overflow

ERF_ABOVE = [
    F(c)
    for c in (0.797884524, 0.0650876686, 0.00921719335, 3.13707569e-4, 1.28155862e-5, 4.94628267e-8)
]
ERF_BELOW = [
    F(c) for c in (1, 0.248241633, 0.0279262662, 1.81715842e-3, 7.04933846e-5, 1.25886993e-6)
]


def _polynomial(c, u):
    u2 = u * u
    return (c[0] + c[1] * u) + u2 * ((c[2] + c[3] * u) + u2 * (c[4] + c[5] * u))


@ignoring_overflow
def gelu(x):
    above = np.maximum(F(-5.27), x)
    z = np.minimum(F(5.27), above)
    half = F(0.5) * above
    return half + ((half * z) * _polynomial(ERF_ABOVE, z * z)) / _polynomial(ERF_BELOW, z * z)


@ignoring_overflow
def gelu_tanh(x):
    inner = F(0.79788456) * (x + F(0.044715) * x * x * x)
    return (F(0.5) * x) * (F(1) + reference_rnn.tanh(inner))


@ignoring_overflow
def silu(x):
    return x * reference_rnn.sigmoid(x)


@ignoring_overflow
def quick_gelu(x):
    return x * reference_rnn.sigmoid(F(1.702) * x)


ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "relu": reference_rnn.relu,
    "quick_gelu": quick_gelu,
    "sigmoid": reference_rnn.sigmoid,
    "tanh": reference_rnn.tanh,
}


def activation(x, name, dtype="float32"):
    return ref.round_to(ACTIVATIONS[name](x), dtype)


@ignoring_overflow
def row_sum(x):
    """The sum over the last axis."""
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 16)])
    partial = np.zeros(x.shape[:-1] + (16,), F)
    for i in range(0, x.shape[-1], 16):
        partial = partial + x[..., i : i + 16]
    for step in (8, 4, 2, 1):
        partial = partial[..., :step] + partial[..., step : 2 * step]
    return partial


@ignoring_overflow
def _normalized(x, mean, weight, bias, eps, dtype):
    distance = x - mean
    variance = row_sum(distance * distance) / F(x.shape[-1])
    y = distance * (F(1) / np.sqrt(variance + F(eps)))
    y = y if weight is None else y * weight
    return ref.round_to(y if bias is None else y + bias, dtype)


@ignoring_overflow
def layer_norm(x, weight=None, bias=None, eps=1e-5, dtype="float32"):
    return _normalized(x, row_sum(x) / F(x.shape[-1]), weight, bias, eps, dtype)


@ignoring_overflow
def rms_norm(x, weight=None, eps=1e-6, dtype="float32"):
    return _normalized(x, F(0), weight, None, eps, dtype)


def exp(x):
    """exp(x) for x <= 0; below -88 it is 0."""
    scale, p = reference_rnn._split_exp(np.maximum(F(-88), x))
    return scale + scale * p


@ignoring_overflow
def softmax(x, dtype="float32"):
    most = np.fmax.reduce(x, axis=-1, keepdims=True, initial=F(-np.inf))
    p = exp(x - most)
    return ref.round_to(p / row_sum(p), dtype)


def rotary(x, cos, sin, dtype="float32"):
    """x [..., D], cos and sin [..., R] with R <= D."""
    half = cos.shape[-1] // 2
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    swapped = np.concatenate([-turned[..., half:], turned[..., :half]], -1)
    return np.concatenate([ref.round_to(turned * cos + swapped * sin, dtype), rest], -1)


@ignoring_overflow
def scores(s, scale, added, reached):
    """What becomes of the products of queries and keys: p and its sums."""
    s = s * F(scale)
    for row in added:
        s = s + row
    s = np.where(reached, s, F(-np.inf))
    p = exp(s - np.fmax.reduce(s, axis=-1, keepdims=True, initial=F(-np.inf)))
    return p, row_sum(p)


@ignoring_overflow
def attention_head(query, key, value, scale, added, causal, integers=True, dtype="float32"):
    """query [L, D], key and value [S, D], added: arrays that spread to [L, S]."""
    shape = len(query), len(key)
    reached = np.tri(*shape, dtype=bool) if causal else np.ones(shape, bool)
    if integers:
        keys, key_scale, _ = ref.quantize_activation(key, symmetric=True)
        values, value_scale, _ = ref.quantize_activation(value, symmetric=True)
        products = ref.linear_dynamic(query, keys, key_scale, None)
        p, total = scores(products, scale, added, reached)
        weights = np.where(reached, p * value_scale, F(0))
        values = np.ascontiguousarray(values.T)
        y = ref.linear_dynamic(weights, values, np.ones(1, F), None)
    else:
        p, total = scores(ref.linear_half(query, key, None), scale, added, reached)
        y = ref.linear_half(p, np.ascontiguousarray(value.T), None)
    return ref.round_to(y / total, dtype)
