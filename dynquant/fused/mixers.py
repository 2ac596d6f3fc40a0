"""Modules that mix tokens by linear attention, a state space or a short convolution.

They run their own forward, in which functions of transformers run as ops (mixer_functions.py).
"""

import inspect
import sys
from functools import lru_cache, partial
from types import FunctionType

import torch

from dynquant.fused.classes import Swapped
from dynquant.fused.mixer_functions import INSTEAD, computes_the_same, written_state
from dynquant.nn._renamed import with_others


class FusedMixer(Swapped):
    """A module whose forward calls such functions."""

    def forward(self, *args, **kwargs):
        if self.training or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        state = _state_of(kwargs.get("cache"), self.__dict__.get("layer_idx"))
        with written_state(state):
            return _forward_of(self._base.forward)(self, *args, **kwargs)


def is_mixer(module):
    """Whether it is such a module, not fused yet, whose functions are known."""
    if isinstance(module, Swapped) or "forward" in module.__dict__:
        return False
    return _forward_of(type(module).forward) is not None


@lru_cache(maxsize=256)
def _forward_of(forward):
    """The forward with ops in the place of functions; None where it calls no such function."""
    inner = inspect.unwrap(forward)
    if not isinstance(inner, FunctionType):
        return None
    called = {
        name: inner.__globals__.get(name) for name in INSTEAD if name in inner.__code__.co_names
    }
    others = {
        name: partial(INSTEAD[name], function)
        for name, function in called.items()
        if computes_the_same(name, function)
    }
    return with_others(forward, others) if others else None


def _state_of(cache, layer):
    """What a layer's cache has as its state, if it takes the next one in by copying it there."""
    library = sys.modules.get("transformers.cache_utils")
    usual = getattr(library, "LinearAttentionLayer", None)
    layers = getattr(cache, "layers", ())
    if usual is None or layer is None or layer >= len(layers):
        return None
    kept = layers[layer]
    if not isinstance(kept, usual):
        return None
    copies = type(kept).update_recurrent_state is usual.update_recurrent_state
    return kept.recurrent_states.get(0) if copies else None
