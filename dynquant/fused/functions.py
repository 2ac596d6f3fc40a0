"""Activations and norms: recognized by what they compute, and run as ops in fused blocks."""

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from dynquant.fused import calls
from dynquant.fused.classes import Swapped
from dynquant.fused.hooks import has_others_for_parameters
from dynquant.nn.quantize import remembered

# How many values a norm without a weight is tried on: no multiple of a group's.
_WITHOUT_WEIGHT = 37
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# What the activations of the ops compute, in the order in which they are tried.
_FORMULAS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu_squared": lambda x: F.relu(x).square(),
}


class Norm(NamedTuple):
    """kind: what norm_of tells. of_result: the residual is added behind it."""

    kind: str
    module: nn.Module
    of_result: bool = False

    @property
    def eps(self):
        return epsilon_of(self.module)

    @property
    def size(self):
        """How many values it goes over; None where it has no weight."""
        weight = self.module._parameters.get("weight")
        return None if weight is None else weight.shape[0]


def activation_of(function):
    """The name of the activation that `function`, a module or not, computes; None for another."""
    if isinstance(function, FusedActivation):
        return function._settings[0]
    x = torch.linspace(-12, 12, 1001)
    found = _evaluated(function, x)
    for name, formula in _FORMULAS.items():
        if found is not None and torch.allclose(found, formula(x), rtol=1e-5, atol=1e-5):
            return name
    return None


def norm_of(module):
    """What a norm computes: layer, rms, or rms_plus_one (1 is added to its weight).

    Returns:
        the name, "" for nn.Identity, None for a module that computes anything else.
    """
    if isinstance(module, FusedNorm):
        return None if has_others_for_parameters(module) else module._settings[0]
    if type(module) is nn.Identity:
        return ""
    if any(one.dtype not in FLOATS for one in module.parameters()):
        return None
    if type(module) is nn.LayerNorm:
        return "layer" if len(module.normalized_shape) == 1 else None
    weight, bias = map(module._parameters.get, ("weight", "bias"))
    parameters = [one for one in (weight, bias) if one is not None]
    if len(list(module.parameters())) != len(parameters) or epsilon_of(module) is None:
        return None
    if any(one.dim() != 1 or weight is None or one.shape != weight.shape for one in parameters):
        return None
    size = _WITHOUT_WEIGHT if weight is None else weight.shape[0]
    if size == 1 and type(module) is not nn.RMSNorm:
        return None  # it may be a weight for all values
    if any(True for _ in module.buffers()):
        return None  # it may keep what it sees
    if weight is None:  # it may give another dtype than that of its input
        kinds = {_kind_of(module, size, None, None, dtype) for dtype in FLOATS}
        return kinds.pop() if len(kinds) == 1 else None
    return _kind_of(module, size, weight, bias, weight.dtype)


def _kind_of(module, size, weight, bias, dtype):
    """What a norm of so many values with these parameters computes for an input of that dtype."""
    generator = torch.Generator().manual_seed(0)
    # Norms of channels, which come before the last dimension, find another number of them. The
    # mean of a row is as great as its deviation.
    shape = 2, 4 if size != 4 else 5, size
    rows = 1 + torch.randn(shape, generator=generator)
    x = rows * torch.logspace(-4, 1, shape[0] * shape[1]).view(*shape[:2], 1)
    x = x.to(dtype)
    found = _evaluated(module, x)
    if found is None:
        return None
    candidates = _normalized(x.float(), weight, bias, epsilon_of(module))
    errors = {name: _error(found.float(), expected, bias) for name, expected in candidates}
    least = min(errors.values(), default=math.inf)
    tolerance = 1e-4 if x.dtype == torch.float32 else 1e-2
    names = [name for name, error in errors.items() if error == least <= tolerance]
    return names[0] if len(names) == 1 else None  # with weights of zero, all give the same


@torch.no_grad()
def _normalized(x, weight, bias, eps):
    """(name, x by it) of each norm that has these parameters."""
    shape = x.shape[-1:]
    if weight is None:
        yield "rms", F.rms_norm(x, shape, None, eps)
        return
    weight = weight.float()
    if bias is None:
        yield "rms", F.rms_norm(x, shape, weight, eps)
        yield "rms_plus_one", F.rms_norm(x, shape, 1 + weight, eps)
    elif not weight.any():
        return  # nothing of the norm is seen
    yield "layer", F.layer_norm(x, shape, weight, None if bias is None else bias.float(), eps)


@torch.no_grad()
def _error(found, expected, bias):
    """The greatest of a value, beside what it is a sum of or a part of the greatest in its row."""
    size = expected.abs() if bias is None else (expected - bias).abs() + bias.abs()
    size = size + 0.05 * size.amax(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    return float(((found - expected).abs() / size).nan_to_num(math.inf).max())


def epsilon_of(norm):
    """What a norm adds to the variance, under the names that libraries have for it, or None."""
    own = norm.__dict__
    found = own.get("eps", own.get("variance_epsilon"))
    if found is None and isinstance(norm, nn.RMSNorm):
        return torch.finfo(torch.float32).eps  # torch takes it for the narrower dtypes as well
    return found


@torch.no_grad()
def _evaluated(function, x):
    try:  # without hooks: what they see should be the model's
        found = (function.forward if isinstance(function, nn.Module) else function)(x.clone())
    except Exception:
        return None  # whatever it is, it is not one of these
    fits = isinstance(found, torch.Tensor) and found.shape == x.shape and found.dtype == x.dtype
    return found if fits else None


def runs_as_op(x, parameters=tuple):
    """Whether float functions of x run as ops: no gradient, autocast or other kind of tensor.

    Args:
        parameters: gives those that may want a gradient; called where one could be wanted.
    """
    if not x.is_cpu or x.dtype not in FLOATS or x.is_nested or remembered(x) is not None:
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return not torch.is_grad_enabled() or not any(
        tensor.requires_grad for tensor in (x, *parameters()) if tensor is not None
    )


class FusedActivation(Swapped):
    """An activation inside a fused block: the op that the block is made of."""

    def forward(self, *args, **kwargs):
        if kwargs or len(args) != 1 or self.training or not runs_as_op(args[0]):
            return super().forward(*args, **kwargs)
        return calls.activation(self._settings[0], args[0])


class FusedNorm(Swapped):
    """A norm inside a fused block: the op that the block is made of."""

    def forward(self, *args, **kwargs):
        simple = len(args) == 1 and not kwargs and not self.training
        if not simple or not runs_as_op(args[0], self._parameters.values):
            return super().forward(*args, **kwargs)
        if has_others_for_parameters(self):
            return super().forward(*args, **kwargs)
        weight = self._parameters.get("weight")
        if weight is not None and weight.dtype != args[0].dtype:  # the result's may be either
            return super().forward(*args, **kwargs)
        return calls.norm(Norm(self._settings[0], self), args[0])
