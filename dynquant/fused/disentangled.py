"""What an attention that adds terms for distances is called with, as in DeBERTa."""

import torch
from torch import nn

from dynquant.fused.arguments import Call, Distances, by_name


def of_disentangled(parts, args, kwargs):
    """A Call for all tokens of each sequence, or None where the op cannot do it."""
    adapter, names = parts.adapter, parts.adapter.attention.relative
    given = by_name(adapter.arguments, args, kwargs)
    if given is None:
        return None
    weights = bool(given.pop("output_attentions", False))
    roles = adapter.arguments[0], adapter.mask, names.positions, names.vectors
    found = [given.pop(role, None) for role in roles]
    if any(value is not None for value in given.values()) or parts.attention is None:
        return None
    if weights and adapter.feed_forward is not None:
        return None
    x, mask, positions, vectors = found
    if not all(type(one) in (torch.Tensor, nn.Parameter) for one in found) or not _fits(*found):
        return None
    # Neither a compiler nor a tracer can look at the positions.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not parts.takes_rows_alone():
        return None
    relative = parts.attention.relative
    positions = positions.reshape(positions.shape[-2:])
    if vectors.shape[0] < 2 * relative.span:
        return None
    if not torch.equal(positions[1:, 1:], positions[:-1, :-1]):
        return None  # more than the distance counts
    distances = _distances_of(relative, positions, vectors)
    # A row that sees nothing sees all alike: what is hidden gets the least number, not -Inf.
    least = torch.finfo(torch.float32).min
    hidden = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask == 0, least)
    return Call(x, hidden, weights=weights, distances=distances)


def _fits(x, mask, positions, vectors):
    if x.dim() != 3 or mask.dim() != 4 or x.is_nested or vectors.dim() != 2:
        return False
    batch, length, _ = x.shape
    if mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[3] != length:
        return False
    if mask.shape[2] not in (1, length) or length == 0 or batch == 0:
        return False
    if positions.shape[-2:] != (length, length) or positions.numel() != length * length:
        return False
    return positions.is_cpu and vectors.is_cpu and vectors.dtype == x.dtype


def _distances_of(relative, positions, vectors):
    """The Distances of tokens whose positions differ by nothing but the distance."""
    span = relative.span
    # Of a query and what lies behind it, from the farthest, then in front of it.
    distances = torch.cat([positions[:, 0].flip(0), positions[0, 1:]]).long()
    # Keys see them from the other side.
    terms = (relative.key, distances), (relative.query, -distances.flip(0))
    numbers = [
        None if one is None else (seen + span).clamp_(0, 2 * span - 1) for one, seen in terms
    ]
    used = torch.cat([one for one in numbers if one is not None])
    first, last = int(used.min()), int(used.max())
    rows = vectors[first : last + 1].unsqueeze(0)
    return Distances(rows, *(None if one is None else one - first for one in numbers))
