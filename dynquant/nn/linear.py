"""nn.Linear with an int8 weight, whose input is quantized at each call."""

import torch
from torch.nn.modules.module import _has_any_global_hook

from dynquant.nn._checks import check_config, check_parameters
from dynquant.nn._packed import PackedModule, check_weight, packed_from_float
from dynquant.nn._torch_ao import with_plain_linear
from dynquant.nn.quantize import remembered
from dynquant.nn.weight import int8_weight
from dynquant.qconfig import QConfig, parse_qconfig, per_channel, per_tensor, per_token

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
        weight = ctx.linear._plain_weight() * ctx.linear.weight_scale[:, None]
        return (gradient.to(torch.float32) @ weight).to(ctx.dtype), None, None


def outputs_of(linears, x):
    """The outputs of several modules for one x, which is quantized once where all are Linear.

    The bits are those of calling each.
    """
    if _has_any_global_hook() or not all(
        type(linear) is Linear and _is_plain(linear) for linear in linears
    ):
        return [linear(x) for linear in linears]
    schemes = {(linear.per_token, linear.symmetric) for linear in linears}
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


class Linear(PackedModule):
    """y = x @ weight.T + bias with an int8 weight and x quantized to 8 bits at each call.

    Made by from_float, which quantize_dynamic calls. x is fp32, bf16 or fp16 [..., in_features],
    y has x's dtype and shape [..., out_features]; a float64 x is an error. An x from
    dynquant.nn.Quantize is not quantized again. The parts of a nested x are separate inputs.

    The weight is held once, packed for the machine; `weight` and the state dict unpack it. The
    state dict has weight (int8 [N, K]), weight_scale (fp32 [N] or [1]), bias where there is one,
    and version (int64). load_state_dict also takes what the float module has (its weight is then
    quantized as this one was) and what torch.ao's dynamic quantization saves.

    Attributes:
        in_features, out_features: K and N.
        weight: int8 [N, K], read-only. Assigning a float weight quantizes it.
        weight_scale: fp32 [N] (per_channel) or [1] (per_tensor); fp32 in a model of any dtype.
        bias: a parameter [N] without gradient, or None.
        per_token, symmetric: how x is quantized.
    """

    FLOAT = "nn.Linear"

    check_weight = staticmethod(check_weight)

    def __init__(self, in_features, out_features, packed, weight_scale, bias, dtype, qconfig):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.per_token = qconfig.activation == per_token
        self.symmetric = qconfig.symmetric
        weight = (packed, weight_scale, out_features, in_features)
        self._hold({"weight": weight}, {"bias": bias}, dtype)

    @classmethod
    def from_float(cls, mod, qconfig=None, tied_to=None):
        """The quantized form of `mod`, which is not changed and shares no memory with it.

        Args:
            mod: an nn.Linear with a weight in fp32, bf16 or fp16.
            qconfig: any form of a config; None means QConfig().
            tied_to: what from_float gave for a module with the same weight and weight scheme,
                to share its packed weight.

        Raises:
            ValueError: as check_float.
        """
        qconfig = QConfig() if qconfig is None else parse_qconfig(qconfig)
        cls.check_float(mod, qconfig)
        return cls.from_weight(cls._rows(mod.weight), mod.bias, qconfig, tied_to)

    @classmethod
    def from_weight(cls, weight, bias, qconfig, tied_to=None):
        """The layer of a float weight [N, K] and bias [N] or None, neither of which it keeps.

        Args:
            weight, bias: what check_parameters accepts.
            qconfig: a QConfig.
            tied_to: as for from_float.
        """
        weight = weight.detach()
        if tied_to is None:
            packed, weight_scale = packed_from_float(weight, qconfig.weight)
        else:
            packed, weight_scale = tied_to.packed, tied_to.weight_scale
        bias = None if bias is None else bias.detach().clone()
        n, k = weight.shape
        return cls(k, n, packed, weight_scale, bias, weight.dtype, qconfig)

    @classmethod
    def check_float(cls, mod, qconfig, name=""):
        """Raises what stands against quantizing `mod`, naming its parameters after `name`.

        Raises:
            ValueError: for a weight that is uninitialized, holds NaN or Inf, has another dtype
                than fp32, bf16 and fp16, or has more than 65,536 columns; for a bias of another
                dtype; for a dtype of the config other than torch.qint8; for dynamic=False.
        """
        check_config(name, cls.FLOAT, qconfig, cls.DTYPES)
        prefix = f"{name}." if name else ""
        check_parameters({f"{prefix}weight": mod.weight, f"{prefix}bias": mod.bias})
        cls.check_weight(f"{prefix}weight", cls._rows(mod.weight))

    def forward(self, x):
        if torch.jit.is_scripting():
            return torch.ops.dynquant.linear_dynamic(
                x, self.packed, self.weight_scale, self.bias, self.per_token, self.symmetric
            )
        # nn.Module.__getattr__ would cost 0.4 microseconds for each of these.
        packed = self._buffers["packed"]
        weight_scale = self._buffers["weight_scale"]
        bias = self._parameters["bias"]
        form = remembered(x)
        if form is None:
            if x.is_nested:  # nn.TransformerEncoder makes such where its first layer is float
                rows = [self(part) for part in x.unbind()]
                return torch.nested.as_nested_tensor(rows, layout=x.layout)
            if x.requires_grad and torch.is_grad_enabled():
                linear = _linear_dynamic
            elif torch.compiler.is_compiling() or torch.jit.is_tracing():
                linear = _linear_without_gradient
            else:
                linear = _linear_without_frame
            if self.per_token and not self.symmetric:  # each argument costs 0.2 microseconds
                return linear(x, packed, weight_scale, bias)
            return linear(x, packed, weight_scale, bias, self.per_token, self.symmetric)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        arguments = (form.q, form.scale, form.zero_point, packed, weight_scale, bias, dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            return _ScaledMM.apply(x, self, arguments)
        return _scaled_mm(*arguments)

    @property
    def weight(self) -> torch.Tensor:
        if torch.jit.is_scripting():
            return torch.ops.dynquant.unpack_weight(
                self.packed, self.out_features, self.in_features
            )
        return int8_weight([(self.packed, self.out_features)], self.in_features)

    def _translated(self, state_dict, prefix):
        return with_plain_linear(state_dict, prefix)

    def extra_repr(self):
        weight = per_channel if self._is_per_channel("weight") else per_tensor
        activation = per_token if self.per_token else per_tensor
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight={weight}, activation={activation}, "
            f"symmetric={self.symmetric}"
        )
