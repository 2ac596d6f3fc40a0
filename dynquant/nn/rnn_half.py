"""nn.LSTM, nn.GRU, nn.RNN and their cells with weights in 16 bits, computed in fp32."""

import torch

from dynquant.nn._formats import Bits16
from dynquant.nn.rnn import GRULayers, LSTMLayers, RNNLayers
from dynquant.nn.rnn_cells import GRUStep, LSTMStep, RNNStep

_ABOUT = """Made by from_float, which quantize_dynamic calls for dtype torch.float16 or
    torch.bfloat16. Takes and gives what the float module does, in fp32, bf16 or fp16; the states
    have the dtype of the input. The sums have a fixed order (torch.ops.dynquant.linear_half), so
    the results have the same bits on every CPU and in every batch.

    The state dict has the names of the float module, with weights in 16 bits [N, K], and version
    (int64). A weight in the other 16-bit dtype is loaded as it is. load_state_dict also takes what
    the float module has (its weights are then rounded to the dtype of these) and what torch.ao's
    dynamic quantization saves in float16.

    Attributes:
        those of the float module; its weights are QuantizedWeights of its shapes and dtype, the
        biases parameters without gradient, or None. What is held are buffers by their names with
        _16bit, which stay so in a model that is cast to another dtype.
    """


class _Bits16Weights:
    FORMAT = Bits16
    DTYPES = Bits16.DTYPES


class LSTM16bit(_Bits16Weights, LSTMLayers):
    __doc__ = f"nn.LSTM, proj_size included.\n\n    {_ABOUT}"

    OP = torch.ops.dynquant.lstm_half


class GRU16bit(_Bits16Weights, GRULayers):
    __doc__ = f"nn.GRU.\n\n    {_ABOUT}"

    OP = torch.ops.dynquant.gru_half


class RNN16bit(_Bits16Weights, RNNLayers):
    __doc__ = f"nn.RNN, with tanh or relu.\n\n    {_ABOUT}"

    OP = torch.ops.dynquant.rnn_half


class _Bits16Cell(_Bits16Weights):
    def _tuple_of_weights(self):
        return self.weight_ih_16bit, self.bias_ih, self.weight_hh_16bit, self.bias_hh

    def _tuple_of_no_projection(self):
        return (None,)

    def _tuple_of_scheme(self):
        return ()


class LSTMCell16bit(_Bits16Cell, LSTMStep):
    __doc__ = f"nn.LSTMCell.\n\n    {_ABOUT}"

    OP = torch.ops.dynquant.lstm_half


class GRUCell16bit(_Bits16Cell, GRUStep):
    __doc__ = f"nn.GRUCell.\n\n    {_ABOUT}"

    OP = torch.ops.dynquant.gru_half


class RNNCell16bit(_Bits16Cell, RNNStep):
    __doc__ = f"nn.RNNCell, with tanh or relu.\n\n    {_ABOUT}"

    OP = torch.ops.dynquant.rnn_half
