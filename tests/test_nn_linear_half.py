"""dynquant.nn.Linear16bit: its arithmetic, state, copies, moves, and what others read from it."""

import copy
import warnings

import pytest
import reference as ref
import torch
from compare import assert_equal_layers, assert_same, widened
from hypothesis import given
from hypothesis import strategies as st
from models import linear_of
from round_trips import COPIES, FORMATS
from torch import nn

import dynquant
from dynquant import QConfig
from dynquant.nn import Linear16bit

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
HALVES = (torch.float16, torch.bfloat16)


def halved(k=12, n=7, bias=True, dtype=torch.float32, half=torch.float16):
    return Linear16bit.from_float(nn.Linear(k, n, bias=bias).to(dtype), QConfig(dtype=half))


@given(
    m=st.integers(0, 5),
    n=st.integers(0, 9),
    k=st.integers(0, 40),
    bias=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    half=st.sampled_from(HALVES),
    seed=st.integers(0, 99),
)
def test_is_the_specification(m, n, k, bias, dtype, half, seed):
    torch.manual_seed(seed)
    linear = linear_of(n, k, bias, dtype)
    x = torch.randn(m, k, dtype=dtype)
    expected = ref.linear_half(
        widened(x),
        ref.round_to(widened(linear.weight), DTYPES[half]),
        widened(linear.bias) if bias else None,
        DTYPES[dtype],
    )
    layer = Linear16bit.from_float(linear, QConfig(dtype=half))
    assert_same(layer(x).float(), expected)
    assert_same(layer._buffers["weight_16bit"], linear.weight.detach().to(half))
    assert (layer.in_features, layer.out_features) == (k, n)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_copies_everything_of_the_float_module(dtype):
    linear = nn.Linear(3, 2).to(dtype)  # whose weight need not be converted
    layer = Linear16bit.from_float(linear, QConfig(dtype=dtype))
    linear.weight.data.zero_()
    linear.bias.data.zero_()
    assert (layer.weight != 0).all() and (layer.bias != 0).all()
    assert not layer.bias.requires_grad and not layer.training and linear.training


def test_repr():
    assert repr(halved(bias=False)) == (
        "Linear16bit(in_features=12, out_features=7, bias=False, dtype=torch.float16)"
    )


class TestWeightsBeyondTheDtype:
    def test_float16_saturates_and_warns(self):
        linear = nn.Linear(3, 2)
        linear.weight.data[:] = torch.tensor([[1e5, -7e4, 65504], [65519, 65520, -3e38]])
        with pytest.warns(UserWarning, match=r"reaches 3e\+38; torch.float16 ends at 6.55e\+04"):
            layer = Linear16bit.from_float(linear)
        expected = torch.tensor([[1, -1, 1], [1, 1, -1]]) * 65504.0
        assert_same(layer.weight.float().as_subclass(torch.Tensor), expected)

    def test_bfloat16_has_the_range(self):
        linear = nn.Linear(1, 2)
        linear.weight.data[:] = torch.tensor([[1e38], [torch.finfo(torch.float32).max]])
        with pytest.warns(UserWarning, match="torch.bfloat16 ends at"):
            layer = Linear16bit.from_float(linear, QConfig(dtype=torch.bfloat16))
        assert layer.weight.isfinite().all()
        linear.weight.data[1] = 3e38
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Linear16bit.from_float(linear, QConfig(dtype=torch.bfloat16))


