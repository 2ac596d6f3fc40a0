"""Exact, accurate and fast int8 dynamic quantization for PyTorch.

model = dynquant.quantize_dynamic(model)
"""

import importlib
from importlib.metadata import version

from dynquant import (
    nn,
    ops,  # first: loads the compiled library
)
from dynquant.comparison import Comparison, compare
from dynquant.dequantize import dequantize
from dynquant.fused import fuse, fused_blocks
from dynquant.isa import info, set_isa
from dynquant.observer import Observer
from dynquant.qconfig import QConfig, per_channel, per_tensor, per_token
from dynquant.quantize import convert, prepare, quantize_dynamic
from dynquant.stubs import DeQuantStub, QuantStub

__all__ = [
    "Comparison",
    "DeQuantStub",
    "Observer",
    "QConfig",
    "QuantStub",
    "compare",
    "convert",
    "dequantize",
    "fuse",
    "fused_blocks",
    "info",
    "nn",
    "ops",
    "per_channel",
    "per_tensor",
    "per_token",
    "prepare",
    "quantize_dynamic",
    "set_isa",
]

__version__ = version("dynquant")

# Each imports the library that it is for, and is itself imported at its first use.
_INTEGRATIONS = ("compat", "onnx", "parallel", "torchao", "transformers")


def __getattr__(name):
    if name in _INTEGRATIONS:
        try:
            return importlib.import_module(f"dynquant.{name}")
        except ImportError as error:  # hasattr() and the like expect an AttributeError
            raise AttributeError(f"dynquant.{name} cannot be imported: {error}") from error
    raise AttributeError(f"module 'dynquant' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_INTEGRATIONS})
