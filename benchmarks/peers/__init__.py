"""What dynquant is measured against, by name: "module:class" of a `Peer`.

A module imports its library only when the peer is made, so that one that is not installed can be
named as missing. Any other "module:class" works as a name too: a user's own kernels can join.
"""

import importlib

OF_LAYERS = {
    "fp32": "benchmarks.peers.eager:Float32",
    "bf16": "benchmarks.peers.eager:BFloat16",
    "dynquant": "benchmarks.peers.eager:Dynquant",
    "dynquant_16bit": "benchmarks.peers.eager:Dynquant16Bit",
    "dynquant_compiled": "benchmarks.peers.eager:DynquantCompiled",
    "fbgemm": "benchmarks.peers.torch_ao:Fbgemm",
    "x86": "benchmarks.peers.torch_ao:X86",
    "onednn": "benchmarks.peers.torch_ao:OneDnn",
    "torchao": "benchmarks.peers.torchao:TorchAo",
    "onnxruntime": "benchmarks.peers.onnxruntime:OnnxRuntime",
    "executorch": "benchmarks.peers.executorch:ExecuTorch",
    "zentorch": "benchmarks.peers.zentorch:ZenTorch",
    "openvino": "benchmarks.peers.openvino:OpenVino",
}
# With weights in 16 bits, which are raced where they are asked for.
OF_HALVES = {
    "dynquant_float16": "benchmarks.peers.eager:DynquantFloat16",
    "dynquant_bfloat16": "benchmarks.peers.eager:DynquantBFloat16Weights",
    "fbgemm_float16": "benchmarks.peers.torch_ao:FbgemmFloat16",
}
# Of whole models alone.
OF_MODELS = {
    "dynquant_fused": "benchmarks.peers.eager:DynquantFused",
    "dynquant_bf16": "benchmarks.peers.eager:DynquantBFloat16",
    "dynquant_fused_bf16": "benchmarks.peers.eager:DynquantFusedBFloat16",
    "bf16_compiled": "benchmarks.peers.eager:BFloat16Compiled",
    "torchao_bf16": "benchmarks.peers.torchao:TorchAoBFloat16",
    "onnxruntime_optimized": "benchmarks.peers.onnxruntime:OnnxRuntimeOptimized",
    "ctranslate2": "benchmarks.peers.ctranslate2:CTranslate2",
    "openvino_static": "benchmarks.peers.openvino:OpenVinoStatic",
}
# Of the case encode-500 alone; they need an environment of their own, see --python.
OF_TEXTS = {
    "sentence_onnx": "benchmarks.peers.sentences:Onnx",
    "sentence_openvino": "benchmarks.peers.sentences:OpenVino",
}
PEERS = {**OF_LAYERS, **OF_HALVES, **OF_MODELS, **OF_TEXTS}
# These were given data to find the ranges of activations; all others need none.
CALIBRATED = ("openvino_static",)
REFERENCE = "benchmarks.peers.eager:Float64"


class PeerError(ValueError):
    """A peer's name that stands for nothing."""


def check_name(name):
    if name not in PEERS and name.count(":") != 1:
        raise PeerError(f"peer {name!r}: expected one of {', '.join(PEERS)}, or module:class")
    return name


def load(name):
    """The class of a peer. Its own library is not imported yet."""
    module, _, attribute = PEERS.get(check_name(name), name).partition(":")
    return getattr(importlib.import_module(module), attribute)
