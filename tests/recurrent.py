"""Recurrent modules for tests: every kind, their quantized forms, and what the reference gives."""

import warnings

import numpy as np
import pytest
import reference_rnn
import torch
from compare import assert_all_same, assert_same_state
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

import dynquant
from dynquant import QConfig

LAYERS = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *sizes, **more: nn.RNN(*sizes, nonlinearity="relu", **more),
}
CELLS = {
    "lstm": nn.LSTMCell,
    "gru": nn.GRUCell,
    "rnn_tanh": nn.RNNCell,
    "rnn_relu": lambda *sizes, **more: nn.RNNCell(*sizes, nonlinearity="relu", **more),
}

options = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 3),
        "bias": st.booleans(),
        "batch_first": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.3]),
        "bidirectional": st.booleans(),
        "proj_size": st.sampled_from([0, 0, 3]),
    }
)


def drawn_layer(cell, options, sizes):
    if cell != "lstm":
        options = {key: value for key, value in options.items() if key != "proj_size"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dropout with one layer
        return LAYERS[cell](*sizes, **options).eval()


def every_module():
    torch.manual_seed(0)
    return {
        "lstm": nn.LSTM(5, 7, num_layers=2, bidirectional=True),
        "projected": nn.LSTM(5, 7, num_layers=2, proj_size=3),
        "gru": nn.GRU(5, 7, bias=False),
        "rnn": nn.RNN(5, 7, nonlinearity="relu", batch_first=True),
        "lstm cell": nn.LSTMCell(5, 7),
        "gru cell": nn.GRUCell(5, 7, bias=False),
        "rnn cell": nn.RNNCell(5, 7),
    }


MODULES = list(every_module())


def another(mod):
    """A module like `mod`, with weights of its own."""
    keys = ["input_size", "hidden_size", "bias"]
    if isinstance(mod, nn.RNNBase):
        keys += ["num_layers", "batch_first", "bidirectional"]
        keys += ["proj_size"] if isinstance(mod, nn.LSTM) else []
    keys += ["nonlinearity"] if hasattr(mod, "nonlinearity") else []
    return type(mod)(**{key: getattr(mod, key) for key in keys})


def quantized(mod, qconfig=None):
    """The form with int8 weights."""
    form = getattr(dynquant.nn, type(mod).__name__)
    return form.from_float(mod, qconfig)


def halved(mod, half=torch.float16):
    """The form with weights in 16 bits."""
    form = getattr(dynquant.nn, f"{type(mod).__name__}16bit")
    return form.from_float(mod, QConfig(dtype=half))


def tensors(results):
    return pytree.tree_leaves(results)


def decibels(result, exact):
    result, exact = result.detach().double(), exact.detach().double()
    noise = (result - exact).square().mean()
    return float(10 * (exact.square().mean() / noise).log10()) if noise else np.inf


def assert_attributes_of(layer, form):
    """That a quantized form has the attributes of its float layer, and weights that look alike."""
    for key in nn.RNNBase.__constants__:
        assert getattr(form, key) == getattr(layer, key)
    assert form.flatten_parameters() is None
    for one, other in zip(form.all_weights, layer.all_weights, strict=True):
        for held, given in zip(one, other, strict=True):
            assert held.shape == given.shape and held.dtype == given.dtype
            assert held.data_ptr() != given.data_ptr() and not held.requires_grad
    with pytest.raises(RuntimeError, match="cannot be written to"):
        form.weight_hh_l0.zero_()
    with pytest.raises(AttributeError, match=f"weight_hh_l{layer.num_layers}"):
        getattr(form, f"weight_hh_l{layer.num_layers}")


def assert_equal_modules(one, other):
    assert_same_state(one, other)
    x = torch.randn(4, one.input_size)
    assert_all_same(tensors(one(x)), tensors(other(x)))


def of_layers(cell, mod, weight_form, x, states, batch_sizes=None, **scheme):
    """All layers and directions, by the reference, for which weight_form prepares each weight."""
    last = []
    directions = 2 if mod.bidirectional else 1

    def held(name):
        value = getattr(mod, name, None)
        return None if value is None else value.detach().numpy()

    for layer in range(mod.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            place = layer * directions + direction
            weights = {
                f"weight_{part}": weight_form(held(f"weight_{part}{suffix}"))
                for part in ("ih", "hh", "hr")
                if held(f"weight_{part}{suffix}") is not None
            }
            y, *after = reference_rnn.recurrent(
                cell,
                x,
                states[0][place],
                states[1][place] if len(states) > 1 else None,
                bias_ih=held(f"bias_ih{suffix}"),
                bias_hh=held(f"bias_hh{suffix}"),
                **weights,
                batch_sizes=batch_sizes,
                reverse=direction == 1,
                **scheme,
            )
            outputs.append(y)
            last.append([one for one in after if one is not None])
        x = np.concatenate(outputs, -1)
    return x, [np.stack(one) for one in zip(*last, strict=True)]
