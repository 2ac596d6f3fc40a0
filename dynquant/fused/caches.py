"""What stands in the place of a cache of transformers."""

import torch


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
    """

    def __init__(self, keys, values):
        self._keys, self._values = keys, values
        self.calls = []

    def fresh(self):
        """One with the same tokens, not used yet."""
        return RecordedCache(self._keys, self._values)

    def update(self, *args, **kwargs):
        self.calls.append((args, kwargs))
        return torch.cat([self._keys, args[0]], 2), torch.cat([self._values, args[1]], 2)

    def is_used_as_by_ops(self, index):
        """Whether it is told keys, values, that number of a layer and the rest of the arguments."""
        if len(self.calls) != 1:
            return False
        (args, kwargs), *_ = self.calls
        return len(args) == 3 and args[2] == index and kwargs.keys() == {"kwargs"}
