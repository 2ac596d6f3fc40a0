"""LSTM, GRU, RNN and their cells with weights in 16 bits: arithmetic, state, copies, tracing.

What they share with the int8 forms, torch's semantics, is in test_nn_rnn.py.
"""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import reference as ref
import reference_rnn
import safetensors.torch
import torch
from compare import assert_all_same, assert_same, widened
from hypothesis import given, settings
from hypothesis import strategies as st
from test_nn_rnn import (
    CELLS,
    MODULES,
    constructor_arguments,
    decibels,
    drawn_layer,
    every_module,
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


def halved(mod, half=torch.float16):
    form = getattr(dynquant.nn, f"Half{type(mod).__name__}")
    return form.from_float(mod, QConfig(dtype=half))


def in_16_bits(half):
    return lambda weight: ref.round_to(weight, NAMES[half])


@pytest.fixture(params=MODULES)
def mod(request):
    return every_module()[request.param]


def assert_equal_modules(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, value in one.state_dict().items():
        assert_same(value, other.state_dict()[key], key)
    x = torch.randn(4, one.input_size)
    assert_all_same(tensors(one(x)), tensors(other(x)))


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
        assert type(result["a"]) is getattr(dynquant.nn, f"Half{type(mod).__name__}")
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
            dynquant.nn.HalfGRU.from_float(nn.GRU(3, 4), QConfig())
        with pytest.raises((RuntimeError, ValueError), match="float64"):
            halved(nn.GRU(3, 4))(torch.zeros(2, 2, 3, dtype=torch.float64))

    def test_weights_beyond_float16(self):
        layer = nn.GRU(3, 4)
        layer.weight_hh_l0.data[0, 0] = -1e6
        with pytest.warns(UserWarning, match="a weight reaches 1e\\+06; torch.float16 ends at"):
            form = halved(layer)
        assert form.weight_hh_l0[0, 0] == -65504


def test_repr():
    assert repr(halved(nn.LSTM(3, 4, 2, batch_first=True))) == (
        "HalfLSTM(3, 4, num_layers=2, batch_first=True, dtype=torch.float16)"
    )
    assert repr(halved(nn.RNNCell(3, 4, bias=False, nonlinearity="relu"), torch.bfloat16)) == (
        "HalfRNNCell(3, 4, bias=False, nonlinearity=relu, dtype=torch.bfloat16)"
    )


def test_attributes_are_torchs():
    layer = nn.LSTM(5, 7, 2, batch_first=True, dropout=0.1, bidirectional=True, proj_size=3)
    form = halved(layer)
    for key in nn.RNNBase.__constants__:
        assert getattr(form, key) == getattr(layer, key)
    assert form.flatten_parameters() is None
    for one, other in zip(form.all_weights, layer.all_weights, strict=True):
        for held, given_value in zip(one, other, strict=True):
            assert held.shape == given_value.shape
            assert held.dtype == (torch.float16 if held.dim() == 2 else torch.float32)
            assert held.data_ptr() != given_value.data_ptr() and not held.requires_grad


class TestStateDict:
    def test_holds_plain_tensors(self):
        state = halved(nn.LSTM(5, 7, proj_size=3)).state_dict()
        assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
            "weight_ih_l0": (torch.float16, (28, 5)),
            "weight_hh_l0": (torch.float16, (28, 3)),
            "weight_hr_l0": (torch.float16, (3, 7)),
            "bias_ih_l0": (torch.float32, (28,)),
            "bias_hh_l0": (torch.float32, (28,)),
            "version": (torch.int64, ()),
        }

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("half", HALVES, ids=str)
    def test_loads(self, mod, half, assign):
        one, other = halved(mod, half), halved(type(mod)(**constructor_arguments(mod)))
        result = other.load_state_dict(one.state_dict(), assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert_equal_modules(other, one)

    def test_torch_save_and_safetensors(self, mod, tmp_path):
        one, file = halved(mod), io.BytesIO()
        other = halved(type(mod)(**constructor_arguments(mod)))
        torch.save(one.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert_equal_modules(other, one)
        other = halved(type(mod)(**constructor_arguments(mod)))
        safetensors.torch.save_file(one.state_dict(), tmp_path / "module")
        other.load_state_dict(safetensors.torch.load_file(tmp_path / "module"))
        assert_equal_modules(other, one)

    def test_strict_errors_name_the_keys(self, mod):
        model = nn.ModuleDict({"a": halved(mod)})
        for key in model.state_dict():
            state = model.state_dict()
            del state[key]
            if key != "a.version":  # what lacks it is of a float module
                with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
                    model.load_state_dict(state)
            wrong = {**model.state_dict(), key: torch.zeros(3, 3, dtype=torch.complex64)}
            with pytest.raises(RuntimeError, match=f"{key}: expected"):
                model.load_state_dict(wrong)
        with pytest.raises(RuntimeError, match='Unexpected key.*"a.other"'):
            model.load_state_dict({**model.state_dict(), "a.other": torch.zeros(1)})


class TestLife:
    @pytest.mark.parametrize("how", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
    def test_copies(self, mod, how):
        form = halved(mod)
        other = how(form)
        assert_equal_modules(other, form)
        assert next(other.buffers()).data_ptr() != next(form.buffers()).data_ptr()

    def test_casts_leave_the_weights(self, mod):
        form = halved(mod, torch.bfloat16)
        held = {key: widened(value) for key, value in form._buffers.items()}
        form.half()
        for key, value in form._buffers.items():
            assert value.dtype == torch.bfloat16
            assert_same(value, held[key])
        assert {one.dtype for one in form.parameters()} == {torch.float16}
        assert all(one.dtype == torch.float16 for one in tensors(form(torch.randn(4, 5).half())))

    def test_meta_and_back(self, mod):
        expected = halved(mod)
        form = copy.deepcopy(expected).to("meta")
        assert tensors(form(torch.randn(4, 5, device="meta")))[0].is_meta
        with pytest.warns(UserWarning, match="weight_ih.* is on the meta device"):
            form.load_state_dict(expected.state_dict())
        form.load_state_dict(expected.state_dict(), assign=True)
        assert_equal_modules(form, expected)

    def test_inference_mode_autocast_and_sharing(self, mod):
        form, x = halved(mod), torch.randn(4, 5)
        expected = tensors(form(x))
        with torch.inference_mode():
            assert_all_same(tensors(form(x)), expected)
        with torch.autocast("cpu", torch.bfloat16):
            results = tensors(form(x))
        assert_all_same(results, tensors(form(x.bfloat16())))
        assert all(tensor.is_shared() for tensor in form.share_memory().buffers())
        assert_all_same(tensors(form(x)), expected)

    def test_gradient_of_the_input(self, mod):
        form, grads = halved(mod), []
        for one in (form, mod):
            x = torch.linspace(-1, 1, 20).view(4, 5).requires_grad_()
            sum(result.square().sum() for result in tensors(one(x))).backward()
            grads.append(x.grad)
        assert decibels(*grads) > 55
        assert all(parameter.grad is None for parameter in form.parameters())

    def test_compile(self, mod):
        torch._dynamo.reset()  # it counts how often the forward of all these modules is compiled
        form = halved(mod)
        compiled = torch.compile(form, fullgraph=True, dynamic=True, backend="aot_eager")
        lead = (2,) if isinstance(mod, nn.RNNBase) else ()
        for rows in (4, 6, 3):
            x = torch.randn(rows, *lead, 5)
            assert_all_same(tensors(compiled(x)), tensors(form(x)))

    def test_export_and_trace(self, mod):
        form, x = halved(mod), torch.randn(4, 5)
        expected = tensors(form(x))
        assert_all_same(tensors(torch.export.export(form, (x,)).module()(x)), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_all_same(tensors(torch.jit.trace(form, x)(x)), expected)
