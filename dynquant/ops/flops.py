"""What torch.utils.flop_counter counts for the ops: as many operations as for the float ones.

Formulas get the shapes of tensors, as torch's own do; a product of [M, K] and [K, N] counts
2 * M * N * K. Norms, activations and whatever quantizing takes count nothing, as in a float model.
"""

from math import prod

from torch.utils.flop_counter import register_flop_formula

import dynquant.ops.grouped  # noqa: F401 (defines an op)
import dynquant.ops.mixers  # noqa: F401 (defines ops)
from dynquant import _C
from dynquant.ops.encoder import layers_of
from dynquant.ops.library import OPS


@register_flop_formula(
    [
        *(OPS.linear_dynamic, OPS.linear_block, OPS.linear_half, OPS.linear_grouped),
        *(OPS.scaled_mm, OPS.int_mm),
    ]
)
def _linear(x, *arguments, out_shape=None, **options):
    return 2 * prod(out_shape) * x[-1]


def _product(x, packed):
    """Of rows x [..., K] and a packed weight."""
    return 2 * prod(x) * _C.columns_of(packed[0], x[-1])


@register_flop_formula(OPS.conv1d_dynamic)
def _conv1d(x, packed, weight_scale, bias, kernel_size, *arguments, out_shape=None, **options):
    groups = packed[0] if len(packed) == 2 else 1
    return 2 * prod(out_shape) * kernel_size * x[1] // groups


@register_flop_formula(OPS.experts)
def _experts(
    x,
    chosen,
    weights,
    up,
    scale_up,
    bias_up,
    n_up,
    down,
    scale,
    bias,
    n_down,
    activation,
    split=0,
    *arguments,
    out_shape=None,
    **options,
):
    inner = n_up // 2 if split else n_up
    return 2 * prod(chosen) * (x[1] * n_up + inner * n_down)


@register_flop_formula(OPS.causal_conv1d)
def _causal_conv1d(x, weight, *arguments, out_shape=None, **options):
    return 2 * prod(x) * weight[1]


@register_flop_formula([OPS.gated_delta_rule, OPS.gated_delta_rule_])
def _delta_rule(query, key, value, *arguments, out_shape=None, **options):
    return 3 * 2 * prod(value) * key[-1]  # what the state gives, what it learns, what comes out


@register_flop_formula([OPS.selective_scan, OPS.selective_scan_])
def _selective_scan(x, dt, rate, b, *arguments, out_shape=None, **options):
    return 2 * 2 * prod(x) * b[-1]


@register_flop_formula([OPS.lstm_dynamic, OPS.lstm_half, OPS.lstm_mixed])
def _lstm(x, h0, c0, *arguments, out_shape=None, **options):
    hidden, state = c0[-1], h0[-1]
    projection = hidden * state if state < hidden else 0
    return 2 * prod(x[:-1]) * (4 * hidden * (x[-1] + state) + projection)


@register_flop_formula([OPS.gru_dynamic, OPS.gru_half, OPS.gru_mixed])
def _gru(x, h0, *arguments, out_shape=None, **options):
    return 2 * prod(x[:-1]) * 3 * h0[-1] * (x[-1] + h0[-1])


@register_flop_formula([OPS.rnn_dynamic, OPS.rnn_half, OPS.rnn_mixed])
def _rnn(x, h0, *arguments, out_shape=None, **options):
    return 2 * prod(x[:-1]) * h0[-1] * (x[-1] + h0[-1])


@register_flop_formula(OPS.scaled_dot_product)
def _scores_and_sums(query, key, *arguments, out_shape=None, **options):
    batch, length, heads, size = query
    return 4 * batch * heads * length * key[1] * size


@register_flop_formula(OPS.relative_attention)
def _scores_with_distances(
    query, key, value, position_key=None, position_query=None, *arguments, out_shape=None, **options
):
    batch, length, heads, size = query
    terms = sum(one is not None for one in (position_key, position_query))
    more = 2 * batch * heads * length * key[1] * size * terms
    return _scores_and_sums(query, key) + more


@register_flop_formula(OPS.attend)
def _attend(
    x,
    key,
    value,
    packed_out,
    scale_out,
    bias_out,
    packed_q=None,
    *arguments,
    out_shape=None,
    **options,
):
    size = key[3]
    heads = x[2] if packed_q is None else _C.columns_of(packed_q[0], x[2]) // size
    query = (*x[:2], heads, size)
    return (
        (0 if packed_q is None else _product(x, packed_q))
        + _scores_and_sums(query, (key[0], key[2]))
        + _product((*x[:2], heads * size), packed_out)
    )


@register_flop_formula(OPS.query_key_value)
def _query_key_value(
    x,
    packed_q,
    scale_q,
    bias_q,
    packed_k,
    scale_k,
    bias_k,
    packed_v,
    *arguments,
    out_shape=None,
    **options,
):
    return sum(_product(x, one) for one in (packed_q, packed_k, packed_v) if one is not None)


@register_flop_formula(OPS.attention)
def _attention(
    x,
    packed_q,
    scale_q,
    bias_q,
    packed_k,
    scale_k,
    bias_k,
    packed_v,
    scale_v,
    bias_v,
    packed_out,
    scale_out,
    bias_out,
    heads,
    kv_heads,
    *arguments,
    out_shape=None,
    **options,
):
    batch, length, width = x
    columns = _C.columns_of(packed_q[0], width)
    size = columns // (heads if packed_k is not None else heads + 2 * kv_heads)
    inner = (batch, length, heads * size)
    return (
        _query_key_value(x, packed_q, scale_q, bias_q, packed_k, scale_k, bias_k, packed_v)
        + _scores_and_sums((batch, length, heads, size), (batch, length))
        + _product(inner, packed_out)
    )


@register_flop_formula(OPS.feed_forward)
def _feed_forward(
    x,
    packed_up,
    scale_up,
    bias_up,
    packed_gate,
    scale_gate,
    bias_gate,
    packed_down,
    scale_down,
    bias_down,
    activation,
    split=0,
    *arguments,
    out_shape=None,
    **options,
):
    inner = _C.columns_of(packed_up[0], x[-1]) // (2 if split else 1)
    ups = sum(_product(x, one) for one in (packed_up, packed_gate) if one is not None)
    return ups + _product((*x[:-1], inner), packed_down)


@register_flop_formula(OPS.encoder)
def _encoder(x, weights, heads, kv_heads, activation, *arguments, out_shape=None, **options):
    return sum(
        _attention(x, *attention, heads, kv_heads) + _feed_forward(x, *dense, activation)
        for attention, dense, *_ in layers_of(weights)
    )
