"""Keys and values of a second sequence in 16 bits: each token reads all of them."""

import weakref

import torch

# Of fewer numbers in the keys, the processor's caches may have what a token reads of them.
_LEAST = 1 << 17
# Where the greatest number is between these, fp16 has 11 bits of all that count beside it.
_SMALLEST, _GREATEST = 2**-6, torch.finfo(torch.float16).max


class _Seen:
    """The keys and values that a cache's layer had at a call.

    Attributes:
        narrow: both in fp16; None until that is made, () where fp16 has not their range.
    """

    def __init__(self, keys, values):
        self.narrow = None
        self._tensors = weakref.ref(keys), weakref.ref(values)
        self._versions = keys._version, values._version

    def is_of(self, keys, values):
        """Whether they are the same, to which nothing was written since."""
        first, second = self._tensors
        if first() is not keys or second() is not values:
            return False
        return self._versions == (keys._version, values._version)

    def narrowed(self, keys, values):
        if self.narrow is None:
            has_range = _has_range(keys) and _has_range(values)
            self.narrow = (keys.half(), values.half()) if has_range else ()
        return self.narrow or (keys, values)


_SEEN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def narrowed(layer):
    """layer.keys and layer.values, or the same in fp16 where that has been worth it.

    A token's attention to a second sequence takes as long as it takes to read these. The sequence
    does not change from token to token: where a layer has the same as at the last call, they are
    rounded once and kept beside it for the calls to come. They are not where each token brings
    others, as a search with beams does.

    Args:
        layer: of a cache of transformers.
    """
    keys, values = layer.keys, layer.values
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return keys, values
    seen = _SEEN.get(layer)
    if seen is not None and seen.is_of(keys, values):
        return seen.narrowed(keys, values)
    _SEEN.pop(layer, None)
    if keys.numel() >= _LEAST and all(_is_wide(one) for one in (keys, values)):
        if keys.is_inference() or values.is_inference():
            if not {"keys", "values"} <= vars(layer).keys():
                return keys, values
            layer.keys, layer.values = keys, values = _tracked(keys), _tracked(values)
        _SEEN[layer] = _Seen(keys, values)
    return keys, values


def _is_wide(tensor):
    return type(tensor) is torch.Tensor and tensor.dtype == torch.float32


def _tracked(tensor):
    """A tensor in the same memory that counts what is written to it, which one of inference mode
    does not."""
    if not tensor.is_inference():
        return tensor
    place = tensor.storage_offset(), tensor.size(), tensor.stride()
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return empty.set_(tensor.untyped_storage(), *place)


def _has_range(tensor):
    """Whether fp16 holds the numbers as precisely as they count; not where one is NaN."""
    least, most = torch.aminmax(tensor)
    greatest = max(-least.item(), most.item())
    return greatest == 0 or _SMALLEST <= greatest <= _GREATEST
