"""What fused blocks call: one op each, or the ops that it is made of."""

import torch

from dynquant.nn.linear import outputs_of
from dynquant.ops.blocks import ACTIVATIONS

_NORMS = {"layer": 1, "rms": 2, "rms_plus_one": 2}
_NO_NORM = (0, None, None, 0.0)
# The ops' own defaults: each argument that is given costs a call 0.2 microseconds.
_USUAL_SCHEME = (True, False, 8)
_SPLITS = {None: 0, "gate_first": 1, "up_first": 2}

_ops = torch.ops.dynquant


def activation(name, x):
    return _ops.activation(x, ACTIVATIONS[name])


def norm(norm, x):
    """norm: a Norm."""
    _, weight, bias, eps = _norm(norm)
    if norm.kind == "layer":
        return _ops.layer_norm(x, weight, bias, eps)
    return _ops.rms_norm(x, weight, eps)


def attention(parts, call, norm_first, integers):
    """The attention block of `parts` for a Call, as one op."""
    found, x = parts.attention, call.x
    cos, sin = call.rotary or (None, None)
    return _ops.attention(
        x,
        *_weight(found.query),
        *_weight(found.key),
        *_weight(found.value),
        *_weight(found.output),
        parts.heads,
        parts.kv_heads,
        call.mask,
        call.bias,
        call.causal,
        None,
        cos,
        sin,
        integers,
        x if parts.adapter.residual else None,
        *_norms(found.norm, norm_first),
        *parts.scheme,
    )


def attention_in_parts(parts, call, integers):
    """The same bits, without norm and residual, by calls of the linear layers themselves."""
    found = parts.attention
    if found.key is None:
        projected = found.query(call.x).chunk(3, -1)
    else:
        projected = outputs_of((found.query, found.key, found.value), call.x)
    query, key, value = (each.unflatten(-1, (-1, found.head_dim)) for each in projected)
    if call.rotary is not None:
        query, key = (_ops.rotary(heads, *call.rotary) for heads in (query, key))
    result = _ops.scaled_dot_product(
        query, key, value, call.mask, call.bias, call.causal, None, integers
    ).flatten(2)
    if found.output is not None:
        result = found.output(result)
    return result if found.dropout is None else found.dropout(result)


def feed_forward(parts, x, norm_first):
    """The feed-forward block of `parts` for x [..., features], as one op."""
    found = parts.feed_forward
    return _ops.feed_forward(
        x,
        *_weight(found.up),
        *_weight(found.gate),
        *_weight(found.down),
        ACTIVATIONS[found.activation],
        _SPLITS[found.split],
        x if parts.adapter.residual else None,
        *_norms(found.norm, norm_first),
        *parts.scheme,
    )


def two_linears(x, up, down, activation, before, after, scheme):
    """after(down(activation(up(before(x))))) as one op; before and after: a Norm or None."""
    rest = ()
    if before is not None or after is not None or scheme != _USUAL_SCHEME:
        rest = (0, None, *_norm(before), *_norm(after), *scheme)
    weights = (*_weight(up), *_weight(None), *_weight(down))
    return _ops.feed_forward(x, *weights, ACTIVATIONS[activation], *rest)


def linear_block_of(parts, call, norm_first):
    """The linear block of `parts` for a Call, as one op."""
    found = parts.linear_block
    before, after = (found.norm, None) if norm_first else (None, found.norm)
    return linear_block(
        call.x, found.linear, found.activation, call.residual, before, after, parts.scheme
    )


def linear_block(x, linear, activation, residual, before, after, scheme):
    """before and after: a Norm or None."""
    rest = () if residual is None else (residual,)
    if before is not None or after is not None or scheme != _USUAL_SCHEME:
        rest = (residual, *_norm(before), *_norm(after), *scheme)
    return _ops.linear_block(x, *_weight(linear), ACTIVATIONS[activation], *rest)


def _weight(linear):
    """Packed weight, scale and bias; read at each call, since moves and loading replace them."""
    if linear is None:
        return None, None, None
    buffers = linear._buffers
    return buffers["packed"], buffers["weight_scale"], linear._parameters["bias"]


def _norms(norm, first):
    """The arguments of the norm before and of the one after."""
    return (*_norm(norm), *_NO_NORM) if first else (*_NO_NORM, *_norm(norm))


def _norm(norm):
    if norm is None:
        return _NO_NORM
    parameters = norm.module._parameters
    weight = parameters.get("weight")
    if norm.kind == "rms_plus_one":
        weight = 1 + weight.float()
    return _NORMS[norm.kind], weight, parameters.get("bias"), norm.eps
