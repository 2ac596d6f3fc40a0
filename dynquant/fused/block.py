"""A block that runs as one or two ops where that is possible, and as it always did otherwise."""

from functools import partial

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from dynquant.fused import calls
from dynquant.fused.arguments import with_argument
from dynquant.fused.biases import with_bias
from dynquant.fused.caches import updated_once
from dynquant.fused.classes import Swapped
from dynquant.fused.functions import runs_as_op
from dynquant.fused.hooks import all_idle
from dynquant.fused.inner import activated, forward_of
from dynquant.fused.parts import Numbers, Parts, numbers_of
from dynquant.fused.plan import Plan, holds
from dynquant.fused.readers import READERS


class FusedBlock(Swapped):
    """A block of a known architecture.

    Its settings: how the attention computes, the name that its adapter is registered for, and the
    name of its activation, where that is a function of its file, or None.
    """

    def forward(self, *args, **kwargs):
        parts, plan = self._current_plan()
        call = None
        if not self.training:
            call = READERS[parts.adapter.family](parts, args, kwargs)
        if call is None or not runs_as_op(call.x, lambda: call.added() + parts.parameters()):
            return self._as_written(parts, *args, **kwargs)
        kind = parts.adapter.result
        as_one = plan is not None and not _has_any_global_hook()
        if not as_one and (not parts.can_call_linears() or _trains(parts.linears)):
            return self._as_written(parts, *args, **kwargs)
        # Where a bias is returned, there are no weights.
        asked = kind in ("tuple", "weights") and (call.weights or not all_idle(self))
        if asked and call.cache is not None:
            call = call._replace(cache=updated_once(call.cache))
        if kind == "bias":
            call = with_bias(parts, call)
        if as_one:
            result = compute(parts, plan, call, self._settings[0])
        else:
            numbers = numbers_of(self, parts)
            result = calls.attention_in_parts(parts, call, self.in_integers(), numbers)
            result = call.restored(result)
        if kind == "tensor":
            return result
        if asked:  # returned weights of an attention are those of the float one
            if call.cache is not None:
                args, kwargs = with_argument(parts, parts.adapter.cache, call.cache, args, kwargs)
            return result, *super().forward(*args, **kwargs)[1:]
        if kind == "tuple":
            return (result,)
        return (result, None) if kind == "weights" else (result, call.bias, None)

    def _as_written(self, parts, *args, **kwargs):
        name = parts.adapter.inner_function()
        # A compiler cannot follow the making of a function, and makes kernels of its own anyway.
        if name is None or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        return forward_of(self._base, name, self._settings[2])(self, *args, **kwargs)

    def why_not(self):
        """What stands against running fused now, or ""."""
        parts = self._current_parts()
        training = "it is in training mode" if self.training else ""
        return parts.obstacle or training or parts.disturbance()

    def _current_plan(self):
        """The parts, and the plan by which they run fused now; None where something is against."""
        parts, compiling = self.__dict__.get("_parts"), torch.compiler.is_compiling()
        # A compiler cannot follow the call that watches.
        if not compiling and parts is not None and parts.plan and holds(parts.plan.fixed):
            return parts, parts.plan
        parts = self._current_parts()
        if parts.obstacle or parts.disturbance():
            return parts, None
        plan = Plan(self, parts)
        if not compiling:
            plan.keep(self, parts)
            parts.plan = plan if plan.fixed else None
        return parts, plan

    def _current_parts(self):
        parts = self.__dict__.get("_parts")
        if parts is not None and parts.hold():
            return parts
        kinds = None if parts is None else parts.kinds
        parts = self.__dict__["_parts"] = Parts(self, *self._settings[1:], kinds)
        return parts

    def in_integers(self):
        """Whether its attention is computed in integers where it can be."""
        return self._settings[0] == "integer"


def _trains(linears):
    """Whether one of the modules learns, as an adapter does."""
    return torch.is_grad_enabled() and any(
        parameter.requires_grad for part in linears.values() for parameter in part.parameters()
    )


def compute(parts, plan, call, attention):
    """What the forward of a block gives, by ops.

    Args:
        plan: the Plan of the parts.
        call: a Call.
        attention: "integer" or "float".
    """
    x, residual, integers = call.x, parts.adapter.residual, attention == "integer"
    if plan.linear_block is not None:
        return calls.linear_block(plan.linear_block, x, call.residual)
    if call.cross is not None:
        x = calls.cross(plan.cross, call, residual, integers)
    elif call.reused is not None:
        x = calls.reusing(plan.reusing, call, residual)
    elif call.as_tokens:
        x = calls.token(plan.token, call, residual)
    elif plan.relative is not None:
        x = calls.relative(plan.relative, parts, call, residual, integers)
    elif plan.attention is not None:
        x = calls.attention(plan.attention, call, residual, integers)
    elif parts.attention is not None:
        return calls.attention_in_parts(parts, call, integers, Numbers())
    if plan.feed_forward is not None:
        x = calls.feed_forward(plan.feed_forward, x, residual)
    return call.restored(x)


class FusedTorchLayer(FusedBlock):
    """nn.TransformerEncoderLayer, whose activation may be a function: it runs as the op as well."""

    @property
    def activation(self):
        function = self._modules.get("activation") or self.__dict__["activation"]
        parts = self.__dict__.get("_parts")
        if isinstance(function, nn.Module) or parts is None or parts.feed_forward is None:
            return function
        return partial(activated, parts.feed_forward.activation, function)

    @activation.setter
    def activation(self, function):
        self.__dict__["activation"] = function
        self.__dict__.pop("_parts", None)
