"""nn.Linear with an int8 weight, whose input is quantized at each call."""

import copy
import warnings

import torch
from torch import nn

import dynquant.ops  # noqa: F401 (registers torch.ops.dynquant)
from dynquant.nn._checks import FLOAT_DTYPES, check_finite, check_float_parameters, titled
from dynquant.nn._move import moved
from dynquant.nn._state import INTEGERS, Entry, read_entries
from dynquant.nn.quantize import remembered
from dynquant.nn.weight import int8_weight
from dynquant.qconfig import QConfig, one_of, parse_qconfig, per_channel, per_tensor, per_token

MAX_IN_FEATURES = 65536  # beyond it a sum could leave int32

_linear_dynamic = torch.ops.dynquant.linear_dynamic.default
_linear_without_gradient = torch.ops.dynquant.linear_dynamic.inference
# The same without the overload's own Python frame, which costs 0.4 microseconds a call; a compiler
# knows the overload alone.
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


class Linear(nn.Module):
    """y = x @ weight.T + bias with an int8 weight and x quantized to 8 bits at each call.

    Made by from_float, which quantize_dynamic calls. x is fp32, bf16 or fp16 [..., in_features],
    y has x's dtype and shape [..., out_features]; a float64 x is an error. An x from
    dynquant.nn.Quantize is not quantized again. The parts of a nested x are separate inputs.

    The weight is held once, packed for the machine; `weight` and the state dict unpack it. The
    state dict has weight (int8 [N, K]), weight_scale (fp32 [N] or [1]), bias where there is one,
    and version (int64).

    Attributes:
        in_features, out_features: K and N.
        weight: int8 [N, K], read-only.
        weight_scale: fp32 [N] (per_channel) or [1] (per_tensor); fp32 in a model of any dtype.
        bias: a parameter [N] without gradient, or None.
        per_token, symmetric: how x is quantized.
    """

    VERSION = 1
    DTYPES = (torch.qint8,)

    def __init__(self, in_features, out_features, packed, weight_scale, bias, dtype, qconfig):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.per_token = qconfig.activation == per_token
        self.symmetric = qconfig.symmetric
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("weight_scale", weight_scale)
        if bias is None:
            self.register_parameter("bias", None)
            # A model without any parameter could not answer next(model.parameters()).dtype.
            bias = packed.new_empty(0, dtype=dtype)
            self.placeholder = nn.Parameter(bias, requires_grad=False)
        else:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.eval()

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
        if tied_to is None:
            weight, weight_scale = torch.ops.dynquant.quantize_weight(
                mod.weight.detach(), qconfig.weight == per_channel
            )
            packed = torch.ops.dynquant.pack_weight(weight)
        else:
            packed, weight_scale = tied_to.packed, tied_to.weight_scale
        bias = None if mod.bias is None else mod.bias.detach().clone()
        n, k = mod.weight.shape
        return cls(k, n, packed, weight_scale, bias, mod.weight.dtype, qconfig)

    @staticmethod
    def check_float(mod, qconfig, name=""):
        """Raises what stands against quantizing `mod`, naming its parameters after `name`.

        Raises:
            ValueError: for a weight that is uninitialized, holds NaN or Inf, has another dtype
                than fp32, bf16 and fp16, or has more than 65,536 columns; for a bias of another
                dtype; for a dtype of the config other than torch.qint8; for dynamic=False.
        """
        module, prefix = titled("nn.Linear", name)
        one_of(f"{module}: dtype", qconfig.dtype, Linear.DTYPES)
        if qconfig.dynamic is False:
            raise ValueError(f"{module}: 'dynamic' is False, but it is quantized at run time only")
        check_float_parameters(prefix, weight=mod.weight, bias=mod.bias)
        columns = mod.weight.shape[1]
        if columns > MAX_IN_FEATURES:
            raise ValueError(
                f"{prefix}weight has {columns} columns; at most {MAX_IN_FEATURES} can be "
                "quantized exactly"
            )
        check_finite(prefix, mod.weight)

    def forward(self, x):
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
            elif torch.compiler.is_compiling():
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
    def weight(self):
        return int8_weight(self.packed, self.out_features, self.in_features)

    def _plain_weight(self):
        return torch.ops.dynquant.unpack_weight(self.packed, self.out_features, self.in_features)

    def _apply(self, fn, recurse=True):
        packed, weight_scale = self.packed, self.weight_scale

        def moved_or_repacked(tensor):
            if tensor is packed:
                return self._repacked(fn, packed, moved(fn, weight_scale).device)
            return moved(fn, tensor) if tensor is weight_scale else fn(tensor)

        return super()._apply(moved_or_repacked, recurse)

    def _repacked(self, fn, packed, device):
        if device.type == packed.device.type:
            return moved(fn, packed)
        weight = moved(fn, self._plain_weight())
        if packed.is_meta:  # to_empty() leaves bytes that may be no weight
            weight.zero_()
        return torch.ops.dynquant.pack_weight(weight)

    def __deepcopy__(self, memo):
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def __getstate__(self):
        buffers = self._buffers.copy()
        del buffers["packed"]
        return {**self.__dict__, "_buffers": buffers, "_weight": self._plain_weight()}

    def __setstate__(self, state):
        state = state.copy()
        packed = torch.ops.dynquant.pack_weight(state.pop("_weight"))
        super().__setstate__(state)
        self._buffers = {"packed": packed, **self._buffers}

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for key, value in self._state().items():
            destination[prefix + key] = value if keep_vars else value.detach()

    def _state(self):
        state = {"weight": self._plain_weight(), "weight_scale": self.weight_scale}
        if self.bias is not None:
            state["bias"] = self.bias
        return {**state, "version": torch.tensor(self.VERSION)}

    def _load_from_state_dict(
        self,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    ):
        lists = (strict, missing_keys, unexpected_keys)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, *lists, error_msgs)
        found, errors = read_entries(self, self._entries(), state_dict, prefix, *lists)
        version = found.pop("version", None)
        if not (errors or version is None or version.is_meta or 1 <= version <= self.VERSION):
            errors.append(
                f"{prefix}version is {int(version)}; this dynquant reads 1 to {self.VERSION}"
            )
        if errors:
            error_msgs.extend(errors)
        elif found:
            self._load(found, local_metadata.get("assign_to_params_buffers", False), prefix)

    def _entries(self):
        n, k = self.out_features, self.in_features
        entries = {
            "weight": Entry((torch.int8,), ((n, k),)),
            "weight_scale": Entry((torch.float32,), ((n,), (1,))),
            "bias": Entry(FLOAT_DTYPES, ((n,),)),
            "version": Entry(INTEGERS, ((),)),
        }
        if self.bias is None:
            del entries["bias"]
        return entries

    @torch.no_grad()
    def _load(self, found, assign, prefix):
        if self.packed.is_meta and not assign:
            warnings.warn(
                f"{prefix}weight is on the meta device, which loading does not change; "
                "pass assign=True to load_state_dict",
                stacklevel=2,
            )
            return
        weight = found.pop("weight", None)
        if weight is not None:
            weight = weight if assign else weight.to(self.packed.device)
            scale = found.get("weight_scale", self.weight_scale).to(weight.device)
            if not weight.is_meta and (weight == -128).any():
                values = weight.to(torch.float32) * scale[:, None]
                weight, found["weight_scale"] = torch.ops.dynquant.quantize_weight(
                    values, scale.numel() == self.out_features
                )
            found["packed"] = torch.ops.dynquant.pack_weight(weight)
        for key, value in found.items():
            held = getattr(self, key)
            if not assign and held.shape == value.shape:
                held.copy_(value)
            elif key == "bias":
                self.bias = nn.Parameter(value, requires_grad=False)
            else:
                self._buffers[key] = value if assign else value.to(held.device)
        if self.bias is None:
            placeholder = torch.empty_like(self.placeholder, device=self.packed.device)
            self.placeholder = nn.Parameter(placeholder, requires_grad=False)

    def extra_repr(self):
        weight = per_channel if self.weight_scale.numel() == self.out_features else per_tensor
        activation = per_token if self.per_token else per_tensor
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weight={weight}, activation={activation}, "
            f"symmetric={self.symmetric}"
        )
