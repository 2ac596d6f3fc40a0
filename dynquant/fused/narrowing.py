"""Keys and values of a second sequence in int8: each token reads all of them."""

import weakref
from typing import NamedTuple

import torch

from dynquant.ops.heads import swapped

# Of fewer numbers in the keys, the processor's caches may have what a token reads of them.
_LEAST = 1 << 17
_SAMPLED = 64  # tokens, about, by which it is seen how near int8 is

_quantize = torch.ops.dynquant.quantize_activation


class Kept(NamedTuple):
    """Keys and values, as the op attend takes them.

    Attributes:
        keys, values: [batch, heads, tokens, features] in a float dtype, or in int8.
        scales: of these, fp32 [batch, heads, tokens] each; None each beside floats.
    """

    keys: torch.Tensor
    values: torch.Tensor
    scales: tuple = (None, None)

    def by_rows(self):
        """The same as scaled_dot_product takes them: tokens before heads."""
        return Kept(*swapped(self.keys, self.values), swapped(*self.scales))


class _Seen:
    """The keys and values that a cache's layer had at a call.

    Attributes:
        narrow: both in int8, a Kept; None until that is made, () where int8 would not do.
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
            self.narrow = _quantized(keys, values)
        return self.narrow or Kept(keys, values)


_SEEN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def narrowed(layer):
    """layer.keys and layer.values, or the same in int8 where that has been worth it, as a Kept.

    A token's attention to a second sequence takes as long as it takes to read these. The sequence
    does not change from token to token: where a layer has the same as at the last call, each vector
    is rounded once and kept beside it for the calls to come. They are not where each token brings
    others, as a search with beams does.

    Args:
        layer: of a cache of transformers.
    """
    keys, values = layer.keys, layer.values
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return Kept(keys, values)
    seen = _SEEN.get(layer)
    if seen is not None and seen.is_of(keys, values):
        return seen.narrowed(keys, values)
    _SEEN.pop(layer, None)
    if keys.numel() >= _LEAST and all(_is_wide(one) for one in (keys, values)):
        if keys.is_inference() or values.is_inference():
            if not {"keys", "values"} <= vars(layer).keys():
                return Kept(keys, values)
            layer.keys, layer.values = keys, values = _tracked(keys), _tracked(values)
        _SEEN[layer] = _Seen(keys, values)
    return Kept(keys, values)


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


def _quantized(keys, values):
    """Both with a scale for each vector, a Kept; () where they are not near enough."""
    made = [_quantize(one, per_token=True, symmetric=True)[:2] for one in (keys, values)]
    for x, (q, scale) in zip((keys, values), made, strict=True):
        if not (scale.isfinite().all() and _are_near(x, q, scale)):
            return ()
    (keys, key_scale), (values, value_scale) = made
    return Kept(keys, values, (key_scale, value_scale))


def _are_near(x, q, scale):
    """Whether each feature has its numbers to 20 decibels, by some of the tokens.

    Where one feature of all vectors is a hundred times the others, it takes the bits of these.
    """
    some = slice(None, None, max(1, x.shape[2] // _SAMPLED))
    x, found = x[:, :, some], q[:, :, some] * scale[:, :, some, None]
    energy, error = x.square().sum(2), (found - x).square().sum(2)
    return bool((error <= energy / 100).all())
