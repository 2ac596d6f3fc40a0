"""The experts of a mixture as one op: both products, the activation between them and the sum."""

import sys

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from dynquant.fused.classes import Swapped, base_of
from dynquant.fused.functions import FLOATS, FusedActivation, activation_of, runs_as_op
from dynquant.fused.hooks import disturbed
from dynquant.nn.experts import Experts
from dynquant.ops.blocks import ACTIVATIONS

_experts = torch.ops.dynquant.experts.default


class FusedExperts(Swapped):
    """dynquant.nn.Experts with the gate of most models, or none. Its setting: the activation."""

    def forward(self, *args, **kwargs):
        x, chosen, weights = self._arguments(args, kwargs)
        if self._runs_as_op(x, chosen, weights):
            return compute(self, self._settings[0], x, chosen, weights)
        return super().forward(x, chosen, weights)

    forward.__signature__ = Experts.forward.__signature__

    def _runs_as_op(self, x, chosen, weights):
        if not all(isinstance(one, torch.Tensor) for one in (x, chosen, weights)):
            return False
        if self.training or disturbed(self.act_fn) or _has_any_global_hook():
            return False
        own = isinstance(self.act_fn, FusedActivation) and self.act_fn._settings
        if own != self._settings or chosen.dtype != torch.int64 or weights.dtype not in FLOATS:
            return False
        if x.dim() != 2 or chosen.dim() != 2 or chosen.shape != weights.shape:
            return False
        if chosen.shape[0] != x.shape[0]:
            return False
        return runs_as_op(x, lambda: (weights, *self._parameters.values()))


def activation_of_experts(module):
    """The name of their activation where the op has a form for such experts; else None."""
    if base_of(type(module)) is not Experts or module.has_post_expert_norm:
        return None
    library = sys.modules.get("transformers.integrations.moe")
    usual = getattr(library, "_default_apply_gate", None)
    if module.has_gate and getattr(module.float_class, "_apply_gate", None) is not usual:
        return None
    function = getattr(module, "act_fn", None)
    return activation_of(function) if isinstance(function, nn.Module) else None


def compute(module, activation, x, chosen, weights):
    """What the forward of experts gives, by the op."""
    arguments = []
    for name, one in module._formats.items():
        bias = module._parameters.get(f"{name}_bias")
        arguments += *module._held(name), bias, one.n
        scheme = one.scheme
    split = 1 if module.has_gate else 0
    return _experts(x, chosen, weights, *arguments, ACTIVATIONS[activation], split, *scheme)
