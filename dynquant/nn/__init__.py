"""The quantized modules."""

from dynquant.nn.attention import MultiheadAttention
from dynquant.nn.conv1d import Conv1D, HalfConv1D
from dynquant.nn.embedding import Embedding, EmbeddingBag
from dynquant.nn.experts import Experts, HalfExperts
from dynquant.nn.linear import Linear
from dynquant.nn.linear_half import HalfLinear
from dynquant.nn.quantize import DeQuantize, Quantize
from dynquant.nn.rnn import GRU, LSTM, RNN
from dynquant.nn.rnn_cells import GRUCell, LSTMCell, RNNCell
from dynquant.nn.rnn_half import (
    HalfGRU,
    HalfGRUCell,
    HalfLSTM,
    HalfLSTMCell,
    HalfRNN,
    HalfRNNCell,
)

__all__ = [
    "Conv1D",
    "DeQuantize",
    "Embedding",
    "EmbeddingBag",
    "Experts",
    "GRU",
    "GRUCell",
    "HalfConv1D",
    "HalfExperts",
    "HalfGRU",
    "HalfGRUCell",
    "HalfLSTM",
    "HalfLSTMCell",
    "HalfLinear",
    "HalfRNN",
    "HalfRNNCell",
    "LSTM",
    "LSTMCell",
    "Linear",
    "MultiheadAttention",
    "Quantize",
    "RNN",
    "RNNCell",
]
