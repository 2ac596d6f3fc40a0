"""dynquant.nn.Linear: its arithmetic, state, copies, moves, and what others read from it."""

import copy
import pickle

import pytest
import reference as ref
import safetensors.torch
import torch
from compare import assert_equal_layers, assert_same
from hypothesis import given
from hypothesis import strategies as st
from models import linear_of
from round_trips import COPIES, torch_saved, traced_and_saved
from torch import nn

import dynquant
from dynquant import QConfig
from dynquant.nn import Linear

CONFIGS = [
    QConfig(weight, activation, symmetric)
    for weight in ("per_channel", "per_tensor")
    for activation in ("per_token", "per_tensor")
    for symmetric in (False, True)
]
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def quantized(k=12, n=7, bias=True, dtype=torch.float32, qconfig=None):
    return Linear.from_float(nn.Linear(k, n, bias=bias).to(dtype), qconfig)


@given(
    m=st.integers(0, 5),
    n=st.integers(0, 9),
    k=st.integers(0, 20),
    bias=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    config=st.sampled_from(CONFIGS),
    seed=st.integers(0, 99),
)
def test_is_the_specification(m, n, k, bias, dtype, config, seed):
    torch.manual_seed(seed)
    linear = linear_of(n, k, bias, dtype)
    x = torch.randn(m, k, dtype=dtype)
    weight, scale = ref.quantize_weight(
        linear.weight.detach().float().numpy(), config.weight == "per_channel"
    )
    expected = ref.linear_dynamic(
        x.float().numpy(),
        weight,
        scale,
        None if linear.bias is None else linear.bias.detach().float().numpy(),
        config.activation == "per_token",
        config.symmetric,
        DTYPES[dtype],
    )
    layer = Linear.from_float(linear, config)
    assert_same(layer(x).float(), expected)
    assert_same(layer.weight.int_repr(), weight)
    assert_same(layer.weight_scale, scale)
    assert (layer.in_features, layer.out_features) == (k, n)


def test_copies_nothing_of_the_float_module_and_changes_nothing():
    linear = nn.Linear(3, 2)
    layer = Linear.from_float(linear)
    linear.bias.data.zero_()
    assert (layer.bias != 0).all() and not layer.bias.requires_grad and linear.bias.requires_grad
    assert not layer.training and linear.training


def test_repr():
    assert repr(quantized(qconfig=QConfig("per_tensor", symmetric=True))) == (
        "Linear(in_features=12, out_features=7, bias=True, weight=per_tensor, "
        "activation=per_token, symmetric=True)"
    )


def test_float64_input_is_refused():
    with pytest.raises((RuntimeError, TypeError, ValueError), match="(?i)float64|double"):
        quantized()(torch.randn(2, 12, dtype=torch.float64))


def test_wrong_width_is_refused():
    with pytest.raises((RuntimeError, ValueError)):
        quantized()(torch.randn(2, 13))


def test_gradient_of_the_input():
    layer = quantized()
    x = torch.randn(3, 12, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1))


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_input(layout):
    layer = quantized()
    parts = [torch.randn(rows, 12) for rows in (2, 5, 1)]
    nested = layer(torch.nested.nested_tensor(parts, layout=layout))
    assert nested.is_nested and nested.layout == layout
    for part, result in zip(parts, nested.unbind(), strict=True):
        assert_same(result, layer(part))


