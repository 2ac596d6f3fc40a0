"""What dynquant is measured against: each peer turns an nn.Linear into a callable of one x.

A peer's function imports what it needs, so that one that is not installed is named as missing.
"""

import copy
import warnings

import torch
from torch import nn

SPEC = {nn.Linear}


def fp32(linear):
    return linear


def bf16(linear):
    half = copy.deepcopy(linear).bfloat16()
    return lambda x: half(x.bfloat16())


def dynquant(linear):
    import dynquant as package

    return package.quantize_dynamic(linear)


def _torch_engine(engine):
    def build(linear):
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao announces its own removal
            return torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), SPEC)[0]

    return build


def torchao(linear):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(copy.deepcopy(linear))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model)


PEERS = {
    "fp32": fp32,
    "bf16": bf16,
    "dynquant": dynquant,
    "fbgemm": _torch_engine("fbgemm"),
    "x86": _torch_engine("x86"),
    "onednn": _torch_engine("onednn"),
    "torchao": torchao,
}
