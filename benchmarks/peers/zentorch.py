"""AMD's zentorch: its op for dynamically quantized linears, in place of each nn.Linear."""

import copy

import torch
from torch import nn

from benchmarks.peers.base import Peer, Unsupported

WRONG = 0.01  # 20 dB


class ZenLinear(nn.Module):
    """zentorch_dynamic_qlinear: int8 weights per channel, activations per row.

    The prepacked weight gives wrong results at some sizes (in zentorch 2.13.0.2: K above 2048, N of
    256 and more); there the weight is passed as it is, which the op packs and keeps by itself.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
        quantized = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.scale = scale
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.op = torch.ops.zentorch.zentorch_dynamic_qlinear.default
        self.weight = torch.ops.zentorch.zentorch_weight_prepack_for_dynamic_qlinear(quantized)
        self.prepacked = True
        x = torch.linspace(-1, 1, 2 * weight.shape[1]).reshape(2, -1)
        exact = nn.functional.linear(x, quantized * scale[:, None], self.bias)
        if (self(x) - exact).square().mean() > WRONG * exact.square().mean():
            self.weight, self.prepacked = quantized, False

    def forward(self, x):
        return self.op(x, self.weight, self.scale, self.bias, is_weight_prepacked=self.prepacked)


def _swap(module):
    if type(module) is nn.Linear:
        return ZenLinear(module)
    for name, child in list(module.named_children()):
        setattr(module, name, _swap(child))
    return module


class ZenTorch(Peer):
    packages = ("torch", "zentorch")
    modules = ("zentorch",)

    def __init__(self, threads, spin=False):
        super().__init__(threads, spin)
        import zentorch  # noqa: F401 - registers its ops

    def convert(self, module, inputs):
        if not any(type(part) is nn.Linear for part in module.modules()):
            raise Unsupported("zentorch has no dynamically quantized form of this model's layers")
        model = _swap(copy.deepcopy(module))
        if not all(part.prepacked for part in model.modules() if isinstance(part, ZenLinear)):
            self.note = "weights not prepacked: those are wrong here"
        return model
