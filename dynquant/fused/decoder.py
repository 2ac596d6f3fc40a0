"""A decoder's layer, for any number of tokens: the ops of its attentions and of what is beside.

For anything else it runs its own forward, in which the feed-forward block is one op.
"""

from typing import NamedTuple

import torch

from dynquant.fused import calls
from dynquant.fused.adapters import Adapter
from dynquant.fused.arguments import by_name, of_cross_tokens, of_tokens
from dynquant.fused.block import FusedBlock
from dynquant.fused.functions import Norm, norm_of, runs_as_op
from dynquant.fused.inline import FusedInline
from dynquant.fused.parts import Parts, numbers_of
from dynquant.fused.places import part_of
from dynquant.fused.plan import Watched, holds
from dynquant.fused.readers import READERS


class FusedDecoder(FusedInline):
    """A layer whose adapter has `sublayers`, all of which run as ops."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls._compared = (cls._base.forward,)  # in a tuple, so that it is no method

    def forward(self, *args, **kwargs):
        if self._runs_as_written():
            return self._base.forward(self, *args, **kwargs)
        parts, plan, token_plan = self._current_plans()
        result = None if token_plan is None else token_plan.run(args, kwargs)
        return self._run_in_parts(parts, plan, args, kwargs) if result is None else result

    def _current_plans(self):
        """The parts, their Plan and a TokenPlan, each of these None where something is against."""
        parts, (compared,) = self.__dict__.get("_parts"), self._compared
        is_patched = self._base.forward is not compared
        kept = None if parts is None or is_patched else parts.token_plan
        if kept is not None and holds(kept.fixed):
            return parts, parts.plan, kept
        parts, plan = self._current_plan()
        made = None if plan is None or is_patched else token_plan_of(self, parts, plan)
        parts.token_plan = made if made is not None and made.fixed else None
        return parts, plan, made


class Attending(NamedTuple):
    """One of the attentions.

    Attributes:
        parts: its Parts.
        arguments: what its function in calls takes.
        in_integers: of its block.
    """

    parts: Parts
    arguments: tuple
    in_integers: bool

    def read(self, x, cache, mask, rest, second=None):
        """A Call, or None where these are not what its ops take.

        Args:
            rest: what the layer was called with besides, and hands on.
        """
        adapter = self.parts.adapter
        # What the reader for transformers, the one that goes with a cache, does where there is
        # nothing else to read.
        if not rest and adapter.rotary is None:
            if second is None:
                return of_tokens(self.parts, x, cache, mask, rest=rest)
            return of_cross_tokens(self.parts, x, cache, mask)
        if not rest.keys().isdisjoint(self.parts.roles):
            return None
        named = {**rest, adapter.cache: cache, adapter.mask: mask}
        if second is not None:
            named[adapter.cross] = second
        call = READERS[adapter.family](self.parts, (x,), named)
        return None if call is None or call.weights else call


class TokenPlan(NamedTuple):
    """What a layer is made of, and what its ops take besides what a call brings.

    Attributes:
        adapter: of the layer.
        attention, cross: an Attending each; cross is None where there is none to a second sequence.
        feed_forward: what calls.feed_forward takes.
        norms: those around them.
        fixed: what has to hold for that, for `holds`; None where it cannot be kept.
    """

    adapter: Adapter
    attention: Attending
    cross: Attending | None
    feed_forward: tuple
    norms: list
    fixed: tuple | None

    def run(self, args, kwargs):
        """What the layer's forward gives, or None where these ops cannot do it."""
        adapter, names = self.adapter, self.adapter.sublayers
        given = by_name(adapter.arguments, args, kwargs)
        if given is None:
            return None
        roles = adapter.arguments[0], adapter.cache, adapter.mask, names.second, names.second_mask
        x, cache, mask, second, second_mask = map(given.get, roles)
        rest = {name: one for name, one in given.items() if name not in adapter.arguments}
        if not isinstance(x, torch.Tensor) or not runs_as_op(x):
            return None
        if cache is None and self.attention.parts.runs_without_cache:
            return None  # as an op of its own
        # Both are read before anything runs: the cache takes in a token once.
        call, other = self.attention.read(x, cache, mask, rest), None
        if call is None:
            return None
        if second is not None:
            other = self.cross and self.cross.read(x, cache, second_mask, rest, second)
            if other is None:
                return None
        x = calls.token(self.attention.arguments, call, residual=True)
        if other is not None:
            other, integers = other._replace(x=x), self.cross.in_integers
            x = calls.cross(self.cross.arguments, other, residual=True, integers=integers)
        return calls.feed_forward(self.feed_forward, x, residual=True)


def token_plan_of(layer, parts, plan):
    """The TokenPlan of a layer, or None where one of them does not run as ops.

    Args:
        layer: an inline block whose adapter has `sublayers`.
        parts, plan: of the layer.
    """
    names, found = parts.adapter.sublayers, parts.feed_forward
    making = _Making(layer, plan)
    try:
        attention = making.attention(names.attention, names.attention_norm, "token")
        cross = names.cross and making.attention(names.cross, names.cross_norm, "cross")
        block = found.up, found.gate, found.down, found.activation, found.split
        ends = making.ends(names.feed_forward_norm)
    except LookupError:
        return None
    feed_forward = calls.feed_forward_arguments(*block, *ends, parts.scheme)
    return TokenPlan(parts.adapter, attention, cross, feed_forward, making.norms, making.fixed())


class _Making:
    """What a TokenPlan is made with: LookupErrors where something is not there or is no op."""

    def __init__(self, layer, plan):
        self._layer, self._plan, self.norms = layer, plan, []
        self._watched, self._kept = Watched(), True
        self._watch(plan.fixed)

    def fixed(self):
        return self._watched.fixed() if self._kept else None

    def ends(self, name):
        """The norms before and behind a sublayer: the one of that name, and None."""
        module = part_of(self._layer, name)
        if module is None or norm_of(module) != "layer":
            raise LookupError(name)
        norm = Norm("layer", module)
        self.norms.append(norm)
        self._watched.norm(norm)
        return self._plan.around(norm)

    def attention(self, name, norm, kind):
        block = part_of(self._layer, name)
        parts, plan = block._current_plan() if isinstance(block, FusedBlock) else (None, None)
        if plan is None or getattr(plan, kind) is None:
            raise LookupError(name)
        self._watch(plan.fixed)
        take = calls.token_arguments if kind == "token" else calls.cross_arguments
        numbers = numbers_of(block, parts)
        arguments = take(parts, numbers, *self.ends(norm), parts.scheme)
        return Attending(parts, arguments, block.in_integers())

    def _watch(self, fixed):
        """What a Plan depends on, where that can be kept."""
        self._kept = self._kept and fixed is not None
        if self._kept:
            self._watched.update(fixed)
