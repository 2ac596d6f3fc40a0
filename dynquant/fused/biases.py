"""The bias of positions that the first attention of a stack makes, and the others are given."""


def bias_of(parts, x, cache=None, keys=None):
    """What an attention like T5's adds to its scores where it is given no bias.

    Args:
        parts: the Parts of its block.
        x: the input [batch, rows, features].
        cache: what keeps the keys of earlier tokens, if any.
        keys: how many keys of a second sequence there are, if the attention is to that.

    Returns:
        [1, heads, rows, keys] in x's dtype.
    """
    core, rows, before = parts.attention.core, x.shape[1], 0
    if keys is None:
        keys = rows
        if cache is not None:
            index = parts.number_in_cache()
            before, (keys, _) = cache.get_seq_length(index), cache.get_mask_sizes(rows, index)
    if not core.has_relative_attention_bias:
        return x.new_zeros(1, parts.heads, rows, keys)
    return core.compute_bias(rows, keys, device=x.device, past_seen_tokens=before)
