"""The layers of an encoder as one op, where they are alike."""

from itertools import chain

from dynquant.fused import calls


class Encoder:
    """What torch.ops.dynquant.encoder takes besides what a call brings.

    Attributes:
        weights: the tensors of all layers, one layer after the other.
        numbers, rest: what stands before and after the mask.
        per_token: whether no row depends on another sequence.
    """

    def __init__(self, weights, numbers, attention, scheme):
        self.weights = weights
        self.numbers = numbers
        self.rest = (attention == "integer", *calls.unusual(scheme))
        self.per_token = scheme[0]

    def run(self, x, mask):
        """x: [batch, length, features]. mask: as torch.ops.dynquant.attention takes it, or None."""
        return calls.encoder(x, self.weights, *self.numbers, mask, *self.rest)


def encoder_of(layers):
    """The Encoder of some layers, or None where one op cannot run them.

    Args:
        layers: [(parts, attention)] of each: its Parts, how the attention computes.
    """
    found = {_settings(*layer) for layer in layers}
    if len(found) != 1:
        return None
    settings = found.pop()
    if settings is None:
        return None
    weights = chain.from_iterable(_tensors(parts) for parts, _ in layers)
    return Encoder(list(weights), *settings)


def _settings(parts, attention):
    """The numbers of one layer, as Encoder takes them, or None where the op has no form for it."""
    heads, dense, norms = parts.attention, parts.feed_forward, parts.norms()
    norm_first = parts.adapter.norm_first
    if heads is None or heads.output is None or dense is None or not parts.adapter.residual:
        return None
    if isinstance(norm_first, str):  # an attribute of the layer says it
        return None
    if dense.gate is not None or dense.split is not None:
        return None
    if heads.norm is None or dense.norm is None or len(norms) != 2:
        return None
    if {norm.kind for norm in norms} != {"layer"}:
        return None
    epsilons = {norm.eps for norm in norms}
    if len(epsilons) != 1:
        return None
    activation = calls.ACTIVATIONS[dense.activation]
    numbers = parts.heads, parts.kv_heads, activation, epsilons.pop(), norm_first
    return numbers, attention, parts.scheme


def _tensors(parts):
    heads, dense = parts.attention, parts.feed_forward
    linears = heads.query, heads.key, heads.value, heads.output, dense.up, dense.down
    for linear in linears:
        yield from calls.weight_of(linear)
    for norm in (heads.norm, dense.norm):
        parameters = norm.module._parameters
        yield from (parameters.get("weight"), parameters.get("bias"))
