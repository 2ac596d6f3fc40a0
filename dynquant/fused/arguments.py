"""What a block is called with, read into what its ops take; None where they cannot do it."""

from typing import NamedTuple

import torch

from dynquant.fused.caches import keys_and_values, own_of

# Of transformers, whose masks are bool, or added to the scores; and of modules without a config.
_IMPLEMENTATIONS = ("sdpa", "eager", "")
# Models of transformers hand all that they are called with down to their layers. A cache itself
# comes as an argument of its own, and what is returned besides is collected by hooks.
_FOR_THE_MODEL = frozenset({"use_cache", "return_dict", "output_hidden_states"})


class Distances(NamedTuple):
    """The vectors of the distances between tokens.

    Attributes:
        rows: [1, vectors, features], those of the distances that there are.
        by_query, by_key: int64 [2 * length - 1], the number in `rows` of each distance from
            length - 1 down, for the term that queries and that which keys are multiplied by; None
            where there is no such term.
    """

    rows: torch.Tensor
    by_query: torch.Tensor | None
    by_key: torch.Tensor | None


class Call(NamedTuple):
    """The input and what steers the attention.

    Attributes:
        x: [batch, length, features]; [..., features] for a feed-forward block.
        mask: bool (True: seen) or float (added to the scores), which broadcasts to
            [batch, heads, length, length]; or None.
        bias: float of x's dtype, likewise.
        rotary: what the op rotary takes besides heads, or None.
        causal: whether a position sees no later one.
        residual: what a linear block adds, or None.
        weights: whether the weights of the attention are asked for.
        as_tokens: whether the attention is computed as of tokens behind a cache: in fp32, with
            keys and values that the cache, if there is one, takes in before.
        cache: what keeps the keys and values of earlier tokens, or None; the mask is then
            [batch, 1 or heads, 1 or length, keys].
        cross: keys and values [batch, heads, tokens, features] of a second sequence, which the
            attention is to, or None.
        distances: Distances, or None.
        reused: keys and values of an earlier layer, as those of cross, which the attention is to;
            or None.
        stretch: what the heads of the query are multiplied by, [1 or batch, length, 1, 1] of x's
            dtype, or None.
        stored: a mapping and a key, under which later layers find this one's keys and values; or
            None.
        rest: what it is called with besides keys and values.
        batched, batch_first: how the caller has the input, and wants the result.
    """

    x: torch.Tensor
    mask: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    rotary: tuple | None = None
    causal: bool = False
    residual: torch.Tensor | None = None
    weights: bool = False
    as_tokens: bool = False
    cache: object = None
    cross: tuple | None = None
    distances: Distances | None = None
    reused: tuple | None = None
    stored: tuple | None = None
    stretch: torch.Tensor | None = None
    rest: dict | None = None
    batched: bool = True
    batch_first: bool = True

    def added(self):
        """What is added besides the input, which may want a gradient."""
        return [self.residual, self.bias, self.mask, self.distances and self.distances.rows]

    def restored(self, y):
        if not self.batched:
            return y.squeeze(0)
        return y if self.batch_first else y.transpose(0, 1)


def by_name(names, args, kwargs):
    """All arguments of a forward with these parameters, or None where they are not such.

    Named ones may be others.
    """
    given = dict(zip(names, args, strict=False))
    if len(args) > len(names) or not given.keys().isdisjoint(kwargs):
        return None
    return {**given, **kwargs}


def of_transformers(parts, args, kwargs):
    """The forward of a block of transformers: what is None or False says nothing."""
    adapter = parts.adapter
    if len(args) > len(adapter.arguments):
        return None
    added, roles = adapter.linear_block and adapter.linear_block.residual, parts.roles
    x, weights = None, False
    read = {}
    given = (*zip(adapter.arguments, args, strict=False), *kwargs.items())
    for name, value in given:
        if name == adapter.arguments[0]:
            x = value
        elif name == adapter.cache or name == "is_causal" and value is not None:
            read[name] = value
        elif value is None or value is False or name in _FOR_THE_MODEL:
            continue
        elif name in roles or name == added:
            read[name] = value
        elif name in adapter.ignored:
            continue
        elif name == "output_attentions" and adapter.result != "tensor":
            weights = True
        else:
            return None
    if not isinstance(x, torch.Tensor):
        return None
    if adapter.linear_block is not None:
        return _of_linear_block(parts, x, read)
    if adapter.attention is None:
        return Call(x)
    if parts.attention is None:
        return None
    cache = read.get(adapter.cache)
    masks = read.get(adapter.mask), read.get(adapter.bias)
    if adapter.cross in read:
        return of_cross_tokens(parts, x, cache, *masks, weights)
    rotary = read.get(adapter.rotary) if parts.rotates() else None
    if rotary is not None:
        rotary = _turn(adapter.attention, rotary)
    elif parts.rotates() and not adapter.attention.unturned:
        return None
    if cache is not None or not parts.runs_without_cache:
        rest = {name: value for name, value in given if name not in roles}
        own = read.get("is_causal")
        call = of_tokens(parts, x, cache, *masks, weights, rotary, rest, own)
        if call is not None and parts.stretching is not None:
            call = parts.stretching.read(call, read.get(adapter.positions()))
        if call is not None and parts.sharing is not None:
            call = parts.sharing.read(call, read.get(adapter.states()), parts)
        return call
    return _of_attention(parts, x, *masks, weights, rotary, read.get("is_causal"))


