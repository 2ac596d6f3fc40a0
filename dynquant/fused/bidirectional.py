"""Decoders of transformers all of whose tokens see each other, as some that embed texts.

For these, transformers evaluates functions of two positions by torch.vmap at each call, which for a
short text takes as long as the layers do. The masks themselves are given to the forward instead.
"""

import torch

from dynquant.fused.adapters import name_of, names_in_transformers
from dynquant.fused.arguments import by_name, implementation_of
from dynquant.fused.classes import Swapped, SwappedModel
from dynquant.fused.padding import hides_nothing

_KNOWN = set(names_in_transformers("gemma3", "Gemma3TextModel"))
_ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds", "use_cache")
_FULL, _SLIDING = "full_attention", "sliding_attention"


def is_bidirectional(module):
    """Whether it is such a model, not fused yet."""
    if name_of(type(module)) not in _KNOWN or isinstance(module, Swapped):
        return False
    return bool(getattr(module.config, "use_bidirectional_attention", False))


class FusedBidirectional(SwappedModel):
    """Such a model: where there are no tokens before those of the call, their masks are few ops."""

    def _called(self, base, args, kwargs):
        given = _with_masks(self, args, kwargs)
        return base(self, *args, **kwargs) if given is None else base(self, **given)


def _with_masks(model, args, kwargs):
    """The arguments with what the model makes of its mask for each type of layer, or None."""
    # Values of the mask decide what is given, which nothing that traces can follow.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    given = by_name(_ARGUMENTS, args, kwargs)
    if given is None or not _is_known(model):
        return None
    # Positions may tell of several texts in one row.
    if any(given.get(name) is not None for name in ("cache", "past_key_values", "position_ids")):
        return None
    ids, embeddings = given.get("input_ids"), given.get("inputs_embeds")
    x, mask = embeddings if ids is None else ids, given.get("attention_mask")
    if type(x) is not torch.Tensor or x.dim() < 2 or not x.is_cpu:
        return None
    if mask is not None and (type(mask) is not torch.Tensor or mask.shape != x.shape[:2]):
        return None
    masks = _masks(mask, x.shape[1], model.config.sliding_window)
    return {**given, "attention_mask": masks}


def _is_known(model):
    """Whether its masks are those that are known here, and none says that all is seen."""
    config = model.config
    if not getattr(config, "use_bidirectional_attention", False):
        return False
    usual = getattr(config, "is_causal", True) and set(config.layer_types) <= {_FULL, _SLIDING}
    if not usual or implementation_of(model) != "sdpa":
        return False
    return not any(getattr(layer.self_attn, "is_causal", True) for layer in model.layers)


def _masks(mask, length, window):
    full = None
    if mask is not None and not hides_nothing(mask):
        full = mask.to(torch.bool)[:, None, None, :]
    sliding = full
    if window is not None and window < length:
        positions = torch.arange(length)
        sliding = (positions[:, None] - positions).abs() < window
        sliding = sliding[None, None] if full is None else sliding & full
    return {_FULL: full, _SLIDING: sliding}
