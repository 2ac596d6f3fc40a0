"""nn.Linear with an int8 weight, whose input is quantized at each call."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from typing_extensions import Self

from dynquant.nn._formats import Int8
from dynquant.nn._fx import as_one_call
from dynquant.nn._module import QuantizedModule
from dynquant.nn._torch_ao import with_plain_linear
from dynquant.nn.quantize import remembered
from dynquant.qconfig import QConfig

_linear_dynamic = torch.ops.dynquant.linear_dynamic.default
_linear_without_gradient = torch.ops.dynquant.linear_dynamic.inference
# The same without the overload's own Python frame, which costs 0.4 microseconds a call; compilers
# know the overload alone, and a tracer names values by frames.
_linear_without_frame = getattr(_linear_without_gradient, "_op", _linear_without_gradient)
_scaled_mm = torch.ops.dynquant.scaled_mm.default


class _ScaledMM(torch.autograd.Function):
    """The product of an x that remembers its quantized form, with the gradient of linear_dynamic.

    The gradient of x is that of a float linear with the dequantized weight.
    """

    @staticmethod
    def forward(ctx, x, linear, arguments):
        ctx.linear, ctx.dtype = linear, x.dtype
        return _scaled_mm(*arguments)

    @staticmethod
    def backward(ctx, gradient):
        linear = ctx.linear
        weight = linear._formats["weight"].values(linear._held("weight"))
        return (gradient.to(torch.float32) @ weight).to(ctx.dtype), None, None


# Fewer values are quantized again in less time than another op is called.
_SHARED_FROM = 1 << 16


def outputs_of(linears, x):
    """The outputs of several modules for one x, which is quantized once where all are Linear.

    The bits are those of calling each, as is done for an x of few values.
    """
    followed = (
        torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not torch.Tensor
    )
    if not followed and x.numel() < _SHARED_FROM:
        return [linear(x) for linear in linears]
    if _has_any_global_hook() or not all(
        type(linear) is Linear and _is_plain(linear) for linear in linears
    ):
        return [linear(x) for linear in linears]
    schemes = {(linear.per_token, linear.symmetric, linear.activation_bits) for linear in linears}
    wants_gradient = x.requires_grad and torch.is_grad_enabled()
    autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    if len(schemes) > 1 or wants_gradient or autocast or remembered(x) is not None:
        return [linear(x) for linear in linears]
    form = torch.ops.dynquant.quantize_activation(x, *schemes.pop())
    return [
        _scaled_mm(*form, linear.packed, linear.weight_scale, linear.bias, x.dtype)
        for linear in linears
    ]


def _is_plain(module):
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class LinearModule(QuantizedModule):
    """What the quantized forms of nn.Linear share, whatever their format."""

    FLOAT = "nn.Linear"

    def __init__(self, mod: nn.Module, qconfig: QConfig, tied_to: nn.Module | None = None) -> None:
        super().__init__(mod, qconfig, tied_to)
        self.out_features, self.in_features = self._rows(mod.weight).shape

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None, qconfig: QConfig) -> Self:
        """The layer of a float weight [N, K] and bias [N] or None, neither of which it keeps.

        Args:
            weight, bias: what check_float accepts of a module.
            qconfig: a QConfig.
        """
        return cls(SimpleNamespace(weight=weight, bias=bias), qconfig)

    def _float_module(self):
        return nn.Linear(self.in_features, self.out_features, self.bias is not None)

    def _translated(self, state_dict, prefix):
        return with_plain_linear(state_dict, prefix)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self._formats['weight']}"
        )


class Linear(LinearModule):
    """y = x @ weight.T + bias with an int8 weight and x quantized at each call, to 8 or 16 bits.

    Made by from_float, which quantize_dynamic calls. x is fp32, bf16 or fp16 [..., in_features],
    y has x's dtype and shape [..., out_features]; a float64 x is an error. An x from
    dynquant.nn.Quantize is not quantized again. The parts of a nested x are separate inputs.

    The weight is held once, packed for the machine. The state dict has weight_int8 (int8 [N, K]),
    weight_scale (fp32 [N] or [1]), bias where there is one, and version (int64). load_state_dict
    also takes what the float module has (its weight is then quantized as this one was), what
    torch.ao's dynamic quantization saves, and version 1, in which weight was int8.

    Attributes:
        in_features, out_features: K and N.
        weight: a QuantizedWeight, of the float module's shape and dtype. Assigning a float weight
            quantizes it.
        weight_scale: fp32 [N] (per_channel) or [1] (per_tensor); fp32 in a model of any dtype.
        bias: a parameter [N] without gradient, or None.
        per_token, symmetric, activation_bits: how x is quantized.
    """

    FORMAT = Int8
    DTYPES = Int8.DTYPES

    @classmethod
    def from_integers(
        cls,
        integers: torch.Tensor,
        weight_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
        qconfig: QConfig | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The layer of a weight that is quantized already, whose integers stay as they are.

        Args:
            integers: int8 [N, K], -128 among its values or not.
            weight_scale: fp32, bf16 or fp16, one value for each output, or one for all.
            bias: float [N] or None.
            qconfig: a QConfig, which says how x is quantized; None means QConfig().
            dtype: of the float weight that it stands for.

        Raises:
            RuntimeError: for another dtype or shape, or a scale that is not positive and finite.
        """
        like = torch.empty(integers.shape, dtype=dtype, device="meta")
        bias = None if bias is None else bias.detach()
        layer = cls.from_weight(like, bias, QConfig() if qconfig is None else qconfig)
        state = {
            "weight_int8": integers,
            "weight_scale": weight_scale.flatten().to(torch.float32),
            "version": torch.tensor(cls.VERSION),
        }
        if bias is not None:
            state["bias"] = bias.clone()
        layer.load_state_dict(state, assign=True)
        return layer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return torch.ops.dynquant.linear_dynamic(
                input,
                self.packed,
                self.weight_scale,
                self.bias,
                self.per_token,
                self.symmetric,
                self.activation_bits,
            )
        if not isinstance(input, torch.Tensor):
            return as_one_call(self, input)
        # nn.Module.__getattr__ would cost 0.4 microseconds for each of these.
        packed = self._buffers["packed"]
        weight_scale = self._buffers["weight_scale"]
        bias = self._parameters["bias"]
        form = remembered(input)
        if form is None:
            if input.is_nested:  # nn.TransformerEncoder makes such where its first layer is float
                rows = [self(part) for part in input.unbind()]
                return torch.nested.as_nested_tensor(rows, layout=input.layout)
            if input.requires_grad and torch.is_grad_enabled():
                linear = _linear_dynamic
            elif torch.compiler.is_compiling() or torch.jit.is_tracing():
                linear = _linear_without_gradient
            else:
                linear = _linear_without_frame
            bits = self.activation_bits
            # Each argument costs 0.2 microseconds.
            if self.per_token and not self.symmetric and bits == 8:
                return linear(input, packed, weight_scale, bias)
            return linear(input, packed, weight_scale, bias, self.per_token, self.symmetric, bits)
        dtype = input.dtype
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
        arguments = (form.q, form.scale, form.zero_point, packed, weight_scale, bias, dtype)
        if torch.is_grad_enabled() and input.requires_grad:
            return _ScaledMM.apply(input, self, arguments)
        return _scaled_mm(*arguments)

    @property
    def weight(self) -> torch.Tensor:
        if torch.jit.is_scripting():
            integers = torch.ops.dynquant.unpack_weight(
                self.packed, self.out_features, self.in_features
            )
            return integers.to(torch.float32) * self.weight_scale.unsqueeze(1)
        return self._weight("weight")
