"""The experts of a mixture as one op: both products, the activation between them and the sum."""

import sys

import torch
from torch import nn

from dynquant.fused.classes import Swapped, base_of
from dynquant.fused.functions import FusedActivation, activation_of, runs_as_op
from dynquant.fused.hooks import disturbed
from dynquant.nn.experts import Experts
from dynquant.ops.blocks import ACTIVATIONS

_LEAST_DB = 35  # to what it did before: bytes that round otherwise leave more
_experts = torch.ops.dynquant.experts.default


class FusedExperts(Swapped):
    """dynquant.nn.Experts with the gate of most models, or none. Its setting: the activation."""

    def forward(self, *args, **kwargs):
        x, chosen, weights = self._arguments(args, kwargs)
        if self._runs_as_op(x, chosen, weights):
            return compute(self, self._settings[0], x, chosen, weights)
        return super().forward(x, chosen, weights)

    def _runs_as_op(self, x, chosen, weights):
        if not all(isinstance(one, torch.Tensor) for one in (x, chosen, weights)):
            return False
        if self.training or disturbed(self.act_fn) or not isinstance(self.act_fn, FusedActivation):
            return False
        if x.dim() != 2 or chosen.shape != weights.shape or chosen.dtype != torch.int64:
            return False
        if chosen.dim() != 2 or not weights.is_floating_point():
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
    arguments = []
    for name, one in module._formats.items():
        bias = module._parameters.get(f"{name}_bias")
        arguments += *module._held(name), bias, one.n
        scheme = one.scheme
    split = 1 if module.has_gate else 0
    return _experts(x, chosen, weights, *arguments, ACTIVATIONS[activation], split, *scheme)


@torch.no_grad()
def experts_difference(module, activation):
    """Why the op cannot take the place of a module's forward, or ""."""
    up = next(iter(module._formats.values()))
    device = module._held(up.name)[0].device
    if device.type != "cpu":
        return f"is on {device}; experts run fused on the CPU"
    tokens, choices = 9, min(2, up.experts)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, up.k, generator=generator)
    chosen = torch.arange(tokens * choices).view(tokens, choices) % up.experts
    weights = torch.rand(tokens, choices, generator=generator)
    expected = module.forward(x, chosen, weights)
    noise = (compute(module, activation, x, chosen, weights) - expected).double().square().sum()
    ratio = float(10 * torch.log10(expected.double().square().sum() / noise.clamp(min=1e-30)))
    return "" if ratio >= _LEAST_DB else f"differs: {ratio:.1f} dB to the unfused experts"
