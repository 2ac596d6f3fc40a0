"""The quantized modules."""

from dynquant.nn.linear import Linear
from dynquant.nn.quantize import DeQuantize, Quantize

__all__ = ["DeQuantize", "Linear", "Quantize"]
