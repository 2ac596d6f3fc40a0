"""The layers of an encoder as one op: what tracing and users read."""

import torch

from dynquant.ops.library import OPS, fake

TENSORS = 22  # of a layer


def layers_of(weights):
    """For each layer: the tensors of attention, those of feed_forward, those of either's norm."""
    for first in range(0, len(weights), TENSORS):
        layer = weights[first : first + TENSORS]
        dense = *layer[12:15], None, None, None, *layer[15:18]
        yield layer[:12], dense, layer[18:20], layer[20:]


@fake("encoder")
def _(
    x,
    weights,
    heads,
    kv_heads,
    activation,
    eps,
    norm_first=False,
    mask=None,
    integers=True,
    per_token=True,
    symmetric=False,
    activation_bits=8,
):
    """Layers of a transformer's encoder in one call: attention, then feed_forward, of each.

    A layer is x = norm(x + attention(x)), x = norm(x + down(activation(up(x)))), or with norm_first
    x = x + attention(norm(x)), x = x + down(activation(up(norm(x)))). Equal in bits to attention
    and feed_forward called one after the other, and for short inputs faster: a call of an op takes
    as long as its products then.

    Args:
        x: fp32, bf16 or fp16 [B, L, K], any strides.
        weights: 22 tensors, or None, for each layer: packed weight, scale and bias of query, key,
            value, output projection, up and down, as in attention and feed_forward, then weight and
            bias of the attention's layer norm and of the feed-forward block's.
        heads, kv_heads, mask, integers: as in attention.
        activation: as in feed_forward.
        eps: of all norms.
        norm_first: whether norms are in front of the blocks instead of behind them.
        per_token, symmetric, activation_bits: as in linear_dynamic.

    Returns:
        [B, L, K] in x's dtype.

    Raises:
        RuntimeError: another dtype, device, shape or number, with the number of the layer.
    """
    torch._check(
        len(weights) > 0 and len(weights) % TENSORS == 0,
        lambda: f"weights must hold {TENSORS} tensors or None for each layer, got {len(weights)}",
    )
    scheme = per_token, symmetric, activation_bits
    added = mask, None, False, None, None, None, integers
    for attention, dense, *norms in layers_of(weights):
        ends = [_ends(eps, norm_first, *norm) for norm in norms]
        x = OPS.attention(x, *attention, heads, kv_heads, *added, x, *ends[0], *scheme)
        x = OPS.feed_forward(x, *dense, activation, 0, x, *ends[1], *scheme)
    return x


def _ends(eps, norm_first, *norm):
    here, nowhere = (1, *norm, eps), (0, None, None, 0.0)
    return (*here, *nowhere) if norm_first else (*nowhere, *here)
