"""The quantized modules."""

from dynquant.nn.embedding import Embedding, EmbeddingBag
from dynquant.nn.linear import Linear
from dynquant.nn.linear_half import HalfLinear
from dynquant.nn.quantize import DeQuantize, Quantize

__all__ = ["DeQuantize", "Embedding", "EmbeddingBag", "HalfLinear", "Linear", "Quantize"]