def _turn(attention, rotary):
    """The cosines and sines that a block of transformers is given, as the op rotary takes them."""
    form = attention.interleaved
    if attention.once:
        rotary = (torch.cat((each, each), -1) for each in rotary)
    if form is None:
        return *rotary, False
    if form == "each_twice":
        cos, sin = (each[..., ::2] for each in rotary)
    else:
        cos, sin = (each[..., : each.shape[-1] // 2] for each in rotary)
    return cos, sin, True


def _of_linear_block(parts, x, read):
    names = parts.adapter.linear_block
    if parts.obstacle:
        return None
    if names.first_token:
        if x.dim() != 3:
            return None
        x = x[:, 0]
    residual = x if parts.adapter.residual else None
    if names.residual is not None:
        residual = read.get(names.residual)
        shape = (*x.shape[:-1], parts.linear_block.linear.out_features)
        if not isinstance(residual, torch.Tensor) or residual.is_nested or x.is_nested:
            return None
        if (residual.shape, residual.dtype, residual.device) != (shape, x.dtype, x.device):
            return None
    return Call(x, residual=residual)


def _of_attention(parts, x, mask, bias, weights, rotary, own):
    """own: as for of_tokens."""
    adapter, core = parts.adapter, parts.attention.core
    if weights and adapter.feed_forward is not None:
        return None
    if x.dim() != 3 or not _can_add(mask, bias, x, x.shape[1]):
        return None
    if not _can_run(adapter, implementation_of(core), mask):
        return None
    causal = _is_causal(core, mask, own)
    return Call(x, mask, bias, rotary, causal, weights=weights)


def _is_causal(core, mask, own=None):
    """Whether transformers' sdpa attention of several tokens is causal.

    Args:
        own: what it is told besides, or None.
    """
    if implementation_of(core) != "sdpa" or mask is not None:
        return False
    return bool(getattr(core, "is_causal", True) if own is None else own)


def of_tokens(parts, x, cache, mask, bias=None, weights=False, rotary=None, rest=None, own=None):
    """New tokens of each sequence, all there are where there is no cache.

    Args:
        rest: as for a Call.
        own: is_causal, where the block is told.
    """
    adapter, core = parts.adapter, parts.attention.core
    if not _are_tokens(parts, x, mask, bias):
        return None
    several = x.shape[1] > 1
    if several and adapter.bias is not None:
        return None
    # Without a mask, all see all but where torch's own attention is told that it is causal.
    if several and mask is None and implementation_of(core) != "sdpa":
        return None
    if adapter.cross is None and own_of(cache) is not cache:
        return None
    if weights and adapter.feed_forward is not None:
        return None
    causal = several and _is_causal(core, mask, own)
    return Call(
        x, mask, bias, rotary, causal, weights=weights, as_tokens=True, cache=cache, rest=rest
    )


def of_cross_tokens(parts, x, cache, mask, bias=None, weights=False):
    """New tokens of each sequence, and a second sequence whose keys and values are known."""
    if not _are_tokens(parts, x, mask, bias):
        return None
    found = keys_and_values(cache, parts.number_in_cache())
    dim = parts.attention.head_dim
    if found is None or not all(are_heads_for(one, x, dim) for one in found):
        return None
    return Call(x, mask, bias, weights=weights, as_tokens=True, cache=cache, cross=found)


def are_heads_for(keys, x, dim, heads=None):
    """Whether they are of x's sequences: torch's attention would spread those of a single one.

    Args:
        heads: how many there have to be; None for any number.
    """
    if keys.dim() != 4 or keys.dtype != x.dtype or heads not in (None, keys.shape[1]):
        return False
    return keys.shape[0] == x.shape[0] and keys.shape[3] == dim


def _are_tokens(parts, x, mask, bias):
    """Whether x is tokens of each sequence, for keys and values that want no gradient."""
    if x.dim() != 3 or x.shape[1] < 1 or torch.is_grad_enabled():
        return False
    if not _can_run(parts.adapter, implementation_of(parts.attention.core), mask):
        return False
    return _can_add(mask, bias, x, keys=None)


def with_argument(parts, name, value, args, kwargs):
    """The arguments of a forward with another value for the one of that name."""
    if name in kwargs:
        return args, {**kwargs, name: value}
    index = parts.adapter.arguments.index(name)
    return (*args[:index], value, *args[index + 1 :]), kwargs


def _can_run(adapter, implementation, mask):
    """Whether an implementation of attention takes masks and gives results as they are known."""
    if always_gives_weights(adapter, implementation):
        return False
    names = adapter.attention
    if (names.softcap or names.sinks) and implementation != "eager":
        return False  # torch's own has neither
    if implementation == "eager" and getattr(mask, "dtype", None) == torch.bool:
        return False  # it would be added
    return implementation in _IMPLEMENTATIONS


def always_gives_weights(adapter, implementation):
    """Whether they are returned unasked, as the eager attention's are beside a bias."""
    return adapter.result == "bias" and implementation != "sdpa"


def implementation_of(core):
    """core.config._attn_implementation, which costs 3 microseconds, without what is around it.

    Returns:
        the name; "" where there is no config.
    """
    config = getattr(core, "config", None)
    if config is None:
        return ""
    found = config.__dict__.get("_attn_implementation_internal")
    return config._attn_implementation if found is None else found


def _can_add(mask, bias, x, keys):
    """Whether both are None or as the ops take them, for as many keys or any."""
    if bias is not None and not (_is_mask(bias, x, keys) and bias.dtype == x.dtype):
        return False
    return mask is None or _is_mask(mask, x, keys)


def _is_mask(mask, x, keys):
    """Whether it broadcasts over heads as the masks of transformers do, for as many keys or any."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
        return False
    batch, length, _ = x.shape
    return (
        (mask.dtype == torch.bool or mask.dtype == x.dtype)
        and mask.shape[0] in (1, batch)
        and mask.shape[2] in (1, length)
        and keys in (None, mask.shape[3])
    )


def of_torch_layer(parts, args, kwargs):
    """nn.TransformerEncoderLayer.forward."""
    names = ("src", "src_mask", "src_key_padding_mask", "is_causal")
    given = _by_name(names, args, kwargs)
    if given is None or parts.attention is None:
        return None
    return _of_torch(parts.attention.core, *map(given.get, names))


def of_torch_attention(parts, args, kwargs):
    """nn.MultiheadAttention.forward, where it is self-attention."""
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
    given = _by_name((*names, "average_attn_weights", "is_causal"), args, kwargs)
    if given is None or parts.attention is None:
        return None
    query = given.get("query")
    if given.get("key") is not query or given.get("value") is not query:
        return None
    masks = (given.get(name) for name in ("attn_mask", "key_padding_mask", "is_causal"))
    call = _of_torch(parts.attention.core, query, *masks)
    return call and call._replace(weights=given.get("need_weights", True))


def _by_name(names, args, kwargs):
    if len(args) > len(names) or not kwargs.keys() <= set(names):
        return None
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _of_torch(core, x, mask, padding, is_causal):
    """A Call for self-attention of x [batch, length, features], or as batch_first has it."""
    if not isinstance(x, torch.Tensor) or x.is_nested or x.dim() not in (2, 3):
        return None
    if is_causal and mask is None:
        return None  # an error
    batched = x.dim() == 3
    if not batched:
        x = x.unsqueeze(0)
        padding = None if padding is None else padding.unsqueeze(0)
    elif not core.batch_first:
        x = x.transpose(0, 1)
    batch, length, _ = x.shape
    if mask is not None:
        mask = _of_positions(mask, x, core.num_heads)
        if mask is None:
            return None
    if padding is not None:
        padding = _seen_or_added(padding, x.dtype)
        if padding is None or padding.shape != (batch, length):
            return None
        padding = padding.view(batch, 1, 1, length)
    merged = _merged(mask, padding)
    return Call(x, *merged, batched=batched, batch_first=core.batch_first)


def _of_positions(mask, x, heads):
    """torch's mask [length, length] or [batch * heads, length, length] with four dimensions."""
    batch, length, _ = x.shape
    mask = _seen_or_added(mask, x.dtype)
    if mask is None or mask.shape[-2:] != (length, length):
        return None
    if mask.dim() == 2:
        return mask.view(1, 1, length, length)
    if mask.dim() == 3 and mask.shape[0] == batch * heads:
        return mask.view(batch, heads, length, length)
    return None


def _seen_or_added(mask, dtype):
    """torch's bool masks, in which True hides, as those in which it shows."""
    if mask.dtype == torch.bool:
        return ~mask
    return mask.to(dtype) if mask.is_floating_point() else None


def _merged(mask, padding):
    """One mask for both, and a bias where one of them is float and the other bool."""
    if mask is None or padding is None:
        return (padding if mask is None else mask), None
    if mask.dtype == padding.dtype:
        return (mask & padding if mask.dtype == torch.bool else mask + padding), None
    return (mask, padding) if mask.dtype == torch.bool else (padding, mask)
