"""A layer that runs its own forward, in which the feed-forward block is one op."""

import torch
from torch.nn.modules.module import _has_any_global_hook

from dynquant.fused import calls
from dynquant.fused.block import FusedBlock
from dynquant.fused.classes import base_of
from dynquant.fused.functions import runs_as_op


class FusedInline(FusedBlock):
    """A layer whose adapter is `inline`: a decoder's, with a cache and a second sequence."""

    def forward(self, *args, **kwargs):
        if self._runs_as_written():
            return self._base.forward(self, *args, **kwargs)
        return self._run_in_parts(*self._current_plan(), args, kwargs)

    def _runs_as_written(self):
        return self.training or _has_any_global_hook() or torch.compiler.is_compiling()

    def _run_in_parts(self, parts, plan, args, kwargs):
        if plan is None:
            return self._base.forward(self, *args, **kwargs)
        return run(self, parts, plan, *args, **kwargs)


def run(layer, parts, plan, /, *args, **kwargs):
    """The layer's own forward, with one op for its feed-forward block.

    Args:
        layer: fused or not.
        parts, plan: of the layer.
    """
    names, found = parts.adapter.feed_forward, parts.feed_forward

    def whole(x):
        if runs_as_op(x):
            return calls.feed_forward(plan.feed_forward, x)
        return found.down(found.function(found.up(x)))

    instead = {names.up: whole, names.activation: _unchanged, names.down: _unchanged}
    return base_of(type(layer)).forward(_AsSeen(layer, instead), *args, **kwargs)


def _unchanged(x):
    return x


class _AsSeen:
    """A module as its forward sees it, with something else under some of its names."""

    forward = None  # what wraps a forward compares it with that of the type

    def __init__(self, module, instead):
        self.__dict__.update(instead, _module=module)

    def __getattr__(self, name):
        return getattr(self._module, name)

    def __setattr__(self, name, value):
        setattr(self._module, name, value)
