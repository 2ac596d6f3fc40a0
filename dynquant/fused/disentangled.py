"""What an attention that adds terms for distances is called with, as in DeBERTa."""

from typing import NamedTuple

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
    seen = _seen(relative, positions, mask)
    if seen.numbers is None:
        return None
    rows = vectors[seen.first : seen.last + 1].unsqueeze(0)
    return Call(x, seen.hidden, weights=weights, distances=Distances(rows, *seen.numbers))


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


class _Seen(NamedTuple):
    """What positions and a mask say to an attention.

    hidden: what is added to scores.
    first, last: of the vectors that are used.
    numbers: those of the vectors for c2p and p2c from `first` on, None for a term that there is
        not; None where more than the distance of two tokens counts.
    """

    hidden: torch.Tensor
    numbers: tuple | None
    first: int
    last: int


# All layers of a model ask the same. For more it takes much less time than the layer's products.
_KEPT_VALUES = 1 << 16  # of the positions, and of the mask
_kept = None  # what was asked last, copied, and the _Seen


def _seen(relative, positions, mask):
    global _kept
    kind = relative.span, relative.key is None, relative.query is None, mask.dtype, positions.dtype
    if max(positions.numel(), mask.numel()) > _KEPT_VALUES:
        return _read(relative, positions, mask)
    if _kept is not None:
        kept_kind, kept_positions, kept_mask, seen = _kept  # of whichever thread
        same = kept_kind == kind and torch.equal(kept_positions, positions)
        if same and torch.equal(kept_mask, mask):
            return seen
    with torch.inference_mode(False):  # such tensors are of use in any mode
        seen = _read(relative, positions, mask)
        _kept = kind, positions.clone(), mask.clone(), seen
    return seen


def _read(relative, positions, mask):
    # A row that sees nothing sees all alike: what is hidden gets the least number, not -Inf.
    least = torch.finfo(torch.float32).min
    hidden = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask == 0, least)
    if not torch.equal(positions[1:, 1:], positions[:-1, :-1]):
        return _Seen(hidden, None, 0, 0)
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
    numbers = tuple(None if one is None else one - first for one in numbers)
    return _Seen(hidden, numbers, first, last)
