"""The quantized modules."""

from dynquant.nn.attention import MultiheadAttention
from dynquant.nn.conv1d import Conv1D
from dynquant.nn.linear import Linear
from dynquant.nn.quantize import DeQuantize, Quantize

__all__ = ["Conv1D", "DeQuantize", "Linear", "MultiheadAttention", "Quantize"]
