"""The float functions' and the blocks' part of the numeric specification in numpy, bit for bit.

Everything in fp32, each operation rounded on its own. Sums over a row are 16 partial sums, of which
number j takes the values j, j + 16, ... in turn; then j takes in j + 8, j + 4, j + 2, j + 1.
"""

import numpy as np
import reference as ref
import reference_rnn
from reference import F, ignoring_overflow

# Of each power of the distance, in eight ranges.
GELU_FACTORS = """
0 0.169605494 0.110195018 0.0350905471 0.0063273171 0.000670544687 4.23285637e-05 1.60079821e-06
0.355555564 0.012938628 -0.0916559473 -0.0504824482 -0.0125414096 -0.00167965936 -0.000127811902
-5.65209848e-06 -0.201736599 -0.117057331 0.000833536382 0.0264379196 0.0107528502 0.00193019456
0.000182116491 9.56772965e-06 -3.01686828e-06 0.0461249985 0.0244618282 -0.00288443873
-0.0048713237 -0.00132147828 -0.000161318167 -1.02591994e-05 0.0170262642 0.00238332665
-0.00938107632 -0.00312385918 0.000954568968 0.000576143386 9.84685175e-05 7.84509029e-06
-8.16152533e-05 -0.00412376784 1.42850638e-07 0.00147458992 0.000182211239 -0.000146442006
-4.39292198e-05 -4.79924938e-06 -0.00118100736 0.000150753069 0.000721216784 -0.000153210945
-0.000155337082 9.54656116e-06 1.31849984e-05 2.08662232e-06
"""
GELU_FACTORS = np.array(GELU_FACTORS.split(), F).reshape(7, 8)


@ignoring_overflow
def gelu(x):
    a = np.minimum(np.abs(x * F(1.40625)), F(7.4999995))  # NaN stays
    number = np.rint(np.where(np.isnan(a), F(0), a)).astype(int)
    t = a - number.astype(F)
    total = GELU_FACTORS[6][number]
    for factors in GELU_FACTORS[5::-1]:
        total = total * t + factors[number]
    return np.where(x < 0, F(0), x) - total


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


@ignoring_overflow
def relu_squared(x):
    return np.square(reference_rnn.relu(x))


ACTIVATIONS = {
    "none": lambda x: x,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "silu": silu,
    "relu": reference_rnn.relu,
    "quick_gelu": quick_gelu,
    "sigmoid": reference_rnn.sigmoid,
    "tanh": reference_rnn.tanh,
    "relu_squared": relu_squared,
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
def rms_norm(x, weight=None, eps=1e-6, dtype="float32", plus_one=False):
    weight = F(1) + weight if plus_one and weight is not None else weight
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


def rotary(x, cos, sin, dtype="float32", interleaved=False):
    """x [..., D], cos and sin [..., R] with R <= D; interleaved, [..., R / 2]."""
    if interleaved:
        cos, sin = np.repeat(cos, 2, -1), np.repeat(sin, 2, -1)
    half = cos.shape[-1] // 2
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        swapped = np.stack([-turned[..., 1::2], turned[..., ::2]], -1).reshape(turned.shape)
    else:
        swapped = np.concatenate([-turned[..., half:], turned[..., :half]], -1)
    return np.concatenate([ref.round_to(turned * cos + swapped * sin, dtype), rest], -1)


@ignoring_overflow
def scores(s, scale, added, reached, softcap=None, sink=None):
    """What becomes of the products of queries and keys: p and its sums."""
    if softcap is not None:
        s = activation(s * (F(scale) / F(softcap)), "tanh")
    s = s * F(scale if softcap is None else softcap)
    for row in added:
        s = s + row
    s = np.where(reached, s, F(-np.inf))
    most = np.fmax.reduce(s, axis=-1, keepdims=True, initial=np.finfo(F).min)
    if sink is not None:
        most = np.fmax(most, F(sink))
    p = exp(s - most)
    total = row_sum(p)
    if sink is not None:
        total = total + exp(F(sink) - most)
    return p, np.where(total == 0, F(1), total)


@ignoring_overflow
def distance_bias(query, key, by_query, by_key, scale, integers=True):
    """What is added to the scores of a head for distances, [L, S].

    query [L, D], key [S, D]. by_query, by_key: vectors [L + S - 1, D] for j - i + L - 1, that the
    query i and the key j are multiplied by, or None.
    """
    length = len(query)
    i, j = np.ogrid[:length, : len(key)]
    numbers = j - i + length - 1
    terms = []
    for rows, vectors, number in ((query, by_query, i), (key, by_key, j)):
        if vectors is None:
            continue
        if integers:
            q, q_scale, _ = ref.quantize_activation(vectors, symmetric=True)
            products = ref.linear_dynamic(rows, q, q_scale, None)
        else:
            products = ref.linear_half(rows, vectors, None)
        terms.append(products[number, numbers])
    return sum(terms[1:], start=terms[0]) * F(scale)


@ignoring_overflow
def attention_head(
    query,
    key,
    value,
    scale,
    added,
    causal,
    integers=True,
    dtype="float32",
    kept_scales=None,
    softcap=None,
    sink=None,
):
    """query [L, D], key and value [S, D], added: arrays that spread to [L, S].

    kept_scales: of integer keys and values, [S] each.
    """
    shape = len(query), len(key)
    reached = np.tri(*shape, dtype=bool) if causal else np.ones(shape, bool)
    if integers:
        keys, key_scale, _ = ref.quantize_activation(key, symmetric=True)
        values, value_scale, _ = ref.quantize_activation(value, symmetric=True)
        products = ref.linear_dynamic(query, keys, key_scale, None)
        p, total = scores(products, scale, added, reached, softcap, sink)
        weights = np.where(reached, p * value_scale, F(0))
        values = np.ascontiguousarray(values.T)
        y = ref.linear_dynamic(weights, values, np.ones(1, F), None)
    else:
        key_scale, value_scale = kept_scales or (F(1), F(1))
        products = ref.linear_half(query, key, None) * key_scale
        p, total = scores(products, scale, added, reached, softcap, sink)
        weights = np.where(reached, p * value_scale, F(0))
        y = ref.linear_half(weights, np.ascontiguousarray(value.T), None)
    return ref.round_to(y / total, dtype)
