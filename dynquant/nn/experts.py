"""Experts of mixture-of-experts models of transformers, with weights in int8 or in 16 bits."""

import copy
import inspect
import sys
from typing import Any

import torch
from torch import nn

from dynquant.nn._fx import as_one_call
from dynquant.nn._module import QuantizedModule
from dynquant.nn._script import no_script
from dynquant.nn._stacks import Bits16Stack, Int8Stack
from dynquant.qconfig import QConfig


def _call(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor: ...


_CALL = inspect.signature(_call)
# Up to so many rows, all of them together stay in the caches, and the calls for each expert would
# take longer than they do.
_FEW_ROWS = 2048
_DECLARED = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")


class FloatExperts(nn.Module):
    """Stands for the classes of experts in tables of types: they have no base class in common."""


def is_experts(module_type):
    """Whether a type is one that transformers' decorator use_experts_implementation has made.

    Such a class declares what its experts compute, as Experts says, and transformers itself
    replaces its forward by implementations that know the declaration alone.
    """
    module = sys.modules.get("transformers.integrations.moe")
    forward = module_type.__dict__.get("forward")
    return (
        module is not None
        and getattr(forward, "__globals__", None) is vars(module)
        and hasattr(forward, "__wrapped__")
    )


def unlike_experts(mod):
    """Why a module of such a type is not what it declares, or None."""
    if missing := [key for key in (*_DECLARED, "num_experts") if not hasattr(mod, key)]:
        return f"has no attribute {missing[0]}"
    if getattr(mod, "_is_expert_parallel", False):
        return "has a part of the experts, the rest of which other processes have"
    found = dict(mod.named_parameters(recurse=False))
    expected = set(_weights(mod)) | set(_biases(mod))
    if found.keys() != expected:
        wrong = ", ".join(sorted(found.keys() ^ expected))
        return f"has other parameters than its class declares: {wrong}"
    up, down = (_rows(mod, found[key]) for key in _weights(mod))
    if up.dim() != 3 or down.dim() != 3:
        return f"has weights of shape {list(up.shape)} and {list(down.shape)}"
    inner = down.shape[2] * (2 if mod.has_gate else 1)
    if [mod.num_experts, inner, down.shape[1]] != list(up.shape) or len(down) != len(up):
        return f"has weights of shape {list(up.shape)} and {list(down.shape)}"
    return None


def _weights(mod):
    return ("gate_up_proj" if mod.has_gate else "up_proj", "down_proj")


def _biases(mod):
    return tuple(f"{name}_bias" for name in _weights(mod)) if mod.has_bias else ()


def _rows(mod, weight):
    """A weight with one row for each output: [E, N, K]."""
    return weight.transpose(1, 2) if mod.is_transposed else weight


def _zeros(x, weights):
    """What products of both are added to."""
    return torch.zeros_like(x, dtype=torch.promote_types(_product_type(x, weights), torch.float32))


def _product_type(x, weights):
    return torch.promote_types(x.dtype, weights.dtype)


class Experts(QuantizedModule):
    """The experts of one layer, each of two linear layers with int8 weights.

    Made by from_float, which quantize_dynamic calls for every class of transformers that is
    declared by its decorator use_experts_implementation (Mixtral, Qwen-MoE, DeepSeek, GPT-OSS,
    ...). For each token and each expert e that is chosen for it with the weight w, this adds

        w * down_e(gate(up_e(x)))

    in the order of e, where up_e and down_e compute as dynquant.nn.Linear does, each for the tokens
    of its expert together, and gate is the float class's own function. Sums are in fp32, and are
    rounded at the end, to the dtype of such a product and to x's.

    The weights are held as one packed weight an expert. The state dict has for each of the two,
    gate_up_proj (up_proj, where there is no gate) and down_proj: gate_up_proj_int8 (int8 [E, N, K],
    a row for each output, in whichever order the float module has them), gate_up_proj_scale (fp32
    [E, N] or [E, 1]), and gate_up_proj_bias where there is one; and version (int64).
    load_state_dict also takes what the float module has, whose weights are then quantized.

    Attributes:
        gate_up_proj or up_proj, down_proj: QuantizedWeights of the float module's shapes and
            dtype; one of them at an index is the weight of that expert. Assigning a float weight
            quantizes it.
        gate_up_proj_bias, down_proj_bias: parameters without gradient, where there are any.
        per_token, symmetric, activation_bits: how the inputs of both layers are quantized.
        float_class: that of the float module; its plain attributes and submodules are here as well.
    """

    FLOAT = "experts"
    FORMAT = Int8Stack
    DTYPES = Int8Stack.DTYPES

    def __init__(self, mod: nn.Module, qconfig: QConfig, tied_to: nn.Module | None = None) -> None:
        self.__dict__["is_transposed"] = mod.is_transposed  # which _rows asks for
        super().__init__(mod, qconfig, tied_to)
        self.float_class = type(mod)
        for key, value in vars(mod).items():
            if not key.startswith("_") and key != "training":
                self.__dict__.setdefault(key, value)
        for key, child in mod.named_children():
            self.add_module(key, copy.deepcopy(child).eval())

    @classmethod
    def _float_parameters(cls, mod):
        weights = {name: getattr(mod, name) for name in _weights(mod)}
        return weights, {name: getattr(mod, name) for name in _biases(mod)}

    @classmethod
    def _rows_of(cls, mod, weight):
        return _rows(mod, weight)

    def _rows(self, weight):
        return _rows(self, weight)

    _shown = _rows

    def _float_module(self):
        mod = self.float_class.__new__(self.float_class)
        nn.Module.__init__(mod)
        kept = {"float_class", *self.FORMAT.settings(QConfig(dtype=self.DTYPES[0]))}
        for key, value in vars(self).items():
            if not key.startswith("_") and key not in kept:
                setattr(mod, key, value)
        mod._is_expert_parallel = False
        for key, child in self.named_children():
            setattr(mod, key, copy.deepcopy(child))
        return mod

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The sum for each token.

        Args, by the names that the float module has for them:
            hidden_states: fp32, bf16 or fp16 [tokens, K].
            top_k_index: int64 [tokens, choices]: the experts of each token; the number of experts
                and beyond stands for none.
            top_k_weights: floats [tokens, choices].

        Returns:
            [tokens, K] in the dtype of hidden_states.
        """
        x, chosen, weights = self._arguments(args, kwargs)
        if not all(isinstance(one, torch.Tensor) for one in (x, chosen, weights)):
            return as_one_call(self, x, chosen, weights)
        choices = chosen.shape[-1]
        chosen, weights = chosen.reshape(-1), weights.reshape(-1)
        order = chosen.argsort(stable=True)
        wants_gradient = x.requires_grad and torch.is_grad_enabled()
        if torch.compiler.is_compiling() and not wants_gradient:
            every = torch.arange(self.num_experts, device=chosen.device)
            counts = (chosen[:, None] == every).sum(0)
            return self._all_at_once(x, weights, order, counts, choices)
        counts = torch.bincount(chosen, minlength=self.num_experts)[: self.num_experts]
        if x.is_cpu and not wants_gradient and len(order) <= _FEW_ROWS:
            order = order[: int(counts.sum())]
            return self._all_at_once(x, weights, order, counts, choices)
        total = _zeros(x, weights)
        first = 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                places = order[first : first + count]
                tokens = places // choices
                y = self._expert(expert, x[tokens]) * weights[places, None]
                total.index_add_(0, tokens, y.to(total.dtype))
                first += count
        return total.to(_product_type(x, weights)).to(x.dtype)

    forward.__signature__ = _CALL  # for whoever reads it, as error messages do

    def _all_at_once(self, x, weights, order, counts, choices):
        """The same without a branch that depends on data: the rows of each expert are a group.

        Args:
            order: the places in `weights`, by expert.
            counts: how many of these each expert has.
        """
        tokens = order // choices
        y = self._gated(x[tokens], lambda name, y: self._grouped(name, y, counts))
        y = y * weights[order, None]
        total = _zeros(x, weights)
        total = total.index_add(0, tokens, y.to(total.dtype))
        return total.to(_product_type(x, weights)).to(x.dtype)

    def _grouped(self, name, x, counts):
        one, bias = self._formats[name], self._parameters.get(f"{name}_bias")
        held = one.mixed(self._held(name))
        return torch.ops.dynquant.linear_grouped(x, counts, *held, bias, one.n, *one.scheme)

    def _expert(self, expert, x):
        return self._gated(x, lambda name, y: self._product(name, expert, y))

    def _gated(self, x, product):
        up, down = self._formats
        y = product(up, x)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = product(down, y)
        return self.post_expert_norm(y) if self.has_post_expert_norm else y

    def _apply_gate(self, y):
        return self.float_class._apply_gate(self, y)

    def _product(self, name, expert, x):
        one, held = self._formats[name].of(self._held(name), expert)
        bias = self._parameters.get(f"{name}_bias")
        return one.linear(x, held, None if bias is None else bias[expert])

    def _arguments(self, args, kwargs):
        """The three arguments of a call, by whichever names."""
        if not kwargs and len(args) == 3:
            return args
        own = inspect.signature(self.float_class.forward).parameters
        named = {theirs: ours for ours, theirs in zip(_CALL.parameters, own, strict=False)}
        kwargs = {named.get(key, key): value for key, value in kwargs.items()}
        return _CALL.bind(self, *args, **kwargs).args[1:]

    def __prepare_scriptable__(self):
        raise no_script(self, "runs as many experts as are chosen")

    def extra_repr(self) -> str:
        up, down = self._formats.values()
        return (
            f"num_experts={up.experts}, in_features={up.k}, intermediate_features={down.k}, "
            f"bias={self.has_bias}, {up}"
        )


class Experts16bit(Experts):
    """Experts with weights in 16 bits, computed in fp32 as dynquant.nn.Linear16bit computes.

    What Experts says holds, but for the state dict: it has gate_up_proj and down_proj in 16 bits
    [E, N, K].
    """

    FORMAT = Bits16Stack
    DTYPES = Bits16Stack.DTYPES
