"""What fused blocks call: one op each, or the ops that it is made of."""

import math
from functools import partial
from itertools import chain

import torch

from dynquant.fused.caches import own_of, second_of
from dynquant.fused.growing import updated
from dynquant.fused.narrowing import Kept, narrowed
from dynquant.fused.vectors import kept_projections_of, projections_of
from dynquant.nn.linear import outputs_of
from dynquant.ops.blocks import ACTIVATIONS, NORMS
from dynquant.ops.heads import swapped

_NO_NORM = (0, None, None, 0.0)
# The ops' own defaults: each argument that is given costs a call 0.2 microseconds.
_USUAL_SCHEME = (True, False, 8)
_SPLITS = {None: 0, "gate_first": 1, "up_first": 2}

_ops = torch.ops.dynquant
# The overloads themselves: finding them costs a call of a short text several microseconds.
_attention, _feed_forward = _ops.attention.default, _ops.feed_forward.default
_linear_block, _embedding_sum = _ops.linear_block.default, _ops.embedding_sum.default
_query_key_value = _ops.query_key_value.default
_relative_attention = _ops.relative_attention.default
_scaled_dot_product, _attend = _ops.scaled_dot_product.default, _ops.attend.default
encoder = _ops.encoder.default


def activation(name, x):
    return _ops.activation(x, ACTIVATIONS[name])


def norm(norm, x):
    """norm: a Norm."""
    _, weight, bias, eps = _norm(norm)
    if norm.kind == "layer":
        return _ops.layer_norm(x, weight, bias, eps)
    return _ops.rms_norm(x, weight, eps, norm.kind == "rms_plus_one")


def embedding_sum_arguments(table, type_table, position_table, norm):
    """What embedding_sum takes besides what a call brings. norm: a Norm."""
    return table, type_table, (position_table, *_norm(norm))


def can_sum(arguments, indices, type_indices):
    """Whether embedding_sum takes indices [..., L]: at most as many as positions, types or none."""
    _, type_table, (positions, *_) = arguments
    if indices.shape[-1] > positions.shape[0]:
        return False
    return type_indices is None or (type_table is not None and type_indices.shape == indices.shape)


def embedding_sum(arguments, indices, type_indices):
    """arguments: what embedding_sum_arguments gave."""
    table, type_table, rest = arguments
    return _embedding_sum(indices, table, type_indices, type_table, *rest)


def attention_arguments(parts, numbers, before, after, scheme):
    """What an attention block takes besides what a call brings: in front of it, between, behind.

    Args:
        numbers: its Numbers.
        before, after: a Norm or None.
    """
    found = parts.attention
    weights = map(weight_of, (found.query, found.key, found.value, found.output))
    weights = *chain(*weights), parts.heads, parts.kv_heads
    return weights, numbers.scale, _ends(before, after, scheme)


def attention(arguments, call, residual, integers):
    """An attention block for a Call, as one op.

    Args:
        arguments: what attention_arguments gave.
        residual: whether the input is added.
    """
    before, scale, after = arguments
    cos, sin, more = _turned(call)
    return _attention(
        call.x,
        *before,
        call.mask,
        call.bias,
        call.causal,
        scale,
        cos,
        sin,
        integers,
        call.x if residual else None,
        *after,
        **more,
    )


def _turned(call):
    """cos, sin and further arguments of an op that turns heads."""
    if call.rotary is None:
        return None, None, {}
    cos, sin, interleaved = call.rotary
    return cos, sin, {"interleaved": True} if interleaved else {}


def token_arguments(parts, numbers, before, after, scheme):
    """What a decoder's attention takes for tokens besides what a call brings.

    First query_key_value's, in front of the angles and behind them, then those of the output.
    Takes what attention_arguments takes.
    """
    found = parts.attention
    weights = map(weight_of, (found.query, found.key, found.value))
    heads = (_norm(norm) for norm in found.head_norms or (None, None))
    weights_and_eps = chain(*((weight, eps) for _, weight, _, eps in heads))
    plus_one = any(norm.kind == "rms_plus_one" for norm in found.head_norms)
    gate = found.head_gate
    if gate is not None:
        gate = linear_block_arguments(gate, "none", before, None, scheme)
    return (
        (*chain(*weights), parts.heads, parts.kv_heads),
        (*weights_and_eps, *_norm(before), *unusual(scheme, plus_one)),
        _attend_arguments(found.output, None, None, after, scheme),
        numbers,
        found.gated,
        gate,
        found.value_norm,
    )


