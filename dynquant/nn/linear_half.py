"""nn.Linear with a weight in 16 bits, computed in fp32."""

import torch
from torch import nn

import dynquant.ops  # noqa: F401 (registers torch.ops.dynquant)
from dynquant.nn._checks import check_config, check_parameters
from dynquant.nn._half import HalfState, HalfWeight, in_16_bits
from dynquant.nn._torch_ao import with_plain_linear
from dynquant.qconfig import QConfig, parse_qconfig

_linear_half = torch.ops.dynquant.linear_half.default
_linear_without_gradient = torch.ops.dynquant.linear_half.inference


class HalfLinear(HalfState):
    """y = x @ weight.T + bias with a weight in 16 bits and arithmetic in fp32.

    Made by from_float, which quantize_dynamic calls for dtype torch.float16 or torch.bfloat16. x
    is fp32, bf16 or fp16 [..., in_features], y has x's dtype and shape [..., out_features]; a
    float64 x is an error. The sums have a fixed order (torch.ops.dynquant.linear_half), so y has
    the same bits on every machine and in every batch.

    The state dict has weight (16 bits [N, K]), bias where there is one, and version (int64). A
    weight in the other 16-bit dtype is loaded as it is. load_state_dict also takes what the float
    module has (its weight is then rounded to the dtype of this one) and what torch.ao's dynamic
    quantization saves in float16.

    Attributes:
        in_features, out_features: K and N.
        weight: [N, K] in 16 bits, which stay in a model that is cast to another dtype.
        bias: a parameter [N] without gradient, or None.
    """

    FLOAT = "nn.Linear"
    __jit_unused_properties__ = ("weight",)  # TorchScript reads the buffer of that name

    def __init__(self, weight, bias, dtype):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._buffers["weight"] = weight  # the property of that name reads it
        self._set_placeholder(weight, dtype)
        bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", bias)
        self.eval()

    @classmethod
    def from_float(cls, mod, qconfig=None, tied_to=None):
        """The 16-bit form of `mod`, which is not changed and shares no memory with it.

        Args:
            mod: an nn.Linear with a weight in fp32, bf16 or fp16.
            qconfig: any form of a config of dtype torch.float16 (also where it is None) or
                torch.bfloat16.
            tied_to: what from_float gave for a module with the same weight and dtype, to share
                its weight.

        Raises:
            ValueError: as check_float.

        Warns:
            UserWarning: where finite weights are beyond what the dtype holds, which then become
                the nearest finite value.
        """
        qconfig = parse_qconfig(qconfig or QConfig(dtype=torch.float16))
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
        half = in_16_bits(weight, qconfig.dtype) if tied_to is None else tied_to._buffers["weight"]
        bias = None if bias is None else bias.detach().clone()
        return cls(half, bias, weight.dtype)

    @classmethod
    def check_float(cls, mod, qconfig, name=""):
        """Raises what stands against a 16-bit form of `mod`, naming its parameters after `name`.

        Raises:
            ValueError: for a weight that is uninitialized, holds NaN or Inf, or has another dtype
                than fp32, bf16 and fp16; for a bias of another dtype; for dynamic=False.
        """
        check_config(name, cls.FLOAT, qconfig, cls.DTYPES)
        prefix = f"{name}." if name else ""
        check_parameters({f"{prefix}weight": mod.weight, f"{prefix}bias": mod.bias})
        cls.check_weight(f"{prefix}weight", mod.weight)

    def forward(self, x):
        if torch.jit.is_scripting():
            return torch.ops.dynquant.linear_half(x, self.weight, self.bias)
        # nn.Module.__getattr__ would cost 0.4 microseconds for each of these.
        weight, bias = self._buffers["weight"], self._parameters["bias"]
        if x.is_nested:
            rows = [self(part) for part in x.unbind()]
            return torch.nested.as_nested_tensor(rows, layout=x.layout)
        wants_gradient = x.requires_grad and torch.is_grad_enabled()
        return (_linear_half if wants_gradient else _linear_without_gradient)(x, weight, bias)

    @property
    def weight(self):
        return self._buffers["weight"].as_subclass(HalfWeight)

    def _translated(self, state_dict, prefix):
        return with_plain_linear(state_dict, prefix)

    def extra_repr(self):
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, dtype={self._buffers['weight'].dtype}"
        )
