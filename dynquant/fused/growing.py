"""Keys and values of a cache that take in a token where they are, and not in a copy of all."""

import functools
import sys
import weakref
from types import SimpleNamespace

import torch

# Of so many numbers in the keys, a copy takes less time than finding out all of this.
_LEAST = 1 << 15


class _Room:
    """The memory of the keys and values that a cache's layer had after its last update."""

    def __init__(self):
        self._tokens = 0  # how many it is for; 0 where it was not made here

    def note(self, layer):
        # Weakly: memory ends when the layer lets it go.
        self._keys, self._values = weakref.ref(layer.keys), weakref.ref(layer.values)

    def is_of(self, layer):
        """Whether the layer has the same as then."""
        return self._keys() is layer.keys and self._values() is layer.values

    def take(self, layer, key, value):
        """Puts them behind the layer's own, which nobody else holds."""
        length = layer.keys.shape[2] + key.shape[2]
        tokens = self._tokens
        if length > tokens:
            tokens = length + length // 4 + 16
        longer = (
            self._longer(rows, new, length, tokens)
            for rows, new in ((layer.keys, key), (layer.values, value))
        )
        layer.keys, layer.values = longer
        self._tokens = tokens

    def _longer(self, rows, new, length, tokens):
        batch, heads, before, features = rows.shape
        strides = heads * tokens * features, tokens * features, features, 1
        if tokens == self._tokens and rows.stride() == strides:
            longer = rows
        else:
            # Zeros, since whoever saves the keys saves what is behind them as well.
            longer = rows.new_zeros(batch, heads, tokens, features)
            longer.narrow(2, 0, before).copy_(rows)
        # The tensor itself, not a view, which would hold what it is a view of.
        longer.as_strided_((batch, heads, length, features), strides)
        longer.narrow(2, before, length - before).copy_(new)
        return longer


_ROOMS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def updated(cache, key, value, index, rest):
    """What cache.update(key, value, index, kwargs=rest) gives, and does to the cache.

    A DynamicCache copies all keys and values for each token: of a long text, that takes longer than
    the attention. Here a layer that nobody has changed since its last update gets keys and values
    with room behind them, and later tokens are written there, in the same tensors, for as long as
    nobody else holds these or their memory.
    """
    layer = _growing_layer(cache, index)
    if layer is None:
        return cache.update(key, value, index, kwargs=rest)
    room = _ROOMS.get(layer)
    if room is not None and room.is_of(layer) and _can_take(layer, key, value):
        room.take(layer, key, value)
    else:
        cache.update(key, value, index, kwargs=rest)
        room = _ROOMS[layer] = _Room()
    room.note(layer)
    return layer.keys, layer.values


def _growing_layer(cache, index):
    """The cache's layer, where it has many keys, and an update only puts others behind them."""
    library = sys.modules.get("transformers.cache_utils")
    if library is None or type(cache) is not library.DynamicCache:
        return None
    if getattr(cache, "offloading", True):  # or of a version that does it otherwise
        return None
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None  # neither follows what is written where
    if not 0 <= index < len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is not library.DynamicLayer or not getattr(layer, "is_initialized", False):
        return None
    if layer.keys.numel() < _LEAST:
        return None
    return layer if _is_own(cache, library) and _is_own(layer, library) else None


def _is_own(cache, library):
    """Whether its update is the one of transformers: some tools put another in its place."""
    code = getattr(type(cache).update, "__globals__", None)
    return code is library.__dict__ and "update" not in cache.__dict__


def _can_take(layer, key, value):
    """Whether these can be written behind what the layer has, and nobody would see it."""
    keys, values = layer.keys.shape, layer.values.shape
    if keys[2] != values[2] or key.shape[2] != value.shape[2]:
        return False
    if not (_fits(layer.keys, key) and _fits(layer.values, value)):
        return False
    alone = _holders_of_one()
    return alone is not None and _holders(layer) == alone


def _fits(rows, new):
    if not type(rows) is type(new) is torch.Tensor:
        return False
    if rows.requires_grad:
        return False  # what autograd knows of it has this shape
    if rows.is_inference() and not torch.is_inference_mode_enabled():
        return False  # it must not be written to
    kind = rows.dtype, rows.device, rows.shape[:2], rows.shape[3]
    return kind == (new.dtype, new.device, new.shape[:2], new.shape[3])


def _holders(layer):
    """How often keys and values are held: as objects, as tensors and as memory."""
    counts = sys.getrefcount(layer.keys), sys.getrefcount(layer.values)
    tensors = layer.keys._use_count(), layer.values._use_count()
    return *counts, *tensors, _uses(layer.keys), _uses(layer.values)


def _uses(tensor):
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


@functools.cache
def _holders_of_one():
    """The same of what nobody else holds; None where torch does not tell."""
    alone = SimpleNamespace(keys=torch.zeros(2), values=torch.zeros(2))
    try:
        return _holders(alone)
    except AttributeError:
        return None