def token(arguments, call, residual):
    """An attention block for new tokens of each sequence, behind those of the call's cache, if any.

    Args:
        arguments: what token_arguments gave.
    """
    before, after, output, numbers, gated, head_gate, value_norm = arguments
    cos, sin, more = _turned(call)
    if gated:
        more["gated"] = True
    query, key, value = _query_key_value(call.x, *before, cos, sin, *after, **more)
    if value_norm is not None:
        value = norm(value_norm, value)
    found = _taken_in(key, value, call, numbers.index)
    query, gate = query.chunk(2, -1) if gated else (query, None)
    if head_gate is not None:
        gate = _as_heads(linear_block(head_gate, call.x), query)
    if call.stretch is not None:
        query = query * call.stretch
    return _attend_to(output, query, found, call, numbers, call.x if residual else None, gate)


def _as_heads(gates, query):
    """Gates [batch, rows, heads or heads * D] as the heads of query [batch, rows, heads, D]."""
    heads, dim = query.shape[2:]
    if gates.shape[-1] == heads:
        return gates.unsqueeze(-1).repeat(1, 1, 1, dim)
    return gates.unflatten(-1, (heads, dim))


def _taken_in(key, value, call, index):
    """All keys and values of the call's cache, which takes in these [batch, rows, heads, D].

    Returns:
        a Kept; these alone where there is no cache.
    """
    found = swapped(key, value)
    if call.cache is not None:
        found = updated(own_of(call.cache), *found, index, call.rest)
    if call.stored is not None:
        states, entry = call.stored
        states[entry] = tuple(found)
    return _seen_by(call, found)


def _seen_by(call, found):
    """Those keys and values that the call's tokens may see, a Kept."""
    if call.causal:  # a cache of fixed length gives what it has not taken in yet as well
        found = (one[:, :, : call.x.shape[1]] for one in found)
    return Kept(*found)


def reusing_arguments(parts, numbers, before, after, scheme):
    """What an attention to an earlier layer's keys takes besides what a call brings.

    The linear layer, the heads and the norm of the query, then those of the output. Takes what
    attention_arguments takes.
    """
    found = parts.attention
    query = linear_block_arguments(found.query, "none", before, None, scheme)
    output = _attend_arguments(found.output, None, None, after, scheme)
    return query, found.head_dim, found.head_norms[0], output, numbers


def reusing(arguments, call, residual):
    """An attention block for new tokens of each sequence, to the keys and values that call reuses.

    Args:
        arguments: what reusing_arguments gave.
    """
    projection, head_dim, head_norm, output, numbers = arguments
    query = linear_block(projection, call.x).unflatten(-1, (-1, head_dim))
    query = _turned_heads(_normed(head_norm, partial(norm, head_norm), query), call)
    found = _seen_by(call, call.reused)
    return _attend_to(output, query, found, call, numbers, call.x if residual else None)


def _attend_arguments(output, query, before, after, scheme):
    """What the op attend takes of the linear layers; query is None where there is none."""
    return (*weight_of(output), *weight_of(query)), _ends(before, after, scheme)


def _attend_to(arguments, x, found, call, numbers, residual, gate=None):
    """An attention to a Kept, to the residual and the norm."""
    weights, ends = arguments
    keys, values, scales = found
    more = {"is_causal": True} if call.causal else {}
    if gate is not None:
        more["gate"] = gate
    if numbers.softcap is not None:
        more["softcap"] = numbers.softcap
    if numbers.sinks is not None:
        more["sinks"] = numbers.sinks
    rest = call.mask, call.bias, numbers.scale, *scales, residual
    return _attend(x, keys, values, *weights, *rest, *ends, **more)


