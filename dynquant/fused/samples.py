"""What the fused form of a block is compared on: random batches, also padded, and tokens."""

import torch

from dynquant.fused.arguments import implementation_of
from dynquant.fused.caches import RecordedCache, of_two_sequences, with_own

BATCH, LENGTH = 2, 9


def random_of(dtype):
    """A function that gives a random tensor of some shape: always the same ones."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(dtype)


def seen_keys():
    """Of a padded batch, bool [batch, length]."""
    return torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH // 2]])


def samples_of(parts):
    """(what it is, arguments) to call a block with."""
    for what, arguments in _whole_samples(parts):
        yield what, arguments
        if parts.adapter.result == "bias":
            without = {name: one for name, one in arguments.items() if name != parts.adapter.bias}
            yield f"{what} without a bias", without


def _whole_samples(parts):
    """With everything that the block can be given."""
    adapter, attention, random = parts.adapter, parts.attention, random_of(parts.dtype())
    if attention is None:
        width = next(iter(parts.linears.values())).in_features
        arguments = {adapter.arguments[0]: random(BATCH, LENGTH, width)}
        if adapter.linear_block is not None and adapter.linear_block.residual is not None:
            wide = parts.linear_block.linear.out_features
            arguments[adapter.linear_block.residual] = random(BATCH, LENGTH, wide)
        yield "a random batch", arguments
        return
    seen = seen_keys()
    if parts.runs_without_cache:
        arguments = attention_arguments(parts, random, LENGTH, LENGTH)
        yield "a random batch", with_mask(arguments, parts, None)
        yield "a padded batch", with_mask(arguments, parts, seen)
    if adapter.cache is None and not parts.runs_without_cache:
        arguments = attention_arguments(parts, random, LENGTH, LENGTH)
        yield "a padded text", with_mask(arguments, parts, seen)
        yield "a text", with_mask(arguments, parts, _all_seen(parts, seen))
    if adapter.cache is not None and parts.number_in_cache() is not None:
        yield from _tokens(parts, random, seen)


def _tokens(parts, random, seen):
    adapter = parts.adapter

    def new(rows):
        """Arguments for so many tokens, and keys and values of those before them."""
        shape = BATCH, parts.kv_heads, LENGTH - rows, parts.attention.head_dim
        return attention_arguments(parts, random, rows, LENGTH), (random(*shape), random(*shape))

    arguments, tokens = new(1)
    # The last key is the new token's own, and is seen.
    for what, keys in (("a token", None), ("a token of a padded batch", seen.flip(1))):
        given = {**arguments, adapter.cache: RecordedCache(*tokens)}
        yield what, with_mask(given, parts, keys)
    if adapter.bias is None:
        for rows, what in ((3, "tokens of a padded batch"), (LENGTH, "a padded prompt")):
            several, before = new(rows)
            given = {**several, adapter.cache: RecordedCache(*before)}
            yield what, with_mask(given, parts, seen.flip(1))
        keys = _all_seen(parts, seen)
        yield "a prompt", with_mask(given, parts, keys)
        if not parts.runs_without_cache:
            yield "a prompt without a cache", with_mask(several, parts, keys)
    if adapter.cross is None:
        return
    second = of_two_sequences(parts.number_in_cache(), *new(1)[1])
    both = with_own(second, RecordedCache(*tokens))
    yield "a token beside a second sequence", {**arguments, adapter.cache: both, adapter.mask: None}
    sequence = random(BATCH, LENGTH - 1, parts.attention.key.in_features)
    arguments = attention_arguments(parts, random, 1, LENGTH - 1)
    for what, keys in (("a second sequence", None), ("a padded second sequence", seen[:, :-1])):
        given = {**arguments, adapter.cache: both, adapter.cross: sequence}
        yield what, with_mask(given, parts, keys)


def _all_seen(parts, seen):
    """None for a batch without padding; another implementation is always given a mask."""
    return None if implementation_of(parts.attention.core) == "sdpa" else seen


def samples_of_sublayers(adapter, attention, cross, dtype):
    """(what it is, arguments) to call an inline block with, behind a cache.

    Args:
        adapter: of the block.
        attention, cross: the Parts of its attentions; None where there is no second one.
    """
    names, random, seen = adapter.sublayers, random_of(dtype), seen_keys()

    def tokens(parts, count=LENGTH - 1):
        shape = BATCH, parts.kv_heads, count, parts.attention.head_dim
        return random(*shape), random(*shape)

    def arguments_of(parts, keys, mask, rows=1):
        """The input, and the mask, of one of the attentions."""
        own = parts.adapter
        given = with_mask(attention_arguments(parts, random, rows, keys), parts, mask)
        return given[own.arguments[0]], given[own.mask]

    for what, padded, rows in (
        ("a token", False, 1),
        ("a token of a padded batch", True, 1),
        ("a padded prompt", True, LENGTH),
    ):
        x, mask = arguments_of(attention, LENGTH, seen.flip(1) if padded else None, rows)
        cache = RecordedCache(*tokens(attention, LENGTH - rows))
        given = {adapter.arguments[0]: x, adapter.mask: mask, adapter.cache: cache}
        yield what, given
        if cross is None:
            continue
        second = of_two_sequences(cross.number_in_cache(), *tokens(cross))
        given[adapter.cache] = with_own(second, cache.fresh())
        given[names.second] = random(BATCH, LENGTH - 1, cross.attention.key.in_features)
        mask = seen[:, :-1] if padded else None
        _, given[names.second_mask] = arguments_of(cross, LENGTH - 1, mask)
        yield f"{what} with a second sequence", given


def attention_arguments(parts, random, rows, keys):
    """The arguments of an attention but for its mask."""
    adapter, attention = parts.adapter, parts.attention
    arguments = {adapter.arguments[0]: random(BATCH, rows, attention.query.in_features)}
    if adapter.bias is not None:
        arguments[adapter.bias] = random(BATCH, parts.heads, rows, keys)
    if attention.relative is not None:
        names, span = adapter.attention.relative, attention.relative.span
        arguments[names.vectors] = random(2 * span, attention.query.in_features)
        numbers = torch.arange(keys)
        arguments[names.positions] = (numbers[:, None] - numbers).unsqueeze(0)
    if adapter.rotary is not None:
        angles = random(1, rows, attention.turned // 2)
        if adapter.attention.interleaved == "each_twice":
            angles = angles.repeat_interleave(2, -1)
        elif not adapter.attention.once:
            angles = angles.repeat(1, 1, 2)
        arguments[adapter.rotary] = (angles.cos(), angles.sin())
    if parts.sharing is not None:
        shape = BATCH, parts.kv_heads, keys, attention.head_dim
        arguments.update(parts.sharing.sample(lambda: random(*shape)))
    if parts.stretching is not None:
        arguments.update(parts.stretching.sample(rows))
    if adapter.family == "torch_attention":
        arguments.update(dict.fromkeys(adapter.arguments, arguments["query"]), need_weights=False)
    return arguments


def with_mask(arguments, parts, seen):
    """seen: bool [batch, keys], or None for all."""
    adapter, core = parts.adapter, parts.attention.core
    if adapter.family == "disentangled":  # numbers, of which 0 hides, and no row sees more
        if seen is None:
            seen = torch.ones_like(seen_keys())
        pairs = seen[:, None, None, :] * seen[:, None, :, None]
        return {**arguments, adapter.mask: pairs.long()}
    if adapter.family != "transformers":
        if not core.batch_first:
            x = next(iter(arguments.values())).transpose(0, 1)
            arguments = {k: x if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        name = "key_padding_mask" if adapter.family == "torch_attention" else "src_key_padding_mask"
        return arguments if seen is None else {**arguments, name: ~seen}
    mask = None
    if seen is not None:
        rows = next(iter(arguments.values())).shape[1]
        mask = seen[:, None, None, :].expand(-1, 1, rows, -1)
        config = getattr(core, "config", None)
        if config is None or config._attn_implementation != "sdpa":
            dtype = next(iter(arguments.values())).dtype
            mask = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
    return {**arguments, adapter.mask: mask}