class TestErrors:
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_weight_that_is_not_finite(self, bad):
        linear = nn.Linear(3, 2)
        linear.weight.data[1, 2] = bad
        with pytest.raises(ValueError, match="^weight holds NaN or Inf"):
            Linear16bit.from_float(linear)
        with pytest.raises(ValueError, match="^0.weight holds NaN or Inf"):
            dynquant.quantize_dynamic(nn.Sequential(linear), dtype=torch.float16)

    @pytest.mark.parametrize(
        ("linear", "config", "message"),
        [
            (nn.Linear(2, 2).double(), {}, "weight is torch.float64; allowed: torch.float32"),
            (nn.Linear(2, 2), {"dtype": torch.qint8}, "nn.Linear: dtype is torch.qint8; allowed"),
            (nn.Linear(2, 2), {"dynamic": False}, "'dynamic' is False"),
            (nn.LazyLinear(2), {}, "weight is not initialized"),
        ],
    )
    def test_from_float(self, linear, config, message):
        with pytest.raises(ValueError, match=message):
            Linear16bit.from_float(linear, QConfig(**{"dtype": torch.float16, **config}))

    def test_inputs(self):
        with pytest.raises(RuntimeError, match="x must have dtype .*, got float64"):
            halved()(torch.randn(2, 12, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="x must have K = 12"):
            halved()(torch.randn(2, 13))


def test_no_limit_to_the_depth():
    x = torch.ones(1, 70_000)
    layer = Linear16bit.from_float(nn.Linear(70_000, 1))
    torch.testing.assert_close(layer(x)[0, 0], layer.weight.float().sum() + layer.bias[0])


def test_gradient_of_the_input():
    layer = halved()
    x = torch.randn(3, 12, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer._buffers["weight_16bit"].float().sum(0).expand(3, -1))
    with torch.inference_mode():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_input(layout):
    layer = halved()
    parts = [torch.randn(rows, 12) for rows in (2, 5, 1)]
    nested = layer(torch.nested.nested_tensor(parts, layout=layout))
    for part, result in zip(parts, nested.unbind(), strict=True):
        assert_same(result, layer(part))


class TestStateDict:
    def test_holds_plain_tensors(self):
        state = halved().state_dict()
        assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
            "weight": (torch.float16, (7, 12)),
            "bias": (torch.float32, (7,)),
            "version": (torch.int64, ()),
        }
        assert all(type(value) is torch.Tensor for value in state.values())
        assert "bias" not in halved(bias=False).state_dict()

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("half", HALVES)
    def test_loads(self, bias, assign, half):
        layer, other = halved(bias=bias, half=half), halved(bias=bias)
        result = other.load_state_dict(layer.state_dict(), assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert_equal_layers(layer, other)

    @pytest.mark.parametrize("saved", FORMATS.values(), ids=FORMATS)
    def test_formats(self, saved):
        layer, other = halved(), halved()
        other.load_state_dict(saved(layer.state_dict()))
        assert_equal_layers(layer, other)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("weight", torch.zeros(7, 12), "0.weight: expected torch.float16 or torch.bfloat16"),
            ("weight", torch.zeros(7, 11).half(), r"0.weight: expected the shape \[7, 12\]"),
            ("bias", torch.zeros(6), r"0.bias: expected the shape \[7\]"),
            ("bias", None, "Missing key.*0.bias"),
            ("weight", None, "Missing key.*0.weight"),
            ("other", torch.zeros(1), "Unexpected key.*0.other"),
            ("version", torch.tensor(3), "0.version is 3; this dynquant reads 1 to 2"),
        ],
    )
    def test_errors_name_the_key(self, key, value, message):
        model = nn.Sequential(halved())
        before = copy.deepcopy(model)
        state = nn.Sequential(halved()).state_dict()
        state[f"0.{key}"] = value
        if value is None:
            del state[f"0.{key}"]
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state)
        if value is not None and key != "other":
            assert_equal_layers(model[0], before[0])

    def test_meta(self):
        layer = halved()
        with torch.device("meta"):
            other = halved()
        with pytest.warns(UserWarning, match="weight is on the meta device"):
            other.load_state_dict(layer.state_dict())
        other.load_state_dict(layer.state_dict(), assign=True)
        assert_equal_layers(layer, other)
        assert not any(tensor.is_meta for tensor in [*other.parameters(), *other.buffers()])


class TestCopiesAndMoves:
    @pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
    def test_copies(self, copied):
        layer = halved()
        other = copied(layer)
        assert_equal_layers(layer, other)
        assert other.weight.data_ptr() != layer.weight.data_ptr()

    @pytest.mark.parametrize("half", HALVES)
    @pytest.mark.parametrize("bias", [False, True])
    def test_casts_leave_the_weight(self, half, bias):
        layer = halved(half=half, bias=bias)
        before = copy.deepcopy(layer._buffers["weight_16bit"])
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            layer.to(dtype)
            assert_same(layer._buffers["weight_16bit"], before)
            assert next(layer.parameters()).dtype == dtype
            assert all(parameter.dtype == dtype for parameter in layer.parameters())
            assert layer(torch.randn(2, 12, dtype=dtype)).dtype == dtype

    def test_to_meta_and_shared_memory(self):
        layer = halved()
        layer.share_memory()
        assert layer._buffers["weight_16bit"].is_shared()
        assert layer.to("meta").weight.is_meta


def test_autocast():
    layer, x = halved(), torch.randn(3, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(layer(x), layer(x.bfloat16()))


class TestTracing:
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compile(self, dynamic):
        model = nn.Sequential(halved(), nn.ReLU(), halved(7, 5, bias=False)).eval()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for rows in (3, 4, 1):
            x = torch.randn(rows, 12)
            assert_same(compiled(x), model(x))

    def test_export(self):
        model = nn.Sequential(halved(), nn.ReLU(), halved(7, 5)).eval()
        rows = torch.export.Dim("rows", min=2, max=64)
        program = torch.export.export(model, (torch.randn(3, 12),), dynamic_shapes=[{0: rows}])
        x = torch.randn(9, 12)
        assert_same(program.module()(x), model(x))


def test_transformer_layer_does_not_take_its_fast_path():
    """Which would read .weight and multiply it as a float."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True).eval()
    quantized = dynquant.quantize_dynamic(layer, {nn.Linear}, dtype=torch.bfloat16)
    assert isinstance(quantized.linear1, Linear16bit)
    x = torch.randn(2, 5, 16)
    with torch.inference_mode():
        torch.testing.assert_close(quantized(x), layer(x), atol=0.05, rtol=0.05)


def test_first_names():
    for name in dynquant.nn.__all__:
        if name.endswith("16bit"):
            form = getattr(dynquant.nn, f"Half{name.removesuffix('16bit')}")
            assert form is getattr(dynquant.nn, name)
    with pytest.raises(AttributeError, match="has no attribute 'HalfEmbedding'"):
        dynquant.nn.HalfEmbedding  # noqa: B018 (it raises)
