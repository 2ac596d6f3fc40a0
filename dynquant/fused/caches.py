"""Caches of transformers, and what stands in their place."""

import copy

import torch


def own_of(cache):
    """Of an EncoderDecoderCache that for a sequence's own tokens; any other itself."""
    return getattr(cache, "self_attention_cache", cache)


def updated_once(cache):
    """The same cache, which takes in a token once: updates after the first give what that gave."""
    return with_own(cache, UpdatedOnce(own_of(cache)))


def with_own(cache, own):
    """The cache with another one in the place of what own_of gives."""
    if own_of(cache) is cache:
        return own
    cache = copy.copy(cache)
    cache.self_attention_cache = own
    return cache


def keys_and_values(cache, index):
    """Of the second sequence, [batch, heads, tokens, features] each, or None."""
    if not getattr(cache, "is_updated", {}).get(index):
        return None
    layer = second_of(cache, index)
    return layer.keys, layer.values


def second_of(cache, index):
    """What an EncoderDecoderCache has of the second sequence for that number of a layer."""
    return cache.cross_attention_cache.layers[index]


def of_two_sequences(index, keys, values):
    """An EncoderDecoderCache that has these of the second sequence, for that number of a layer."""
    from transformers import DynamicCache, EncoderDecoderCache

    second = DynamicCache()
    second.update(keys, values, index)
    return EncoderDecoderCache(DynamicCache(), second)


class UpdatedOnce:
    """A cache that takes in a token once: updates after the first give what that gave."""

    def __init__(self, cache):
        self._cache, self._given = cache, None

    def update(self, *args, **kwargs):
        if self._given is None:
            self._given = self._cache.update(*args, **kwargs)
        return self._given

    def __getattr__(self, name):
        return getattr(self._cache, name)


class RecordedCache:
    """A cache with some tokens in it that tells how a block uses it.

    Args:
        keys, values: [batch, heads, tokens, features] of the tokens.

    Attributes:
        calls: the (args, kwargs) of each update.
        is_updated, self_attention_cache: what a cache of two sequences has, without a second one:
            some blocks know no other.
    """

    def __init__(self, keys, values):
        self._keys, self._values = keys, values
        self.calls, self.is_updated = [], {}

    @property
    def self_attention_cache(self):
        return self

    def fresh(self):
        """One with the same tokens, not used yet."""
        return RecordedCache(self._keys, self._values)

    def update(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return torch.cat([self._keys, args[0]], 2), torch.cat([self._values, args[1]], 2)

    def get_seq_length(self, index=0):
        return self._keys.shape[2]

    def get_mask_sizes(self, rows, index):
        return self.get_seq_length() + rows, 0

    def is_used_as_by_ops(self, index):
        """Whether it is told keys, values, that number of a layer and the rest of the arguments."""
        if len(self.calls) != 1:
            return False
        (args, kwargs), *_ = self.calls
        return len(args) == 3 and args[2] == index and kwargs.keys() == {"kwargs"}