def _attended(query, found, call, numbers):
    """[batch, rows, features] of all heads, for a Kept."""
    keys, values, scales = found.by_rows()
    return _scaled_dot_product(
        *(query, keys, values, call.mask, call.bias, call.causal, numbers.scale, False, *scales),
        softcap=numbers.softcap,
        sinks=numbers.sinks,
    ).flatten(2)


def cross_arguments(parts, numbers, before, after, scheme):
    """What an attention to a second sequence takes for a token besides what a call brings.

    Takes what attention_arguments takes.
    """
    found = parts.attention
    return _attend_arguments(found.output, found.query, before, after, scheme), numbers


def cross(arguments, call, residual, integers):
    """An attention block for new tokens, to the second sequence of the call.

    Args:
        arguments: what cross_arguments gave.
        integers: whether attention is computed in integers elsewhere: rounded keys and values may
            be read here then.
    """
    weights, numbers = arguments
    found = _of_second(call, numbers.index, integers)
    return _attend_to(weights, call.x, found, call, numbers, call.x if residual else None)


def _of_second(call, index, integers):
    """Keys and values of the call's second sequence, a Kept."""
    return narrowed(second_of(call.cache, index)) if integers else Kept(*call.cross)


def relative_arguments(parts, before, after, scheme):
    """What an attention with terms for distances takes besides what a call brings.

    First query_key_value's, then those of the output, or None where it has none. Takes what
    attention_arguments takes.
    """
    found = parts.attention
    weights = map(weight_of, (found.query, found.key, found.value))
    angles_and_norms = None, None, None, 0.0, None, 0.0
    output = None
    if found.output is not None:
        output = linear_block_arguments(found.output, "none", None, after, scheme)
    ends = *angles_and_norms, *_norm(before), *unusual(scheme)
    return (*chain(*weights), parts.heads, parts.kv_heads, *ends), output


def relative(arguments, parts, call, residual, integers):
    """An attention block for a Call with Distances.

    Args:
        arguments: what relative_arguments gave.
    """
    before, output = arguments
    heads = _query_key_value(call.x, *before)
    vectors = kept_projections_of(parts, call.distances)
    attended = _attended_by_distance(parts.attention, call, vectors, *heads, integers)
    if output is None:
        return attended
    return linear_block(output, attended, call.x if residual else None)


def attention_in_parts(parts, call, integers, numbers):
    """The same bits, by calls of the linear layers themselves; without a norm in front.

    A residual is added, and a norm behind it is called.

    Args:
        numbers: as for attention_arguments.
    """
    found = parts.attention
    if call.cross is not None:
        query = found.query(call.x).unflatten(-1, (-1, found.head_dim))
        second = _of_second(call, numbers.index, integers)
        return _output(parts, call, _attended(query, second, call, numbers))
    if call.reused is not None:
        query = found.query(call.x).unflatten(-1, (-1, found.head_dim))
        query = _turned_heads(_normed_by_module(found.head_norms[0], query), call)
        return _output(parts, call, _attended(query, _seen_by(call, call.reused), call, numbers))
    if found.key is None:
        counts = parts.heads, parts.kv_heads, parts.kv_heads
        rows = found.query(call.x)
        projected = rows.split([count * found.head_dim for count in counts], -1)
    elif found.value is found.key:
        query, key = outputs_of((found.query, found.key), call.x)
        projected = query, key, key
    else:
        projected = outputs_of((found.query, found.key, found.value), call.x)
    of_query = 2 * found.head_dim if found.gated else found.head_dim
    sizes = of_query, found.head_dim, found.head_dim
    query, key, value = (
        each.unflatten(-1, (-1, size)) for each, size in zip(projected, sizes, strict=True)
    )
    query, gate = query.chunk(2, -1) if found.gated else (query, None)
    if found.head_norms:
        query, key = map(_normed_by_module, found.head_norms, (query, key))
    if found.value_norm is not None:
        value = found.value_norm.module(value)
    query, key = (_turned_heads(heads, call) for heads in (query, key))
    if call.stretch is not None:
        query = query * call.stretch
    if found.head_gate is not None:
        gate = _as_heads(found.head_gate(call.x), query)
    if call.distances is not None:
        vectors = projections_of(found.relative, call.distances)
        result = _attended_by_distance(found, call, vectors, query, key, value, integers)
    elif call.as_tokens:
        result = _attended(query, _taken_in(key, value, call, numbers.index), call, numbers)
    else:
        result = _scaled_dot_product(
            query, key, value, call.mask, call.bias, call.causal, numbers.scale, integers
        ).flatten(2)
    if gate is not None:
        result = result * activation("sigmoid", gate.flatten(2))
    return _output(parts, call, result)


