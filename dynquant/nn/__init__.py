"""The quantized modules."""

from dynquant.nn.attention import MultiheadAttention
from dynquant.nn.conv1d import Conv1D
from dynquant.nn.linear import Linear
from dynquant.nn.quantize import DeQuantize, Quantize
from dynquant.nn.rnn import GRU, LSTM, RNN
from dynquant.nn.rnn_cells import GRUCell, LSTMCell, RNNCell

__all__ = [
    "Conv1D",
    "DeQuantize",
    "GRU",
    "GRUCell",
    "LSTM",
    "LSTMCell",
    "Linear",
    "MultiheadAttention",
    "Quantize",
    "RNN",
    "RNNCell",
]
