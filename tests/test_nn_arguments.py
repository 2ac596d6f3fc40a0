"""What is not a tensor, as an array of numpy, is refused by every quantized module, by its name."""

import numpy as np
import pytest
import torch
from torch import nn

import dynquant

X = torch.zeros(2, 16)
INDICES = torch.zeros(2, 3, dtype=torch.int64)
RECURRENT = [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell]


def quantized(module, dtype):
    return dynquant.quantize_dynamic(nn.Sequential(module), {type(module)}, dtype)[0]


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, *RECURRENT], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("given", [X.numpy(), [1.0], None], ids=["array", "list", "None"])
def test_input(kind, dtype, given):
    module = quantized(kind(16, 16), dtype)
    name = f"{type(module).__name__}: input must be a torch.Tensor, got .*{type(given).__name__}"
    with pytest.raises(TypeError, match=name):
        module(given)


def test_hint():
    with pytest.raises(TypeError, match="torch.from_numpy makes one of an array"):
        quantized(nn.Linear(16, 16), torch.qint8)(X.numpy())


@pytest.mark.parametrize("name", ["query", "key", "value", "key_padding_mask", "attn_mask"])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
def test_attention(name, dtype):
    module = quantized(nn.MultiheadAttention(16, 2), dtype)
    arguments = dict.fromkeys(("query", "key", "value"), X)
    arguments[name] = np.zeros((2, 2), bool)
    with pytest.raises(TypeError, match=f": {name} must be a torch.Tensor, got numpy.ndarray"):
        module(**arguments)


@pytest.mark.parametrize("name", ["input", "offsets", "per_sample_weights"])
def test_embedding_bag(name):
    module = quantized(nn.EmbeddingBag(10, 16, mode="sum"), torch.quint8)
    arguments = {"input": INDICES, name: np.zeros((2, 3), np.int64)}
    with pytest.raises(TypeError, match=f": {name} must be a torch.Tensor, got numpy.ndarray"):
        module(**arguments)


def test_embedding_and_stub():
    with pytest.raises(TypeError, match=r"Embedding: input must be a torch\.Tensor, got numpy"):
        quantized(nn.Embedding(10, 16), torch.quint8)(INDICES.numpy())
    stubbed = nn.Sequential(dynquant.QuantStub(), nn.Linear(16, 16))
    with pytest.raises(TypeError, match=r"Quantize: x must be a torch\.Tensor, got numpy"):
        dynquant.quantize_dynamic(stubbed)(X.numpy())
