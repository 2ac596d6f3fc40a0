"""Padded batches: sequences of about the same length run together, without the padding behind them.

A row of a fused encoder does not depend on the batch nor on masked keys behind it, so that every
token has the same bits as in the whole batch.
"""

import torch

_PADDED_ROWS = 48  # of a group at most, for each thread: about what another group costs
_LEAST_GAIN = 0.9
_FEW = 256  # values of a mask that are looked through as a list


def hides_nothing(mask):
    """mask.all(), which for one short text takes four times as long as this."""
    if mask.numel() > _FEW:
        return bool(mask.all())
    return not any(0 in row for row in mask.tolist())


def groups_of(mask):
    """Sequences that run together, or None where all of them should.

    Args:
        mask: bool [batch, length], True for what is not padding.

    Returns:
        [(indices, length)]: together they name every sequence once, each as long as its longest.
        None too where there is padding in front of a token, or a sequence without any.
    """
    batch, length = mask.shape
    lengths = mask.sum(1)
    if not torch.equal(mask, torch.arange(length) < lengths[:, None]):
        return None
    lengths = lengths.tolist()
    if min(lengths) == 0:
        return None
    most = _PADDED_ROWS * torch.get_num_threads()
    groups, group, tokens = [], [], 0
    for index in sorted(range(batch), key=lengths.__getitem__):
        longest = lengths[index]
        if group and len(group) * longest - tokens > most:
            groups.append((group, lengths[group[-1]]))
            group, tokens = [], 0
        group.append(index)
        tokens += longest
    groups.append((group, longest))
    rows = sum(len(group) * longest for group, longest in groups)
    return groups if rows < _LEAST_GAIN * batch * length else None


def run_in_groups(groups, hidden, mask, run):
    """What run(hidden, mask) gives, computed for each group; zeros at the padding.

    Args:
        groups: what groups_of gave for the mask.
        hidden: [batch, length, features].
        mask: bool [batch, length].
        run: takes hidden and a mask [batch, 1, 1, length], or None for one without padding.
    """
    result = torch.zeros_like(hidden)
    for indices, length in groups:
        seen = mask[indices, :length]
        padded = not seen.all()
        y = run(hidden[indices, :length], seen[:, None, None, :] if padded else None)
        result[indices, :length] = y.masked_fill_(~seen[..., None], 0) if padded else y
    return result
