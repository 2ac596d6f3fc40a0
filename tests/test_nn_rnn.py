"""LSTM, GRU, RNN and their cells with int8 weights: their arithmetic, torch's semantics."""

import copy
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
    LAYERS,
    MODULES,
    another,
    assert_attributes_of,
    assert_equal_modules,
    decibels,
    drawn_layer,
    every_module,
    of_layers,
    options,
    quantized,
    tensors,
)
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import dynquant
from dynquant import QConfig

EXCEPTIONS = (RuntimeError, ValueError)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


def of_reference(cell, mod, config, x, states, batch_sizes=None):
    """All layers and directions with int8 weights; x and the states are numpy arrays."""
    return of_layers(
        cell,
        mod,
        lambda weight: ref.quantize_weight(weight, config.weight == "per_channel"),
        x,
        states,
        batch_sizes,
        per_token=config.activation == "per_token",
        symmetric=config.symmetric,
    )


configs = st.builds(
    QConfig,
    weight=st.sampled_from(["per_channel", "per_tensor"]),
    activation=st.sampled_from(["per_token", "per_tensor"]),
    symmetric=st.booleans(),
)


@settings(max_examples=60)
@given(
    cell=st.sampled_from(list(LAYERS)),
    options=options,
    config=configs,
    steps=st.integers(1, 6),
    batch=st.integers(0, 4),
    kind=st.sampled_from(["batched", "unbatched", "packed", "packed, not sorted"]),
    with_states=st.booleans(),
    contiguous=st.booleans(),
    seed=st.integers(0, 99),
)
def test_is_the_specification(
    isa, cell, options, config, steps, batch, kind, with_states, contiguous, seed
):
    torch.manual_seed(seed)
    layer = drawn_layer(cell, options, (5, 9))
    batch = 1 if kind == "unbatched" else max(batch, 1) if "packed" in kind else batch
    directions = 2 if layer.bidirectional else 1
    x = (
        torch.randn(steps, batch, 5)
        if contiguous
        else torch.randn(5, batch, steps).permute(2, 1, 0)
    )
    widths = [layer.proj_size or 9, 9] if cell == "lstm" else [9]
    shape = (layer.num_layers * directions, batch)
    states = [(torch.randn if with_states else torch.zeros)(*shape, width) for width in widths]
    lengths = None
    if "packed" in kind:
        lengths = torch.randint(1, steps + 1, (batch,))
        lengths[0] = steps
        if kind == "packed":
            lengths = lengths.sort(descending=True).values
        given_x = pack_padded_sequence(
            x.transpose(0, 1) if layer.batch_first else x,
            lengths,
            batch_first=layer.batch_first,
            enforce_sorted=kind == "packed",
        )
    elif kind == "unbatched":
        given_x = x[:, 0]
    else:
        given_x = x.transpose(0, 1) if layer.batch_first else x
    hx = [state[:, 0] if kind == "unbatched" else state for state in states]
    hx = (tuple(hx) if cell == "lstm" else hx[0]) if with_states else None

    result, last = quantized(layer, config)(given_x, hx)
    exact, exact_last = layer(given_x, hx)
    assert [one.shape for one in tensors((result, last)) if isinstance(one, torch.Tensor)] == [
        one.shape for one in tensors((exact, exact_last)) if isinstance(one, torch.Tensor)
    ]

    numbers = [state.numpy() for state in states]
    if "packed" in kind:
        assert isinstance(result, PackedSequence)
        order = given_x.sorted_indices
        if order is not None:
            numbers = [one[:, order.numpy()] for one in numbers]
        y, after = of_reference(
            cell, layer, config, given_x.data.numpy(), numbers, given_x.batch_sizes.tolist()
        )
        assert_same(result.data, y)
        if order is not None:
            after = [one[:, given_x.unsorted_indices.numpy()] for one in after]
    else:
        y, after = of_reference(cell, layer, config, x.contiguous().numpy(), numbers)
        if kind == "unbatched":
            y, after = y[:, 0], [one[:, 0] for one in after]
        elif layer.batch_first:
            y = np.swapaxes(y, 0, 1)
        assert_same(result, y)
    assert_all_same(last if cell == "lstm" else [last], after)


