"""nn.Linear with a weight in 16 bits, computed in fp32."""

import torch

import dynquant.ops  # noqa: F401 (registers torch.ops.dynquant)
from dynquant.nn._formats import Bits16
from dynquant.nn._fx import as_one_call
from dynquant.nn.linear import LinearModule

_linear_half = torch.ops.dynquant.linear_half.default
_linear_without_gradient = torch.ops.dynquant.linear_half.inference


class Linear16bit(LinearModule):
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
        weight: a QuantizedWeight, of the float module's shape and dtype. Assigning a float weight
            rounds it.
        weight_16bit: [N, K], which stays in 16 bits in a model that is cast to another dtype.
        bias: a parameter [N] without gradient, or None.
    """

    FORMAT = Bits16
    DTYPES = Bits16.DTYPES

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return torch.ops.dynquant.linear_half(input, self.weight_16bit, self.bias)
        if not isinstance(input, torch.Tensor):
            return as_one_call(self, input)
        # nn.Module.__getattr__ would cost 0.4 microseconds for each of these.
        weight, bias = self._buffers["weight_16bit"], self._parameters["bias"]
        if input.is_nested:
            rows = [self(part) for part in input.unbind()]
            return torch.nested.as_nested_tensor(rows, layout=input.layout)
        wants_gradient = input.requires_grad and torch.is_grad_enabled()
        return (_linear_half if wants_gradient else _linear_without_gradient)(input, weight, bias)

    @property
    def weight(self) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.weight_16bit.to(torch.float32)
        return self._weight("weight")
