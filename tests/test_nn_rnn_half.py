"""LSTM, GRU, RNN and their cells with weights in 16 bits: their arithmetic.

What they share with the int8 forms is in test_nn_rnn.py and, as to state and moves,
in test_nn_rnn_life.py.
"""

import warnings

import numpy as np
import pytest
import reference as ref
import reference_rnn
import torch
from compare import assert_all_same, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrent import (
    CELLS,
    MODULES,
    assert_attributes_of,
    assert_equal_modules,
    decibels,
    drawn_layer,
    every_module,
    halved,
    of_layers,
    options,
    tensors,
)
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import dynquant
from dynquant import QConfig

HALVES = (torch.float16, torch.bfloat16)
NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


def in_16_bits(half):
    return lambda weight: ref.round_to(weight, NAMES[half])


@pytest.fixture(params=MODULES)
def mod(request):
    return every_module()[request.param]


@settings(max_examples=40)
@given(
    cell=st.sampled_from(list(CELLS)),
    options=options,
    half=st.sampled_from(HALVES),
    steps=st.integers(1, 6),
    batch=st.integers(1, 4),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_is_the_specification(isa, cell, options, half, steps, batch, packed, seed):
    torch.manual_seed(seed)
    layer = drawn_layer(cell, options, (5, 9))
    x = torch.randn(steps, batch, 5)
    rows = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = [layer.proj_size or 9, 9] if cell == "lstm" else [9]
    states = [torch.randn(rows, batch, width) for width in widths]
    numbers = [state.numpy() for state in states]
    hx = tuple(states) if cell == "lstm" else states[0]
    form, weight_form = halved(layer, half), in_16_bits(half)
    if packed:
        lengths = torch.randint(1, steps + 1, (batch,)).sort(descending=True).values
        lengths[0] = steps
        given_x = pack_padded_sequence(x, lengths)
        sizes = given_x.batch_sizes.tolist()
        result, last = form(given_x, hx)
        y, after = of_layers(cell, layer, weight_form, given_x.data.numpy(), numbers, sizes)
        assert_same(result.data, y)
    else:
        result, last = form(x.transpose(0, 1) if layer.batch_first else x, hx)
        y, after = of_layers(cell, layer, weight_form, x.numpy(), numbers)
        assert_same(result.transpose(0, 1) if layer.batch_first else result, y)
    assert_all_same(last if cell == "lstm" else [last], after)


@settings(max_examples=30)
@given(
    cell=st.sampled_from(list(CELLS)),
    bias=st.booleans(),
    half=st.sampled_from(HALVES),
    batch=st.sampled_from([None, 1, 4]),
    seed=st.integers(0, 99),
)
def test_cells_are_the_specification(isa, cell, bias, half, batch, seed):
    torch.manual_seed(seed)
    mod = CELLS[cell](5, 9, bias=bias)
    lead = () if batch is None else (batch,)
    x, h = torch.randn(*lead, 5), torch.randn(*lead, 9)
    result = halved(mod, half)(x, (h, h) if cell == "lstm" else h)
    rows = h.reshape(-1, 9).numpy()

    def held(name):
        return getattr(mod, name).detach().numpy()

    _, *after = reference_rnn.recurrent(
        cell,
        x.reshape(1, -1, 5).numpy(),
        rows,
        rows if cell == "lstm" else None,
        **{f"weight_{part}": in_16_bits(half)(held(f"weight_{part}")) for part in ("ih", "hh")},
        **{f"bias_{part}": held(f"bias_{part}") if bias else None for part in ("ih", "hh")},
    )
    assert_all_same(tensors(result), [one.reshape(*lead, 9) for one in after if one is not None])


@pytest.mark.parametrize("half", HALVES, ids=str)
def test_is_close_to_float(mod, half):
    x = torch.randn(4, 5)
    for result, exact in zip(tensors(halved(mod, half)(x)), tensors(mod(x)), strict=True):
        assert decibels(result, exact) > (60 if half == torch.float16 else 42)


class TestQuantizeDynamic:
    @pytest.mark.parametrize("half", HALVES, ids=str)
    def test_by_default(self, mod, half):
        model = nn.ModuleDict({"a": mod, "b": nn.Linear(2, 2)})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = dynquant.quantize_dynamic(model, dtype=half)
            again = dynquant.quantize_dynamic(result, dtype=half)
        assert type(result["a"]) is getattr(dynquant.nn, f"{type(mod).__name__}16bit")
        assert next(iter(result["a"].buffers())).dtype == half
        assert type(again["a"]) is type(result["a"])
        assert type(model["a"]) is type(mod) and not result["a"].training

    def test_by_type_and_name(self, mod):
        model = nn.ModuleDict({"a": mod, "b": nn.Linear(2, 2)})
        by_type = dynquant.quantize_dynamic(model, {type(mod)}, dtype=torch.float16)
        assert type(by_type["b"]) is nn.Linear
        assert_equal_modules(by_type["a"], halved(mod))
        by_name = dynquant.quantize_dynamic(model, {"a": QConfig(dtype=torch.bfloat16), "b": {}})
        assert_equal_modules(by_name["a"], halved(mod, torch.bfloat16))
        assert type(by_name["b"]) is dynquant.nn.Linear

    def test_as_torch(self):
        """torch.ao rounds the weights to float16 as well, and sums in another order."""
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.LSTM(20, 30, 2, bidirectional=True)), torch.randn(7, 3, 20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.float16)
        ours = dynquant.quantize_dynamic(model, {nn.LSTM}, dtype=torch.float16)
        for result, exact in zip(tensors(ours(x)), tensors(theirs(x)), strict=True):
            torch.testing.assert_close(result, exact, atol=1e-5, rtol=1e-5)

    def test_errors(self):
        layer = nn.LSTM(3, 4, num_layers=2)
        layer.weight_hh_l1.data[2, 1] = np.nan
        with pytest.raises(ValueError, match="a.weight_hh_l1 holds NaN or Inf"):
            dynquant.quantize_dynamic(nn.ModuleDict({"a": layer}), dtype=torch.float16)
        with pytest.raises(ValueError, match="nn.GRU: dtype is torch.qint8; allowed: torch.f"):
            dynquant.nn.GRU16bit.from_float(nn.GRU(3, 4), QConfig())
        with pytest.raises((RuntimeError, ValueError), match="float64"):
            halved(nn.GRU(3, 4))(torch.zeros(2, 2, 3, dtype=torch.float64))

    def test_weights_beyond_float16(self):
        layer = nn.GRU(3, 4)
        layer.weight_hh_l0.data[0, 0] = -1e6
        with pytest.warns(UserWarning, match="weight_hh_l0 reaches 1e\\+06; torch.float16 ends at"):
            form = halved(layer)
        assert form.weight_hh_l0[0, 0] == -65504


def test_repr():
    assert repr(halved(nn.LSTM(3, 4, 2, batch_first=True))) == (
        "LSTM16bit(3, 4, num_layers=2, batch_first=True, dtype=torch.float16)"
    )
    assert repr(halved(nn.RNNCell(3, 4, bias=False, nonlinearity="relu"), torch.bfloat16)) == (
        "RNNCell16bit(3, 4, bias=False, nonlinearity=relu, dtype=torch.bfloat16)"
    )


def test_attributes_are_torchs():
    layer = nn.LSTM(5, 7, 2, batch_first=True, dropout=0.1, bidirectional=True, proj_size=3)
    assert_attributes_of(layer, halved(layer))


def test_state_dict_holds_plain_tensors():
    state = halved(nn.LSTM(5, 7, proj_size=3)).state_dict()
    assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
        "weight_ih_l0": (torch.float16, (28, 5)),
        "weight_hh_l0": (torch.float16, (28, 3)),
        "weight_hr_l0": (torch.float16, (3, 7)),
        "bias_ih_l0": (torch.float32, (28,)),
        "bias_hh_l0": (torch.float32, (28,)),
        "version": (torch.int64, ()),
    }