@pytest.mark.parametrize("config", [QConfig(), QConfig("per_tensor", "per_tensor")], ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", LAYERS)
def test_is_close_to_float(cell, bidirectional, config):
    torch.manual_seed(0)
    layer = LAYERS[cell](96, 128, num_layers=2, bidirectional=bidirectional).eval()
    x = torch.randn(30, 4, 96)
    with torch.no_grad():
        pairs = zip(tensors(quantized(layer, config)(x)), tensors(layer(x)), strict=True)
        for result, exact in pairs:
            assert decibels(result, exact) > 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", LAYERS)
def test_16_bit_modules(cell, dtype):
    torch.manual_seed(0)
    layer = LAYERS[cell](48, 64, num_layers=2, bidirectional=True).eval()
    form, x = quantized(layer.to(dtype)), torch.randn(9, 3, 48).to(dtype)
    results = tensors(form(x))
    exact = tensors(layer.float()(x.float()))
    for result, one in zip(results, exact, strict=True):
        assert result.dtype == dtype
        assert decibels(result, one) > 30
    assert next(form.parameters()).dtype == dtype
    assert form.weight_ih_l0_scale.dtype == torch.float32


def test_dropout_acts_in_training_alone():
    layer = quantized(nn.LSTM(6, 40, num_layers=2, dropout=0.5))
    x = torch.randn(3, 2, 6)
    assert not layer.training
    assert_same(layer(x)[0], layer(x)[0])
    layer.train()
    assert (layer(x)[0] != layer(x)[0]).any()


@settings(max_examples=60)
@given(
    cell=st.sampled_from(list(CELLS)),
    bias=st.booleans(),
    config=configs,
    batch=st.sampled_from([None, 0, 1, 4]),
    with_states=st.booleans(),
    seed=st.integers(0, 99),
)
def test_cells_are_the_specification(isa, cell, bias, config, batch, with_states, seed):
    torch.manual_seed(seed)
    mod = CELLS[cell](5, 9, bias=bias)
    lead = () if batch is None else (batch,)
    x = torch.randn(*lead, 5)
    states = [torch.randn(*lead, 9) if with_states else torch.zeros(*lead, 9)] * 2
    hx = (tuple(states) if cell == "lstm" else states[0]) if with_states else None
    result, exact = quantized(mod, config)(x, hx), mod(x, hx)
    assert [one.shape for one in tensors(result)] == [one.shape for one in tensors(exact)]

    weights = {
        f"weight_{part}": ref.quantize_weight(
            getattr(mod, f"weight_{part}").detach().numpy(), config.weight == "per_channel"
        )
        for part in ("ih", "hh")
    }
    biases = {
        f"bias_{part}": getattr(mod, f"bias_{part}").detach().numpy() if bias else None
        for part in ("ih", "hh")
    }
    h = states[0].reshape(-1, 9).numpy()
    _, *after = reference_rnn.recurrent(
        cell,
        x.reshape(1, -1, 5).numpy() if batch != 0 else np.zeros((1, 0, 5), np.float32),
        h,
        h if cell == "lstm" else None,
        **weights,
        **biases,
        per_token=config.activation == "per_token",
        symmetric=config.symmetric,
    )
    expected = [one.reshape(*lead, 9) for one in after if one is not None]
    assert_all_same(tensors(result), expected)


def test_a_cell_step_by_step_is_the_layer():
    layer = nn.LSTM(6, 10)
    cell = nn.LSTMCell(6, 10)
    cell.load_state_dict({key.removesuffix("_l0"): one for key, one in layer.state_dict().items()})
    layer, cell = quantized(layer), quantized(cell)
    x, hx = torch.randn(5, 2, 6), None
    for t, row in enumerate(x):
        hx = cell(row, hx)
        assert_same(hx[0], layer(x)[0][t])


class TestMessages:
    """Those of torch."""

    BAD_CALLS = {
        "four dimensions": lambda x, h: (x[None], None),
        "one dimension": lambda x, h: (x[0, 0], None),
        "input size": lambda x, h: (x[..., :4], None),
        "no steps": lambda x, h: (x[:0], None),
        "batched input, unbatched state": lambda x, h: (x, h(0)),
        "unbatched input, batched state": lambda x, h: (x[:, 0], h(None)),
        "batch of the state": lambda x, h: (x, h(slice(0, 1))),
    }

    @pytest.mark.parametrize("call", BAD_CALLS)
    @pytest.mark.parametrize("cell", LAYERS)
    def test_layers(self, cell, call):
        layer = LAYERS[cell](5, 7)
        state = torch.zeros(1, 3, 7)

        def hx(rows):
            chosen = state if rows is None else state[:, rows]
            return (chosen, chosen) if cell == "lstm" else chosen

        self.assert_same_message(layer, *self.BAD_CALLS[call](torch.zeros(4, 3, 5), hx))

    @pytest.mark.parametrize("size", [6, 8])
    @pytest.mark.parametrize("cell", LAYERS)
    def test_size_of_the_state(self, cell, size):
        state = torch.zeros(1, 3, size)
        self.assert_same_message(
            LAYERS[cell](5, 7), torch.zeros(4, 3, 5), (state, state) if cell == "lstm" else state
        )

    BAD_CELL_CALLS = {
        "three dimensions": (torch.zeros(1, 3, 5), None),
        "no dimension": (torch.zeros(()), None),
        "input size": (torch.zeros(3, 4), None),
        "batch of the state": (torch.zeros(3, 5), torch.zeros(2, 7)),
        "size of the state": (torch.zeros(3, 5), torch.zeros(3, 6)),
        "dimensions of the state": (torch.zeros(3, 5), torch.zeros(1, 3, 7)),
    }

    @pytest.mark.parametrize("call", BAD_CELL_CALLS)
    @pytest.mark.parametrize("cell", CELLS)
    def test_cells(self, cell, call):
        x, state = self.BAD_CELL_CALLS[call]
        hx = (state, state) if cell == "lstm" and state is not None else state
        self.assert_same_message(CELLS[cell](5, 7), x, hx)

    def assert_same_message(self, mod, x, hx):
        with pytest.raises(EXCEPTIONS) as expected:
            mod(x, hx)
        with pytest.raises(EXCEPTIONS) as given:
            quantized(mod)(x, hx)
        words = str(expected.value).replace(" in RNN", "").lower().split()
        missing = [word for word in words if word.strip(",") not in str(given.value).lower()]
        assert len(missing) <= len(words) / 3, (str(expected.value), str(given.value))

    @pytest.mark.parametrize("cells", [LAYERS, CELLS], ids=["layers", "cells"])
    @pytest.mark.parametrize("cell", LAYERS)
    def test_what_hx_may_be(self, cells, cell):
        mod, x = quantized(cells[cell](5, 7)), torch.zeros(3, 5)
        state = torch.zeros(1, 7) if cells is LAYERS else torch.zeros(3, 7)
        wrong = [(state,), (state,) * 3, 5, (state, None), ()]
        wrong.append(state if cell == "lstm" else (state, state))
        wanted = r"a tuple of two tensors, \(h_0, c_0\)" if cell == "lstm" else "a tensor"
        for hx in wrong:
            with pytest.raises(TypeError, match=f"hx must be {wanted}, got (int|tuple|Tensor)"):
                mod(x, hx)

    @pytest.mark.parametrize("cell", LAYERS)
    def test_float64(self, cell):
        with pytest.raises(EXCEPTIONS, match="float64"):
            quantized(LAYERS[cell](5, 7))(torch.zeros(4, 3, 5, dtype=torch.float64))

    @pytest.mark.parametrize("cell", LAYERS)
    def test_dtype_of_the_state(self, cell):
        state = torch.zeros(1, 3, 7, dtype=torch.bfloat16)
        with pytest.raises(EXCEPTIONS, match="h0 must have dtype float32, got bfloat16"):
            quantized(LAYERS[cell](5, 7))(
                torch.zeros(4, 3, 5), (state, state) if cell == "lstm" else state
            )

    def test_weights(self):
        layer = nn.LSTM(3, 4, num_layers=2)
        layer.weight_hh_l1.data[2, 1] = np.nan
        with pytest.raises(ValueError, match="a.weight_hh_l1 holds NaN or Inf"):
            dynquant.quantize_dynamic(nn.ModuleDict({"a": layer}))
        with pytest.raises(ValueError, match="bias_ih_l0 is torch.float64|weight_ih_l0 is torch.f"):
            dynquant.quantize_dynamic(nn.GRU(3, 4).double())
        with pytest.raises(
            ValueError, match=r"\[GRU\]: dtype is torch.quint8; allowed: torch.qint8, torch.float16"
        ):
            dynquant.quantize_dynamic(nn.ModuleDict({"rnn": nn.GRU(3, 4)}), {nn.GRU}, torch.quint8)


@pytest.fixture(params=MODULES)
def mod(request):
    return every_module()[request.param]


class TestQuantizeDynamic:
    def test_by_default(self, mod):
        model = nn.ModuleDict({"a": mod, "b": nn.Linear(2, 2)})
        result = dynquant.quantize_dynamic(model)
        assert type(result["a"]) is getattr(dynquant.nn, type(mod).__name__)
        assert type(model["a"]) is type(mod) and not result["a"].training and model["a"].training
        again = dynquant.quantize_dynamic(result)
        assert type(again["a"]) is type(result["a"])

    def test_by_type_name_and_config(self, mod):
        model = nn.ModuleDict({"a": mod, "b": nn.Linear(2, 2)})
        by_type = dynquant.quantize_dynamic(model, {type(mod)})
        assert type(by_type["b"]) is nn.Linear
        assert_equal_modules(by_type["a"], quantized(mod))
        by_name = dynquant.quantize_dynamic(model, {"a": QConfig("per_tensor", symmetric=True)})
        assert_equal_modules(by_name["a"], quantized(mod, QConfig("per_tensor", symmetric=True)))
        kept = dynquant.quantize_dynamic(model, {nn.Linear: {}, "a": None})
        assert type(kept["a"]) is type(mod)

    def test_keeps_hooks_and_changes_nothing(self, mod):
        before = copy.deepcopy(mod.state_dict())
        calls = []
        mod.register_forward_hook(lambda *_: calls.append(1))
        dynquant.quantize_dynamic(mod)(torch.randn(4, 5))
        assert calls == [1]
        for key, value in mod.state_dict().items():
            assert_same(value, before[key])

    def test_subclasses_with_their_own_forward_stay(self):
        class Mine(nn.LSTM):
            def forward(self, x):
                return x

        with pytest.warns(UserWarning, match="has a forward other than LSTM's"):
            result = dynquant.quantize_dynamic(nn.Sequential(Mine(3, 4)))
        assert type(result[0]) is Mine

    def test_a_computed_weight_stays(self):
        layer = nn.LSTM(3, 4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.weight_norm(layer, "weight_hh_l0")
        with pytest.warns(UserWarning, match="weight_hh_l0 that a hook computes"):
            # torch cannot copy such a layer.
            result = dynquant.quantize_dynamic(nn.Sequential(layer), inplace=True)
        assert type(result[0]) is nn.LSTM

    def test_a_parametrized_weight_is_quantized(self):
        layer = nn.utils.parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
        weight, _ = ref.quantize_weight(layer.weight_hh_l0.detach().numpy())
        assert_same(dynquant.quantize_dynamic(layer).weight_hh_l0.int_repr(), weight)


def test_repr():
    assert repr(quantized(nn.LSTM(3, 4, 2, batch_first=True), QConfig("per_tensor"))) == (
        "LSTM(3, 4, num_layers=2, batch_first=True, weight=per_tensor, activation=per_token, "
        "symmetric=False)"
    )
    assert repr(quantized(nn.RNNCell(3, 4, bias=False, nonlinearity="relu"))) == (
        "RNNCell(3, 4, bias=False, nonlinearity=relu, weight=per_channel, activation=per_token, "
        "symmetric=False)"
    )


def test_attributes_are_torchs():
    layer = nn.LSTM(5, 7, 2, batch_first=True, dropout=0.1, bidirectional=True, proj_size=3)
    assert_attributes_of(layer, quantized(layer))


def test_a_float_weight_that_is_assigned_is_quantized():
    form, other = quantized(nn.LSTM(5, 7)), nn.LSTM(5, 7)
    form.weight_hh_l0 = other.weight_hh_l0
    weight, scale = ref.quantize_weight(other.weight_hh_l0.detach().numpy())
    assert_same(form.weight_hh_l0.int_repr(), weight)
    assert_same(form.weight_hh_l0_scale, scale)
    with pytest.raises(ValueError, match=r"weight_hh_l0 is torch.float32 \[7, 28\]"):
        form.weight_hh_l0 = other.weight_hh_l0.T


class TestStateDict:
    def test_holds_plain_tensors(self):
        state = quantized(nn.LSTM(5, 7, proj_size=3)).state_dict()
        assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
            "weight_ih_l0_int8": (torch.int8, (28, 5)),
            "weight_ih_l0_scale": (torch.float32, (28,)),
            "weight_hh_l0_int8": (torch.int8, (28, 3)),
            "weight_hh_l0_scale": (torch.float32, (28,)),
            "weight_hr_l0_int8": (torch.int8, (3, 7)),
            "weight_hr_l0_scale": (torch.float32, (3,)),
            "bias_ih_l0": (torch.float32, (28,)),
            "bias_hh_l0": (torch.float32, (28,)),
            "version": (torch.int64, ()),
        }
        assert all(type(value) is torch.Tensor for value in state.values())

    def test_loads_a_float_checkpoint(self, mod):
        other = quantized(another(mod))
        other.load_state_dict(mod.state_dict())
        assert_equal_modules(other, quantized(mod))

    def test_loads_a_checkpoint_of_torch(self, mod):
        if isinstance(mod, nn.RNN) or not mod.bias or getattr(mod, "proj_size", 0):
            pytest.skip("torch.ao has no such module")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            saved = torch.ao.quantization.quantize_dynamic(nn.Sequential(mod), {type(mod)})
        model = nn.Sequential(quantized(another(mod)))
        result = model.load_state_dict(saved.state_dict())
        assert not result.missing_keys and not result.unexpected_keys
        x = torch.randn(4, 5)
        for one, exact in zip(tensors(model(x)), tensors(mod(x)), strict=True):
            assert decibels(one, exact) > 30
        assert list(
            model[0].weight_hh_l0_scale.shape
            if hasattr(model[0], "weight_hh_l0_scale")
            else model[0].weight_hh_scale.shape
        ) == [1]

    def test_minus_128_is_kept(self):
        form = quantized(nn.GRU(5, 7))
        state = form.state_dict()
        state["weight_hh_l0_int8"][2, 3] = -128
        form.load_state_dict(state)
        assert_same(form.weight_hh_l0.int_repr(), state["weight_hh_l0_int8"])
        assert_same(form.weight_hh_l0_scale, state["weight_hh_l0_scale"])


def test_pickles_hold_no_packed_weight(mod):
    assert not any(key.startswith("packed") for key in quantized(mod).__getstate__()["_buffers"])


def test_a_packed_sequence_through_two_layers_and_back():
    torch.manual_seed(0)
    first, second = nn.GRU(5, 16, bidirectional=True), nn.LSTM(32, 8)
    lengths = torch.tensor([3, 7, 1, 5])
    packed = pack_padded_sequence(torch.randn(7, 4, 5), lengths, enforce_sorted=False)
    outputs = []
    for one, other in ((first, second), (quantized(first), quantized(second))):
        y, (h, c) = other(one(packed)[0])
        padded, found = pad_packed_sequence(y)
        assert torch.equal(found, lengths)
        outputs.append((padded, h, c))
    for result, exact in zip(*reversed(outputs), strict=True):
        assert decibels(result, exact) > 30
