"""What an attention of T5's kind adds to its scores: a bias of positions, and masks as numbers."""

import torch

from dynquant.fused.caches import own_of


def with_bias(parts, call):
    """The Call with the bias and the mask that the block's own code would add.

    Args:
        parts: the Parts of a block whose adapter has the result "bias".
    """
    bias = _made(parts, call) if call.bias is None else call.bias
    mask = call.mask
    if mask is not None and mask.dtype == torch.bool:
        # A row that sees nothing sees all alike: what is hidden gets the least number, not -Inf.
        least = torch.finfo(call.x.dtype).min
        mask = torch.zeros_like(mask, dtype=call.x.dtype).masked_fill_(~mask, least)
    return call._replace(bias=bias, mask=mask)


def _made(parts, call):
    """[1, heads, rows, keys]: the first attention of a stack makes it, the others are given it."""
    core, rows, before = parts.attention.core, call.x.shape[1], 0
    keys = rows
    if call.cache is not None:
        cache, index = own_of(call.cache), parts.number_in_cache()
        before = cache.get_seq_length(index)
        keys = before + rows
        if hasattr(cache, "get_mask_sizes"):  # a static cache has more
            keys, _ = cache.get_mask_sizes(rows, index)
    if call.cross is not None:
        keys = call.cross[0].shape[2]
    if not core.has_relative_attention_bias:
        return call.x.new_zeros(1, parts.heads, rows, keys)
    return core.compute_bias(rows, keys, device=call.x.device, past_seen_tokens=before)
