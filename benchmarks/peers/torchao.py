"""torchao's dynamic int8 quantization, compiled."""

import copy

import torch
from torch import nn

from benchmarks.peers.base import Peer, Unsupported
from benchmarks.peers.eager import BFloat16


class TorchAo(Peer):
    packages = ("torch", "torchao")
    modules = ("torchao",)

    def __init__(self, threads, spin=False):
        super().__init__(threads, spin)
        import torch._inductor.config
        from torchao import quantization

        # Weights are packed when it compiles: several times as fast at M = 1.
        torch._inductor.config.freezing = True

        self.quantization = quantization

    def convert(self, module, inputs):
        if not any(isinstance(part, nn.Linear) for part in module.modules()):
            raise Unsupported("torchao quantizes nn.Linear only, and this model has none")
        torch._dynamo.reset()
        parent = nn.ModuleList([copy.deepcopy(module)])
        self.quantization.quantize_(
            parent, self.quantization.Int8DynamicActivationInt8WeightConfig()
        )
        return torch.compile(parent[0], dynamic=False)


class TorchAoBFloat16(TorchAo):
    """On a model in bfloat16: inputs and outputs too."""

    def convert(self, module, inputs):
        return super().convert(copy.deepcopy(module).bfloat16(), inputs)

    prepare = BFloat16.prepare