def _attended_by_distance(found, call, vectors, query, key, value, integers):
    """As _attended does, for the heads of query, key and value [batch, rows, heads, D].

    Args:
        vectors: what vectors.projections_of gives.
    """
    made = iter(vectors)
    _, *numbers = call.distances
    terms = [
        None if number is None else _by_number(next(made)[0], number, found.head_dim)
        for number in numbers
    ]
    count = 1 + sum(one is not None for one in terms)
    scale = 1 / math.sqrt(found.head_dim * count)
    return _relative_attention(query, key, value, *terms, call.mask, scale, integers).flatten(2)


def _by_number(rows, numbers, head_dim):
    """The heads [P, heads, D] of rows [vectors, features]."""
    return rows.index_select(0, numbers).unflatten(-1, (-1, head_dim))


def _normed_by_module(norm, heads):
    return _normed(norm, norm.module, heads)


def _normed(norm, function, heads):
    """The norm of each of heads [batch, rows, heads, D], or of all together where it is as long.

    Args:
        function: computes it.
    """
    if norm.size == heads.shape[-1]:
        return function(heads)
    return function(heads.flatten(2)).unflatten(-1, heads.shape[-2:])


def _turned_heads(heads, call):
    return heads if call.rotary is None else _ops.rotary(heads, *call.rotary)


def _output(parts, call, attended):
    """What an attention makes of all heads, by calls of its modules."""
    found = parts.attention
    if found.output is not None:
        attended = found.output(attended)
    if found.dropout is not None:
        attended = found.dropout(attended)
    if parts.adapter.residual:
        attended = attended + call.x
    return attended if found.norm is None else found.norm.module(attended)


def feed_forward_arguments(up, gate, down, activation, split, before, after, scheme):
    """The same for a feed-forward block; gate and split: None where there is none."""
    weights = map(weight_of, (up, gate, down))
    numbers = ACTIVATIONS[activation], _SPLITS[split]
    return (*chain(*weights), *numbers), _ends(before, after, scheme)


def feed_forward(arguments, x, residual=False):
    """A feed-forward block for x [..., features], as one op; arguments as for attention."""
    before, after = arguments
    return _feed_forward(x, *before, x if residual else None, *after)


def linear_block_arguments(linear, activation, before, after, scheme):
    """The same for a linear layer with what belongs to it."""
    return (*weight_of(linear), ACTIVATIONS[activation]), _ends(before, after, scheme)


def linear_block(arguments, x, residual=None):
    """A linear block for x, as one op; arguments as for attention."""
    before, after = arguments
    return _linear_block(x, *before, residual, *after)


def weight_of(linear):
    """Packed weight, scale and bias, which moves and loading replace."""
    if linear is None:
        return None, None, None
    buffers = linear._buffers
    return buffers["packed"], buffers["weight_scale"], linear._parameters["bias"]


def _ends(before, after, scheme):
    """An op's last arguments: norm before, norm after, scheme; without what is default anyway."""
    residual_last = after is not None and after.of_result
    scheme, after = unusual(scheme, residual_last), _norm(after)
    if scheme or after != _NO_NORM:
        return (*_norm(before), *after, *scheme)
    before = _norm(before)
    return () if before == _NO_NORM else before


def unusual(scheme, flag=False):
    """The scheme, and what is behind it where that is True; nothing where both are the ops' own."""
    if flag:
        return (*scheme, True)
    return () if scheme == _USUAL_SCHEME else scheme


def _norm(norm):
    if norm is None:
        return _NO_NORM
    parameters = norm.module._parameters
    return NORMS[norm.kind], parameters.get("weight"), parameters.get("bias"), norm.eps
