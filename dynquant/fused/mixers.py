"""Modules that mix tokens by linear attention, a state space or a short convolution.

They run their own forward, in which functions of transformers run as ops (mixer_functions.py).
"""

import dis
import inspect
import sys
from functools import lru_cache
from types import FunctionType

import torch

from dynquant.fused.classes import Swapped
from dynquant.fused.mixer_functions import INSTEAD, computes_the_same, op_for, written_state
from dynquant.nn._renamed import with_others


class FusedMixer(Swapped):
    """A module whose forward calls such functions."""

    def forward(self, *args, **kwargs):
        if self.training or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        own = _forward_of(self._base.forward)
        if own is None:  # a class may get another forward at any time
            return super().forward(*args, **kwargs)
        with written_state(_state_of(kwargs, self.__dict__.get("layer_idx"))):
            return own(self, *args, **kwargs)


def is_mixer(module):
    """Whether it is such a module, not fused yet, and one of its functions is known."""
    if isinstance(module, Swapped) or "forward" in module.__dict__:
        return False
    forward = type(module).forward
    names, functions = _functions_of(forward)
    is_known = any(computes_the_same(name, functions.get(name)) for name in names)
    return is_known and _forward_of(forward) is not None


@lru_cache(maxsize=256)
def _forward_of(forward):
    """The forward with ops in the place of functions; None where it calls none of those names."""
    names, _ = _functions_of(forward)
    return with_others(forward, op_for) if names else None


def _functions_of(forward):
    """The names of such functions that a forward calls, and where it finds them."""
    inner = inspect.unwrap(forward)
    if not isinstance(inner, FunctionType):
        return frozenset(), {}
    return _global_names(inner.__code__) & INSTEAD.keys(), inner.__globals__


@lru_cache(maxsize=256)
def _global_names(code):
    return frozenset(
        one.argval for one in dis.get_instructions(code) if one.opname == "LOAD_GLOBAL"
    )


_WRITES, _READS = "update_recurrent_state", "get_recurrent_state"


def _state_of(arguments, number):
    """The state of the layer with that number, where the cache among the arguments takes the next
    one in by copying it there, and nobody else is told of either.
    """
    library = sys.modules.get("transformers.cache_utils")
    usual = getattr(library, "LinearAttentionLayer", None)
    if usual is None or number is None:
        return None
    for cache in arguments.values():
        if isinstance(cache, library.Cache):
            layer = cache.layers[number] if number < len(cache.layers) else None
            is_usual = isinstance(layer, usual) and _is_as(layer, usual, _WRITES)
            if not is_usual or not _is_as(cache, library.Cache, _WRITES, _READS):
                return None
            states = layer.recurrent_states
            return states.get(0) if isinstance(states, dict) else None
    return None


def _is_as(instance, kind, *methods):
    """Whether these methods of an instance are those of a class that it is derived from."""
    return all(
        getattr(type(instance), name) is getattr(kind, name) and name not in instance.__dict__
        for name in methods
    )