class TestFromIntegers:
    """Layers of integers and scales from elsewhere."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize(("count", "bias"), [(7, True), (1, False)])
    def test_bits(self, count, bias, dtype, isa):
        torch.manual_seed(0)
        integers = torch.randint(-128, 128, (7, 12), dtype=torch.int8)
        integers[0] = -128
        scale = torch.rand(count, 1).to(dtype) + 0.1
        bias = torch.randn(7) if bias else None
        layer = Linear.from_integers(integers, scale, bias, QConfig(symmetric=True), dtype)
        assert_same(layer.weight.int_repr(), integers)
        assert layer.weight.dtype == dtype and layer.weight.shape == (7, 12)
        assert_same(layer.weight_scale, scale.float().flatten())
        x = torch.randn(5, 12)
        wanted_bias = None if bias is None else bias.numpy()
        scale = scale.float().flatten().numpy()
        expected = ref.linear_dynamic(
            x.numpy(), integers.numpy(), scale, wanted_bias, True, True, "float32"
        )
        assert_same(layer(x), expected)
        again = Linear.from_float(nn.Linear(12, 7, bias is not None).to(dtype))
        again.load_state_dict(layer.state_dict())
        assert_same(again.weight.int_repr(), integers)

    @pytest.mark.parametrize(
        ("integers", "scale", "message"),
        [
            (torch.zeros(7, 12), torch.ones(7), "weight_int8: expected torch.int8"),
            (torch.zeros(7, 12, dtype=torch.int8), torch.ones(6), r"expected the shape \[7\]"),
            (torch.zeros(7, 12, dtype=torch.int8), torch.zeros(7), "positive and finite"),
        ],
    )
    def test_refused(self, integers, scale, message):
        with pytest.raises(RuntimeError, match=message):
            Linear.from_integers(integers, scale)


class TestStateDict:
    def test_holds_plain_tensors(self):
        state = quantized().state_dict()
        assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
            "weight_int8": (torch.int8, (7, 12)),
            "weight_scale": (torch.float32, (7,)),
            "bias": (torch.float32, (7,)),
            "version": (torch.int64, ()),
        }
        assert all(type(value) is torch.Tensor for value in state.values())
        assert "bias" not in quantized(bias=False).state_dict()
        assert quantized().state_dict(keep_vars=True)["bias"].__class__ is nn.Parameter

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("config", [QConfig(), QConfig("per_tensor")])
    def test_loads(self, bias, assign, config):
        layer, other = (quantized(bias=bias, qconfig=config) for _ in range(2))
        result = other.load_state_dict(layer.state_dict(), assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert_equal_layers(other, layer)

    @pytest.mark.parametrize("assign", [False, True])
    def test_loads_another_weight_scheme(self, assign):
        layer, other = quantized(qconfig=QConfig("per_tensor")), quantized()
        other.load_state_dict(layer.state_dict(), assign=assign)
        assert_equal_layers(other, layer)

    def test_bias_keeps_its_dtype_unless_assigned(self):
        state = quantized(dtype=torch.bfloat16).state_dict()
        other = quantized()
        other.load_state_dict(state)
        assert other.bias.dtype == torch.float32
        other.load_state_dict(state, assign=True)
        assert other.bias.dtype == torch.bfloat16 and not other.bias.requires_grad

    def test_torch_save_with_weights_only(self):
        layer, other = quantized(), quantized()
        other.load_state_dict(torch_saved(layer.state_dict(), weights_only=True))
        assert_equal_layers(other, layer)

    def test_safetensors(self, tmp_path):
        layer, other = quantized(), quantized()
        safetensors.torch.save_file(layer.state_dict(), tmp_path / "layer")
        other.load_state_dict(safetensors.torch.load_file(tmp_path / "layer"))
        assert_equal_layers(other, layer)

    def test_safetensors_of_a_model(self, tmp_path):
        model, other = (nn.Sequential(quantized(), nn.ReLU(), quantized(7)) for _ in range(2))
        safetensors.torch.save_model(model, tmp_path / "model")
        safetensors.torch.load_model(other, tmp_path / "model")
        assert_equal_layers(other[2], model[2])

    @pytest.mark.parametrize("key", ["weight_int8", "weight_scale", "bias", "version"])
    def test_missing_key(self, key):
        layer, other = nn.Sequential(quantized()), nn.Sequential(quantized())
        state = layer.state_dict()
        del state[f"0.{key}"]
        with pytest.raises(RuntimeError, match=f'Missing key.*"0.{key}"'):
            other.load_state_dict(state)
        if key.startswith("weight"):
            before = copy.deepcopy(other)
            with pytest.raises(RuntimeError, match=f"without 0.{key}: both are loaded, or neither"):
                other.load_state_dict(state, strict=False)
            assert_equal_layers(other[0], before[0])
        else:
            assert other.load_state_dict(state, strict=False).missing_keys == [f"0.{key}"]

    @pytest.mark.parametrize("key", ["packed", "scale", "bias", "weight.x"])
    def test_unexpected_key(self, key):
        model = nn.Sequential(quantized(bias=False))
        state = {**model.state_dict(), f"0.{key}": torch.zeros(7)}
        with pytest.raises(RuntimeError, match=f'Unexpected key.*"0.{key}"'):
            model.load_state_dict(state)
        assert model.load_state_dict(state, strict=False).unexpected_keys == [f"0.{key}"]

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("weight", torch.zeros(7, 12), "0.weight is torch.float32, but 0.weight_int8 is"),
            (
                "weight_int8",
                torch.zeros(7, 12, dtype=torch.int16),
                "0.weight_int8: expected torch.int8, found torch.int16",
            ),
            (
                "weight_int8",
                torch.zeros(7, 11, dtype=torch.int8),
                r"0.weight_int8: expected the shape \[7, 12\], found \[7, 11\]",
            ),
            ("weight_int8", [1], "0.weight_int8: expected a tensor, found list"),
            ("weight_scale", torch.ones(7).half(), "0.weight_scale: expected torch.float32, found"),
            ("weight_scale", torch.ones(6), r"0.weight_scale: expected the shape \[7\] or \[1\]"),
            ("bias", torch.zeros(8), r"0.bias: expected the shape \[7\], found \[8\]"),
            ("bias", torch.zeros(7, dtype=torch.int8), "0.bias: expected torch.float32 or"),
            ("version", torch.tensor(3), "0.version is 3; this dynquant reads 1 to 2"),
            ("version", torch.tensor(0), "0.version is 0"),
            ("version", torch.tensor(1.0), "0.version: expected torch.int64 or .* found"),
            ("version", torch.tensor([1]), r"0.version: expected the shape \[\], found \[1\]"),
        ],
    )
    def test_wrong_entry(self, key, value, message):
        model = nn.Sequential(quantized())
        before = {key: value.clone() for key, value in model.state_dict().items()}
        state = {**nn.Sequential(quantized()).state_dict(), f"0.{key}": value}
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state)
        for name, held in model.state_dict().items():
            assert_same(held, before[name])

    @pytest.mark.parametrize("config", [QConfig(), QConfig("per_tensor")])
    def test_minus_128_is_kept(self, config):
        layer = quantized(qconfig=config)
        state = layer.state_dict()
        state["weight_int8"][2, 3] = -128
        layer.load_state_dict(state)
        assert_same(layer.weight.int_repr(), state["weight_int8"])
        assert_same(layer.weight_scale, state["weight_scale"])

    def test_ties_are_kept(self):
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        second.weight = first.weight
        model = dynquant.quantize_dynamic(nn.Sequential(first, second))
        other = dynquant.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        model.load_state_dict(model.state_dict())
        assert model[0].packed is model[1].packed
        other.load_state_dict(model.state_dict())
        x = torch.randn(2, 4)
        assert_same(other(x), model(x))

    def test_load_pre_hooks_run(self):
        layer, seen = quantized(), []
        layer.register_load_state_dict_pre_hook(lambda module, state, *args: seen.append(module))
        layer.load_state_dict(layer.state_dict())
        assert seen == [layer]

    def test_a_meta_module_says_that_nothing_was_loaded(self):
        layer = quantized().to("meta")
        with pytest.warns(UserWarning, match="pass assign=True"):
            layer.load_state_dict(quantized().state_dict())
        assert layer.packed.is_meta


class TestCopies:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
    def test_equal(self, copied, bias):
        layer = quantized(bias=bias)
        assert_equal_layers(copied(layer), layer)
        other = copied(layer)
        assert other.packed.data_ptr() != layer.packed.data_ptr()
        assert next(other.parameters()).dtype == torch.float32

    def test_deepcopy_keeps_ties(self):
        layer = quantized()
        model = nn.ModuleList([layer, layer, Linear.from_float(nn.Linear(12, 7), tied_to=layer)])
        other = copy.deepcopy(model)
        assert other[0] is other[1] is not layer
        assert other[0].packed is other[2].packed is not layer.packed

    def test_pickles_hold_no_packed_weight(self):
        state = quantized().__getstate__()
        assert "packed" not in state["_buffers"]
        assert state["_entries"]["weight"]["weight_int8"].shape == (7, 12)

    def test_attributes_survive(self):
        layer = quantized()
        layer.tag = "x"
        assert {copied(layer).tag for copied in COPIES.values()} == {"x"}


class TestMoves:
    @pytest.mark.parametrize(
        "move",
        [
            lambda layer: layer.half(),
            lambda layer: layer.to(torch.float16),
            lambda layer: layer.to("cpu", torch.float16),
            lambda layer: layer.to(torch.zeros(1).half()),
            lambda layer: layer.type(torch.float16),
        ],
    )
    @pytest.mark.parametrize("bias", [False, True])
    def test_casting_leaves_weight_and_scale(self, move, bias):
        layer = quantized(bias=bias)
        packed, scale = layer.packed, layer.weight_scale
        assert move(layer) is layer
        assert layer.packed is packed and layer.weight_scale is scale
        assert next(layer.parameters()).dtype == torch.float16
        assert layer(torch.randn(2, 12).half()).dtype == torch.float16

    def test_double_and_back(self):
        layer = quantized()
        expected = layer.weight_scale.clone()
        assert_same(layer.double().float().weight_scale, expected)

    def test_meta(self):
        layer = quantized().to("meta")
        assert all(tensor.is_meta for tensor in layer.state_dict().values() if tensor.dim())
        assert layer.weight.shape == (7, 12) and layer.weight.is_meta
        assert layer(torch.randn(2, 12, device="meta")).shape == (2, 7)

    def test_to_empty_and_load(self):
        expected = quantized()
        layer = copy.deepcopy(expected).to("meta").to_empty(device="cpu")
        layer.load_state_dict(expected.state_dict())
        assert_equal_layers(layer, expected)
        layer.to_empty(device="cpu").load_state_dict(expected.state_dict())
        assert_equal_layers(layer, expected)

    def test_share_memory(self):
        layer = quantized()
        expected = copy.deepcopy(layer)
        assert all(tensor.is_shared() for tensor in layer.share_memory().buffers())
        assert_equal_layers(layer, expected)


class TestWeight:
    def test_reads_as_the_dequantized_values(self):
        layer = quantized(dtype=torch.bfloat16)
        weight, integers = layer.weight, layer.state_dict()["weight_int8"]
        expected = (integers.float() * layer.weight_scale[:, None]).bfloat16()
        assert isinstance(weight, torch.Tensor)
        assert (weight.shape, weight.dtype, weight.device) == (
            (7, 12),
            torch.bfloat16,
            expected.device,
        )
        assert not weight.requires_grad and weight.size(1) == 12 and weight.numel() == 84
        assert_same(weight.int_repr(), integers)
        for one, other in [
            (weight + 0, expected),
            (weight.T + 0, expected.T),
            (weight[2] + 0, expected[2]),
            (weight.to(torch.float64), expected.double()),
            (torch.from_numpy(weight.float().numpy()), integers * layer.weight_scale[:, None]),
            (copy.deepcopy(weight), expected),
            (weight.clone(), expected),
            (pickle.loads(pickle.dumps(weight)), expected),
            (torch.tensor(weight.tolist()).bfloat16(), expected),
        ]:
            assert type(one) is torch.Tensor
            assert_same(one, other)
        assert repr(weight) == repr(expected)

    def test_looking_at_it_unpacks_nothing(self, monkeypatch):
        layer = quantized()
        monkeypatch.delattr(torch.ops.dynquant, "unpack_weight", raising=False)
        monkeypatch.setattr(torch.ops.dynquant, "unpack_weight", None)
        weight = layer.weight
        assert weight.shape == (7, 12) and weight.device.type == "cpu" and not weight.is_nested
        assert torch.overrides.has_torch_function((weight,))

    @pytest.mark.parametrize(
        "write",
        [
            lambda weight: weight.zero_(),
            lambda weight: weight.__setitem__(0, 1),
            lambda weight: torch.add(weight, 1, out=weight),
            lambda weight: nn.init.zeros_(weight),
        ],
    )
    @pytest.mark.parametrize("inference", [False, True])
    def test_cannot_be_written_to(self, write, inference):
        with torch.inference_mode(inference), pytest.raises(RuntimeError, match="cannot be writ"):
            write(quantized().weight)

    @pytest.mark.parametrize("config", [QConfig(), QConfig("per_tensor")])
    @pytest.mark.parametrize("inference", [False, True])
    def test_a_float_weight_that_is_assigned_is_quantized(self, config, inference):
        layer, linear = quantized(qconfig=config), nn.Linear(12, 7)
        with torch.inference_mode(inference):
            layer.weight = linear.weight
        linear.bias = nn.Parameter(layer.bias.detach())
        assert_equal_layers(layer, Linear.from_float(linear, config))
        assert "weight" not in layer._parameters

    @pytest.mark.parametrize(
        ("value", "error", "message"),
        [
            (torch.zeros(7, 12, dtype=torch.int8), TypeError, "a float tensor can be assigned"),
            (None, TypeError, "a float tensor can be assigned"),
            (torch.zeros(12, 7), ValueError, r"float32 \[12, 7\]; allowed: .* \[7, 12\]"),
            (torch.zeros(7, 12).double(), ValueError, "weight is torch.float64"),
            (torch.full((7, 12), torch.inf), ValueError, "weight holds NaN or Inf"),
        ],
    )
    def test_wrong_assignment(self, value, error, message):
        layer = quantized()
        before = layer.weight + 0
        with pytest.raises(error, match=message):
            layer.weight = value
        assert_same(layer.weight + 0, before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
class TestTransformerEncoder:
    """Its fast path looks at linear1.weight, and would run float kernels on it."""

    @pytest.fixture
    def encoder(self):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        return nn.TransformerEncoder(layer, 2).eval()

    @pytest.fixture
    def inputs(self):
        padding = torch.zeros(3, 7, dtype=torch.bool)
        padding[1, 5:] = padding[2, 3:] = True
        return torch.randn(3, 7, 32), padding

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("spec", [None, ["layers.0"], ["layers.1"], ["layers.*.linear2"]])
    def test_runs_quantized(self, encoder, inputs, spec, padded, mode, monkeypatch):
        x, padding = inputs
        padding = padding if padded else torch.zeros_like(padding)
        quantized = dynquant.quantize_dynamic(encoder, spec)
        layers = [module for module in quantized.modules() if isinstance(module, Linear)]
        ran = []
        forward = Linear.forward
        one_by_one = lambda linears, x: [linear(x) for linear in linears]  # noqa: E731
        monkeypatch.setattr("dynquant.nn.attention.outputs_of", one_by_one)
        monkeypatch.setattr(Linear, "forward", lambda self, x: ran.append(self) or forward(self, x))
        mask = {"src_key_padding_mask": padding} if padded else {}
        with mode():
            result, expected = quantized(x, **mask), encoder(x, **mask)
        assert set(layers) == set(ran)
        difference = (result - expected)[~padding].abs().max()
        assert 0 < difference < 0.1

    def test_looks_without_unpacking(self, encoder, inputs, monkeypatch):
        quantized = dynquant.quantize_dynamic(encoder)
        monkeypatch.setattr(torch.ops.dynquant, "unpack_weight", None)
        with torch.no_grad():
            quantized(inputs[0], src_key_padding_mask=inputs[1])

    def test_compiles(self, encoder, inputs):
        quantized = dynquant.quantize_dynamic(encoder)
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            result = compiled(inputs[0], src_key_padding_mask=inputs[1])
            expected = quantized(inputs[0], src_key_padding_mask=inputs[1])
        torch.testing.assert_close(result, expected)

    def test_exports(self, encoder, inputs):
        quantized = dynquant.quantize_dynamic(encoder)
        with torch.no_grad():
            program = torch.export.export(quantized, (inputs[0],))
        ops = [str(node.target) for node in program.graph.nodes if "dynquant" in str(node.target)]
        names = [op.split(".")[1] for op in ops]
        assert names == 2 * [
            "quantize_activation",
            *3 * ["scaled_mm"],
            *3 * ["linear_dynamic"],
        ]
        torch.testing.assert_close(program.module()(inputs[0]), quantized(inputs[0]))

    def test_decoder_and_whole_transformer(self):
        model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True).eval()
        quantized = dynquant.quantize_dynamic(model)
        x = torch.randn(2, 3, 16)
        torch.testing.assert_close(quantized(x, x), model(x, x), rtol=0, atol=0.2)


class TestTracing:
    @pytest.mark.parametrize("bias", [False, True])
    def test_compile(self, bias):
        layer, x = quantized(bias=bias), torch.randn(3, 12)
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        assert_same(torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x))
        calls = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
        assert [str(node.target) for node in calls] == ["dynquant.linear_dynamic.inference"]

    def test_compile_with_dynamic_rows(self):
        layer = quantized()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (3, 5, 1):
            x = torch.randn(rows, 12)
            assert_same(compiled(x), layer(x))

    def test_export(self):
        layer, x = quantized(), torch.randn(3, 12)
        program = torch.export.export(layer, (x,))
        assert_same(program.module()(x), layer(x))

    def test_trace(self):
        layer, x = quantized(), torch.randn(3, 12)
        assert_same(traced_and_saved(layer, x)(x), layer(x))
