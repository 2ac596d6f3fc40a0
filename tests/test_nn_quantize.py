"""Quantize and DeQuantize: the values given, the form remembered, and when it is forgotten."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import reference as ref
import torch
from compare import assert_same, assert_same_state
from hypothesis import given
from hypothesis import strategies as st
from round_trips import torch_saved
from torch import nn

import dynquant
from dynquant import DeQuantStub, QConfig, QuantStub
from dynquant.nn import DeQuantize, Linear, Quantize
from dynquant.nn.quantize import remembered

F = np.float32
SCHEMES = [
    QConfig(activation=a, symmetric=s) for a in ("per_token", "per_tensor") for s in (False, True)
]


def calibrated(low=-2.0, high=3.0, symmetric=False):
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    stub = QuantStub(qconfig={"activation": {"qscheme": scheme}})
    stub(torch.tensor([low, high]))
    return Quantize.from_float(stub)


def layers(count=1):
    return [Linear.from_float(nn.Linear(8, 4)) for _ in range(count)]


def dequantized(q, scale, zero_point, lead):
    if scale.shape == lead:
        scale, zero_point = scale[..., None], zero_point[..., None]
    return (q.astype(np.int32) - zero_point).astype(F) * scale


@given(
    shape=st.sampled_from([(8,), (1, 8), (3, 8), (2, 3, 8), (0, 8), (1, 1, 1)]),
    config=st.sampled_from(SCHEMES),
    special=st.sampled_from([None, torch.nan, torch.inf, 0.0]),
    seed=st.integers(0, 99),
)
def test_values(shape, config, special, seed):
    torch.manual_seed(seed)
    x = torch.randn(shape)
    if special is not None and x.numel():
        x.view(-1)[0] = special
    result = Quantize(config)(x)
    q, scale, zero_point = ref.quantize_activation(
        x.numpy(), config.activation == "per_token", config.symmetric
    )
    assert type(result) is torch.Tensor
    assert_same(result, dequantized(q, scale, zero_point, shape[:-1]))
    form = remembered(result)
    assert_same(form.q, q)
    assert_same(form.scale, scale)
    assert_same(form.zero_point, zero_point)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype):
    x = torch.randn(3, 8).to(dtype)
    result = Quantize()(x)
    form = remembered(result)
    values = (form.q.to(torch.int32) - form.zero_point[:, None]).float() * form.scale[:, None]
    assert_same(result, values.to(dtype))


def test_float64_is_refused():
    with pytest.raises((RuntimeError, TypeError, ValueError), match="(?i)float64|double"):
        Quantize()(torch.randn(2, 8, dtype=torch.float64))


@pytest.mark.parametrize("symmetric", [False, True])
def test_calibrated_values(symmetric):
    module = calibrated(symmetric=symmetric)
    x = torch.randn(2, 3, 8) * 3
    scale, zero_point = module.scale.numpy(), module.zero_point.numpy()
    q = ref.quantize_with(x.numpy(), scale, zero_point, symmetric)
    assert_same(module(x), dequantized(q, scale, zero_point, None))
    assert module(torch.full((1, 8), 1e30)).max() == module(torch.full((1, 8), 1e20)).max()


def test_calibrated_row_with_nan():
    module, (linear,) = calibrated(), layers()
    x = torch.randn(3, 8)
    expected = linear(module(x))
    x[1, 2] = torch.nan
    result = linear(module(x))
    assert result[1].isnan().all() and module(x)[1].isnan().all()
    assert_same(result[::2], expected[::2])
    assert module(x[1]).isnan().all()


class TestSharing:
    def test_linears_share_one_quantization(self, monkeypatch):
        x, linears = torch.randn(5, 8), layers(3)
        expected = [linear(x) for linear in linears]
        result = Quantize()(x)
        monkeypatch.setattr("dynquant.nn.linear._linear_dynamic", None)
        for linear, y in zip(linears, expected, strict=True):
            assert_same(linear(result), y)

    def test_calibrated(self):
        module, (linear,) = calibrated(), layers()
        x = torch.randn(5, 8)
        form = remembered(module(x))
        expected = ref.scaled_mm(
            form.q.numpy(),
            module.scale.numpy(),
            module.zero_point.numpy(),
            linear.weight.int_repr().numpy(),
            linear.weight_scale.numpy(),
            linear.bias.numpy(),
            "float32",
        )
        assert_same(linear(module(x)), expected)

    def test_other_operators_see_floats(self):
        result = Quantize()(torch.randn(5, 8))
        assert remembered(result) is not None
        for derived in (result + 1, result.view(-1), result[0], result.clone(), result.detach()):
            assert remembered(derived) is None
        assert nn.Linear(8, 2)(result).shape == (5, 2)

    def test_autocast(self):
        (linear,), x = layers(), torch.randn(5, 8)
        result = Quantize()(x)
        expected = linear(result).to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(linear(result), expected)

    def test_gradients(self):
        (linear,), x = layers(), torch.randn(5, 8, requires_grad=True)
        y = linear(Quantize()(x))
        y.sum().backward()
        torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(5, -1))
        assert_same(y.detach(), linear(x.detach()))

    def test_gradient_of_quantize_alone(self):
        x = torch.randn(3, requires_grad=True)
        (Quantize()(x) * 2).sum().backward()
        assert x.grad.tolist() == [2, 2, 2]


CHANGES = {
    "mul_": lambda t: t.mul_(2),
    "view": lambda t: t.view(-1)[3:4].fill_(9),
    "index": lambda t: t.__setitem__((0, 0), 9),
    "out": lambda t: torch.add(t, 1, out=t),
    "relu": lambda t: nn.functional.relu(t, inplace=True),
    "detach": lambda t: t.detach().add_(1),
    "transpose": lambda t: t.t().zero_(),
    "data": lambda t: setattr(t, "data", torch.randn(5, 8)),
    "outside": None,
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
class TestMemory:
    @pytest.mark.parametrize("change", CHANGES)
    def test_is_void_once_changed(self, mode, change):
        (linear,) = layers()
        with mode():
            result = Quantize()(torch.randn(5, 8))
            assert remembered(result) is not None
            if change != "outside":
                CHANGES[change](result)
        if change == "outside":
            result.mul_(2)
        assert remembered(result) is None
        with mode():
            assert_same(linear(result), linear(result.clone()))

    def test_is_used(self, mode, monkeypatch):
        (linear,) = layers()
        with mode():
            x = torch.randn(5, 8)
            expected, result = linear(x), Quantize()(x)
            monkeypatch.setattr("dynquant.nn.linear._linear_dynamic", None)
            assert_same(linear(result), expected)

    @pytest.mark.parametrize(
        "how", [copy.deepcopy, copy.copy, lambda t: pickle.loads(pickle.dumps(t))]
    )
    def test_copies_have_none(self, mode, how):
        with mode():
            result = Quantize()(torch.randn(5, 8))
            other = how(result)
            assert_same(other, result)
            assert remembered(other) is None and remembered(result) is not None

    def test_saves_as_a_plain_tensor(self, mode):
        with mode():
            result = Quantize()(torch.randn(5, 8))
        loaded = torch_saved({"result": result})["result"]
        assert_same(loaded, result)
        assert remembered(loaded) is None
        assert layers()[0](loaded).shape == (5, 4)


class TestDeQuantize:
    def test_forgets(self):
        result = Quantize()(torch.randn(5, 8))
        plain = DeQuantize()(result)
        assert remembered(plain) is None and remembered(result) is not None
        assert_same(plain, result)

    def test_passes_a_float_tensor_through(self):
        x = torch.randn(3)
        assert DeQuantize()(x) is x

    def test_gradient(self):
        x = torch.randn(3, requires_grad=True)
        DeQuantize()(Quantize()(x)).sum().backward()
        assert x.grad.tolist() == [1, 1, 1]


class Attention(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.quant = QuantStub(**arguments)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.dequant = DeQuantStub()

    def forward(self, x):
        x = self.quant(x)
        return self.dequant(
            nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))
        )


@pytest.fixture(params=["dynamic", "calibrated"])
def model(request):
    model = Attention(qconfig={"dynamic": request.param == "dynamic"})
    model(torch.randn(16, 8))
    return dynquant.quantize_dynamic(model)


class TestModel:
    """A model with stubs, through everything that traces or stores it."""

    x = torch.randn(1, 6, 8)

    def assert_close(self, other, model):
        # Compiled, the linears quantize the dequantized floats once more.
        torch.testing.assert_close(other(self.x), model(self.x), rtol=0, atol=2e-2)

    def test_compile(self, model):
        self.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager"), model)
        with torch.inference_mode():
            self.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager"), model)

    def test_compiled_part_takes_a_remembering_input(self, model):
        result = model.quant(self.x)
        compiled = torch.compile(model.q, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(result), model.q(result), rtol=0, atol=2e-2)

    def test_export(self, model):
        self.assert_close(torch.export.export(model, (self.x,)).module(), model)

    def test_trace(self, model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(model, self.x)
        for x in (self.x, torch.randn(2, 3, 8)):
            assert_same(traced(x), model(x))

    def test_copies(self, model):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same(other(self.x), model(self.x))

    @pytest.mark.parametrize("assign", [False, True])
    def test_state_dict_into_a_model_that_saw_nothing(self, model, assign):
        other = dynquant.quantize_dynamic(Attention(qconfig={}))
        other.load_state_dict(model.state_dict(), assign=assign)
        assert_same(other(self.x), model(self.x))

    def test_parameters_stay_fp32(self, model):
        expected = copy.deepcopy(dict(model.quant.named_buffers()))
        model.half()
        for name, value in model.quant.named_buffers():
            assert_same(value, expected[name])
        assert model(self.x.half()).dtype == torch.float16
        assert model.to("meta")(self.x.half().to("meta")).shape == self.x.shape


def test_a_dynamic_module_refuses_statistics():
    state = calibrated().state_dict()
    with pytest.raises(RuntimeError, match='Unexpected key.*"scale"'):
        Quantize({"dynamic": True}).load_state_dict(state)
    with pytest.raises(RuntimeError, match='Unexpected key.*"scale"'):
        Quantize().load_state_dict({"scale": state["scale"]})
    with pytest.raises(RuntimeError, match='Missing key.*"scale"'):
        calibrated().load_state_dict({})
    with pytest.raises(RuntimeError, match=r"scale: expected the shape \[1\], found \[2\]"):
        Quantize().load_state_dict({**state, "scale": torch.ones(2)})
    with pytest.raises(RuntimeError, match="zero_point: expected torch.int32, found torch.float32"):
        Quantize().load_state_dict({**state, "zero_point": torch.ones(1)})
    for key in state:  # strict or not, statistics of two modules are never mixed
        module = calibrated()
        with pytest.raises(RuntimeError, match=f"{key} alone: scale and zero_point come together"):
            module.load_state_dict({key: 2 * state[key]}, strict=False)
        assert_same_state(module.state_dict(), state)
