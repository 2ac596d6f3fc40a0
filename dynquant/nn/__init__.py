"""The quantized modules."""

from dynquant.nn.attention import MultiheadAttention
from dynquant.nn.conv1d import Conv1D, Conv1D16bit
from dynquant.nn.convolution import Conv1d
from dynquant.nn.convolution_transposed import ConvTranspose1d
from dynquant.nn.embedding import Embedding, EmbeddingBag
from dynquant.nn.experts import Experts, Experts16bit
from dynquant.nn.linear import Linear
from dynquant.nn.linear_half import Linear16bit
from dynquant.nn.quantize import DeQuantize, Quantize
from dynquant.nn.rnn import GRU, LSTM, RNN
from dynquant.nn.rnn_cells import GRUCell, LSTMCell, RNNCell
from dynquant.nn.rnn_half import (
    GRU16bit,
    GRUCell16bit,
    LSTM16bit,
    LSTMCell16bit,
    RNN16bit,
    RNNCell16bit,
)

__all__ = [
    "Conv1D",
    "Conv1D16bit",
    "Conv1d",
    "ConvTranspose1d",
    "DeQuantize",
    "Embedding",
    "EmbeddingBag",
    "Experts",
    "Experts16bit",
    "GRU",
    "GRU16bit",
    "GRUCell",
    "GRUCell16bit",
    "LSTM",
    "LSTM16bit",
    "LSTMCell",
    "LSTMCell16bit",
    "Linear",
    "Linear16bit",
    "MultiheadAttention",
    "Quantize",
    "RNN",
    "RNN16bit",
    "RNNCell",
    "RNNCell16bit",
]


def __getattr__(name):
    """The forms in 16 bits by their first names, HalfLinear and the like."""
    renamed = f"{name.removeprefix('Half')}16bit"
    if name.startswith("Half") and renamed in __all__:
        return globals()[renamed]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
