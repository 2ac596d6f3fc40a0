"""ExecuTorch with XNNPACK: exported, quantized by its XNNPACKQuantizer, lowered, run in Python."""

import torch
from torch import nn

from benchmarks.peers.base import Peer, Unsupported


class ExecuTorch(Peer):
    packages = ("torch", "executorch", "torchao")
    modules = ("executorch", "torchao")

    def __init__(self, threads, spin=False):
        super().__init__(threads, spin)
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime

        portable_lib._unsafe_reset_threadpool(threads)
        self.runtime = Runtime.get()

    def convert(self, module, inputs):
        if not isinstance(module, nn.Linear):
            raise Unsupported("only single linear layers are lowered to ExecuTorch here")
        self.data = self._lower(
            module, inputs
        ).buffer  # the program reads from it, and owns nothing
        self.program = self.runtime.load_program(self.data)
        method = self.program.load_method("forward")
        return lambda *x: method.execute(x)[0]

    def _lower(self, module, inputs):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
            XNNPACKQuantizer,
            get_symmetric_quantization_config,
        )
        from executorch.exir import to_edge_transform_and_lower
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

        config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
        exported = torch.export.export(module, inputs, strict=True).module()
        observed = prepare_pt2e(exported, XNNPACKQuantizer().set_global(config))
        observed(*inputs)
        quantized = torch.export.export(convert_pt2e(observed), inputs, strict=True)
        edge = to_edge_transform_and_lower(quantized, partitioner=[XnnpackPartitioner()])
        return edge.to_executorch()
