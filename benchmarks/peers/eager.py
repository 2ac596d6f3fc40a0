"""torch without and with dynquant."""

import copy
import warnings

import torch

from benchmarks.peers.base import Peer, Unsupported


class Float32(Peer):
    def convert(self, module, inputs):
        return module


class Float64(Peer):
    """The reference that all are compared with."""

    def convert(self, module, inputs):
        return copy.deepcopy(module).double()

    def prepare(self, inputs):
        return tuple(x.double() if x.is_floating_point() else x for x in inputs)

    def array(self, output):
        return output.numpy()


class BFloat16(Peer):
    """The whole model in bfloat16: inputs and outputs too."""

    def convert(self, module, inputs):
        return copy.deepcopy(module).bfloat16()

    def prepare(self, inputs):
        return tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)


class BFloat16Compiled(BFloat16):
    def convert(self, module, inputs):
        torch._dynamo.reset()
        return torch.compile(super().convert(module, inputs), dynamic=False)


class Dynquant(Peer):
    packages = ("torch", "dynquant")
    modules = ("dynquant",)

    def __init__(self, threads, spin=False):
        super().__init__(threads, spin)
        import dynquant

        self.dynquant = dynquant

    def convert(self, module, inputs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it names what it leaves in float
            model = self.quantized(module)
        if not any(type(part).__module__.startswith("dynquant.") for part in model.modules()):
            raise Unsupported("dynquant quantizes nothing of this model")
        return model

    def quantized(self, module):
        return self.dynquant.quantize_dynamic(module, getattr(module, "asked", None))

    def facts(self):
        return {**super().facts(), "isa": self.dynquant.info()["isa"]}


class Dynquant16Bit(Dynquant):
    """With activations in 16 bits."""

    def quantized(self, module):
        config = {"activation": {"bits": 16}}
        return self.dynquant.quantize_dynamic(module, {"": config})


class DynquantFloat16(Dynquant):
    """With weights in 16 bits, and activations in fp32."""

    dtype = torch.float16

    def quantized(self, module):
        return self.dynquant.quantize_dynamic(module, dtype=self.dtype)


class DynquantBFloat16Weights(DynquantFloat16):
    dtype = torch.bfloat16


class DynquantCompiled(Dynquant):
    """What torch.compile makes of it: the ops stay, and what is between them is fused."""

    def convert(self, module, inputs):
        torch._dynamo.reset()
        return torch.compile(super().convert(module, inputs), dynamic=False)


class DynquantFused(Dynquant):
    """With the blocks of the model run as single ops."""

    def quantized(self, module):
        model = self.dynquant.fuse(super().quantized(module))
        blocks = self.dynquant.fused_blocks(model)
        if not blocks or any(blocks.values()):
            raise Unsupported("dynquant.fuse does not fuse the blocks of this model")
        return model


class DynquantBFloat16(Dynquant):
    """On a model in bfloat16: inputs and outputs too."""

    def convert(self, module, inputs):
        return super().convert(copy.deepcopy(module).bfloat16(), inputs)

    prepare = BFloat16.prepare


class DynquantFusedBFloat16(DynquantBFloat16, DynquantFused):
    pass
