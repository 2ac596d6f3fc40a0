"""torch.ao.quantization.quantize_dynamic with each of torch's engines."""

import copy
import warnings

import torch
from torch import nn
from torch.ao.quantization import quantization_mappings

from benchmarks.peers.base import Peer


class TorchEngine(Peer):
    engine = None
    dtype = torch.qint8

    def __init__(self, threads, spin=False):
        super().__init__(threads, spin)
        supported = torch.backends.quantized.supported_engines
        if self.engine not in supported:
            raise RuntimeError(f"this torch has no engine {self.engine}, only {supported}")
        torch.backends.quantized.engine = self.engine

    def convert(self, module, inputs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao announces its own removal
            parent = nn.ModuleList([copy.deepcopy(module)])  # it swaps children, not the root
            layers = {nn.Linear, nn.LSTM, nn.GRU, *getattr(module, "asked", ())}
            forms = quantization_mappings.get_default_dynamic_quant_module_mappings()
            forms[nn.Conv1d] = torch.ao.nn.quantized.dynamic.Conv1d
            return torch.ao.quantization.quantize_dynamic(parent, layers, self.dtype, forms)[0]


class Fbgemm(TorchEngine):
    engine = "fbgemm"


class FbgemmFloat16(Fbgemm):
    dtype = torch.float16


class X86(TorchEngine):
    engine = "x86"


class OneDnn(TorchEngine):
    engine = "onednn"
