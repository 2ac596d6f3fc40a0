"""dynquant.nn.Conv1d and ConvTranspose1d: what they compute, when they are made, their state,
copies and what reads them."""

import copy

import pytest
import torch
from compare import assert_same, assert_same_state
from round_trips import COPIES, safetensors_saved, traced_and_saved
from torch import nn

import dynquant
from dynquant import QConfig
from dynquant.nn import Conv1d, ConvTranspose1d, Linear

FORMS = {
    "plain": {"kernel_size": 3},
    "of one position": {"kernel_size": 1},
    "stride": {"kernel_size": 5, "stride": 3, "padding": 2},
    "dilation": {"kernel_size": 3, "dilation": 4, "padding": 1, "bias": False},
    "same": {"kernel_size": 4, "padding": "same"},
    "valid": {"kernel_size": 2, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 3, "padding_mode": "reflect"},
    "replicate": {"kernel_size": 3, "padding": "same", "padding_mode": "replicate", "dilation": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
}
TRANSPOSED = {
    "transposed": {"kernel_size": 4, "stride": 2, "padding": 1},
    "transposed, of one position": {"kernel_size": 1},
    "transposed, uneven": {"kernel_size": 7, "stride": 3, "output_padding": 2, "bias": False},
    "transposed, sparse": {"kernel_size": 2, "stride": 5, "padding": 2, "output_padding": 4},
    "transposed, cut": {"kernel_size": 3, "stride": 2, "padding": 5},
    "transposed, groups": {"kernel_size": 5, "stride": 2, "padding": 2, "groups": 2},
}
ALL_FORMS = [*FORMS, *TRANSPOSED]
SOME_FORMS = ["plain", "groups", "transposed", "transposed, groups"]
CONFIGS = {
    "default": QConfig(),
    "16 bits": QConfig(activation_bits=16),
    "per_tensor": QConfig("per_tensor", "per_tensor", True),
}


def conv_of(form="plain", c=8, dtype=torch.float32):
    torch.manual_seed(0)
    kind, sizes = (nn.Conv1d, FORMS) if form in FORMS else (nn.ConvTranspose1d, TRANSPOSED)
    n = 64 if "groups" in form else 6
    return kind(c, n, **sizes[form]).to(dtype)


def quantized(form="plain", qconfig=None, **sizes):
    conv = conv_of(form, **sizes)
    return (Conv1d if form in FORMS else ConvTranspose1d).from_float(conv, qconfig)


def linear_of(rows, bias, config):
    """The quantized linear layer with that weight."""
    linear = nn.Linear(rows.shape[1], rows.shape[0], bias is not None).to(rows.dtype)
    linear.weight.data = rows.detach().clone()
    if bias is not None:
        linear.bias.data = bias.detach().clone()
    return Linear.from_float(linear, CONFIGS[config])


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_is_a_linear_layer_on_what_the_kernel_sees(form, config, dtype):
    conv = conv_of(form, dtype=dtype)
    layer = Conv1d.from_float(conv, CONFIGS[config])
    x = torch.randn(2, 8, 41).to(dtype)
    both = conv._reversed_padding_repeated_twice
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = nn.functional.pad(x, both, mode)
    taps, step = conv.kernel_size[0], conv.dilation[0]
    positions = torch.arange(0, padded.shape[2] - step * (taps - 1), conv.stride[0])
    seen = padded[:, :, positions[:, None] + step * torch.arange(taps)]
    weights, seen = conv.weight.chunk(conv.groups), seen.chunk(conv.groups, 1)
    biases = [None] * conv.groups if conv.bias is None else conv.bias.chunk(conv.groups)
    expected = [
        linear_of(weight.transpose(1, 2).flatten(1), bias, config)(
            rows.permute(0, 2, 3, 1).flatten(2)
        )
        for weight, rows, bias in zip(weights, seen, biases, strict=True)
    ]
    y = layer(x)
    assert y.shape == conv(x).shape and y.dtype == dtype
    check(y, torch.cat(expected, -1).mT, conv(x), config)
    assert_same(layer(x[0]), y[0] if config != "per_tensor" else layer(x[:1])[0])


def check(y, expected, of_floats, config):
    if config == "per_tensor":  # the windows may leave some of x out, so that its range is another
        torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)
    else:
        assert_same(y, expected)
    torch.testing.assert_close(y, of_floats, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", TRANSPOSED)
def test_is_a_linear_layer_on_what_each_output_comes_from(form, config, dtype):
    conv = conv_of(form, dtype=dtype)
    layer = ConvTranspose1d.from_float(conv, CONFIGS[config])
    x = torch.randn(2, 8, 21).to(dtype)
    y, of_floats = layer(x), conv(x)
    assert y.shape == of_floats.shape and y.dtype == dtype and y.is_contiguous()
    stride, taps = conv.stride[0], -(-conv.kernel_size[0] // conv.stride[0])
    q = torch.arange(y.shape[2]) + conv.padding[0]
    blank = nn.functional.pad(x, (taps, taps + conv.padding[0] + stride))
    inputs = torch.stack([blank[:, :, taps + q // stride - j] for j in range(taps)], -1)
    weight = nn.functional.pad(conv.weight, (0, taps * stride - conv.kernel_size[0]))
    expected = torch.empty_like(y)
    each = y.shape[1] // conv.groups
    for group, (seen, own) in enumerate(
        zip(inputs.chunk(conv.groups, 1), weight.chunk(conv.groups), strict=True)
    ):
        channels = slice(group * each, group * each + each)
        bias = None if conv.bias is None else conv.bias[channels]
        for phase in range(stride):
            rows = own[:, :, phase::stride].permute(1, 2, 0).flatten(1)
            here = q % stride == phase
            of_phase = linear_of(rows, bias, config)(
                seen[:, :, here].permute(0, 2, 3, 1).flatten(2)
            )
            expected[:, channels, here] = of_phase.mT
    check(y, expected, of_floats, config)
    assert_same(layer(x[0]), y[0] if config != "per_tensor" else layer(x[:1])[0])


class TestOutputSize:
    def test_chooses_among_the_possible_ones(self):
        conv, x = conv_of("transposed, uneven"), torch.randn(2, 8, 9)
        layer = ConvTranspose1d.from_float(conv)
        for size in (31, 32, 33):
            for given in ([size], [2, 6, size]):
                assert layer(x, output_size=given).shape == conv(x, output_size=given).shape
            assert_same(layer(x, [size]), layer(x)[..., :size])
        assert layer(x[0], [6, 31]).shape == (6, 31)
        for conv_or_layer in (conv, layer):
            with pytest.raises(ValueError, match="requested an output size of"):
                conv_or_layer(x, [34])
        layer.output_padding = (3,)
        with pytest.raises(RuntimeError, match="output_padding must be smaller than stride, 3, g"):
            layer(x)

    def test_nothing_left(self):
        layer = quantized("transposed, cut")
        assert layer(torch.randn(1, 8, 5)).shape == (1, 6, 1)
        for length, size in ((4, -1), (0, -9)):
            match = f"input is too short: of {length} positions the result would have {size}"
            with pytest.raises(RuntimeError, match=match):
                layer(torch.randn(1, 8, length))
        for shape in ((), (8,), (1, 2, 8, 5)):
            with pytest.raises(RuntimeError, match=r"input must have the shape \[B, C, L\] or"):
                layer(torch.randn(shape))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.proj = nn.Linear(20, 20)

    def forward(self, x):
        return self.proj(self.depthwise(self.conv(x)))


class TestIsMade:
    """Where a convolution is asked for by itself, and nowhere else."""

    @pytest.mark.parametrize(
        "spec",
        [
            [nn.Conv1d],
            ["0.conv"],
            ["*.conv"],
            ["*conv"],
            ["*conv*"],
            ["0.c*"],
            {nn.Conv1d: QConfig(), nn.Linear: None},
            [nn.Linear, nn.Conv1d],
            [nn.Module, nn.Conv1d],
            ["", nn.Conv1d],
            ["0", "0.conv"],
        ],
        ids=str,
    )
    @pytest.mark.filterwarnings("ignore:left in float")
    def test_where_it_is_asked_for(self, spec):
        model = dynquant.quantize_dynamic(nn.Sequential(Block()), spec)
        assert type(model[0].conv) is Conv1d and type(model[0].depthwise) is nn.Conv1d
        model(torch.randn(2, 8, 20))

    @pytest.mark.filterwarnings("error")
    def test_transposed_ones_have_a_type_of_their_own(self):
        model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3), nn.Linear(8, 300))
        for spec in (None, [nn.Conv1d], [nn.ConvTranspose1d], [nn.Conv1d, nn.ConvTranspose1d]):
            made = dynquant.quantize_dynamic(model, spec)
            asked = spec or []
            assert type(made[0]) is (Conv1d if nn.Conv1d in asked else nn.Conv1d)
            is_asked = nn.ConvTranspose1d in asked
            assert type(made[1]) is (ConvTranspose1d if is_asked else nn.ConvTranspose1d)

    @pytest.mark.parametrize(
        "spec",
        [None, [nn.Linear], [nn.Module], [Block], ["0"], ["*"], ["0.*"]]
        + [{"0": None, nn.Conv1d: QConfig()}, {nn.Conv1d: None, "0": QConfig()}],
        ids=str,
    )
    @pytest.mark.filterwarnings("error")
    def test_where_it_is_not(self, spec):
        model = nn.Sequential(Block(), nn.Linear(20, 500))
        model = dynquant.quantize_dynamic(model, spec)
        assert type(model[0].conv) is nn.Conv1d

    @pytest.mark.filterwarnings("ignore:left in float")
    def test_the_most_specific_entry_says_how(self):
        spec = {"0": QConfig(activation_bits=16), nn.Conv1d: QConfig()}
        model = dynquant.quantize_dynamic(nn.Sequential(Block()), spec)
        assert model[0].conv.activation_bits == 16

    def test_of_small_groups_is_left_with_a_warning(self):
        model = nn.Sequential(Block())
        with pytest.warns(UserWarning, match=r"left in float: 0.depthwise \(Conv1d\) has 8 groups"):
            dynquant.quantize_dynamic(model, [nn.Conv1d])
        with pytest.raises(ValueError, match="0.depthwise has 8 groups of 1 rows; groups of 32"):
            Conv1d.check_float(model[0].depthwise, QConfig(), "0.depthwise")
        assert Conv1d.unlike(nn.Conv1d(8, 64, 3, groups=2)) is None
        assert "2 groups of 31" in Conv1d.unlike(nn.Conv1d(8, 62, 3, groups=2))
        assert ConvTranspose1d.unlike(nn.ConvTranspose1d(8, 8, 3, 8, groups=2)) is None
        assert "2 groups of 28" in ConvTranspose1d.unlike(nn.ConvTranspose1d(8, 8, 3, 7, groups=2))

    def test_transposed_with_a_dilation_is_left_with_a_warning(self):
        model = nn.Sequential(nn.ConvTranspose1d(4, 4, 3, dilation=2))
        with pytest.warns(UserWarning, match="has the dilation 2; that of 1 has a quantized form"):
            made = dynquant.quantize_dynamic(model, [nn.ConvTranspose1d])
        assert type(made[0]) is nn.ConvTranspose1d

    def test_with_a_forward_of_its_own_is_left_with_a_warning(self):
        class Causal(nn.Conv1d):
            def _conv_forward(self, x, weight, bias):
                return super()._conv_forward(nn.functional.pad(x, (2, 0)), weight, bias)

        with pytest.warns(UserWarning, match="has a _conv_forward other than Conv1d's"):
            model = dynquant.quantize_dynamic(nn.Sequential(Causal(4, 4, 3)), [nn.Conv1d])
        assert type(model[0]) is Causal

    @pytest.mark.parametrize("spec", [["0"], [nn.Sequential], ["*"]], ids=str)
    def test_what_covers_nothing_but_convolutions_is_told_so(self, spec):
        model = nn.Sequential(nn.Sequential(nn.Conv1d(4, 4, 3)))
        with pytest.warns(UserWarning, match=r"own name quantizes Conv1d or Conv"):
            dynquant.quantize_dynamic(model, spec)

    def test_the_warning_about_what_stays_in_float_says_how(self):
        with pytest.warns(UserWarning, match="no quantized form, but for Conv1d where that is ask"):
            dynquant.quantize_dynamic(nn.Sequential(nn.Conv1d(8, 8, 3)))
        with pytest.warns(UserWarning, match="no quantized form$"):
            dynquant.quantize_dynamic(nn.Sequential(nn.Conv1d(8, 8, 3, groups=8)))
        normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
        with pytest.warns(UserWarning, match=r"\(Conv1d 9[0-9.]*%\) .* but for Conv1d where that"):
            dynquant.quantize_dynamic(nn.Sequential(normed))

    def test_one_under_two_names_asked_for_differently(self):
        model = nn.ModuleDict({"a": nn.Conv1d(4, 4, 3), "b": nn.ModuleDict()})
        model["b"]["c"] = model["a"]
        with pytest.raises(ValueError, match="are one module, asked for differently"):
            dynquant.quantize_dynamic(model, {"a": QConfig(), "b": None})

    def test_prepared_and_converted(self):
        model = nn.Sequential(Block())
        with pytest.warns(UserWarning, match="left in float"):
            prepared = dynquant.prepare(model, [nn.Conv1d, nn.Linear])
        converted = dynquant.convert(prepared)
        assert type(converted[0].conv) is Conv1d
        model[0].conv.qconfig = QConfig(activation_bits=16)
        assert dynquant.convert(model)[0].conv.activation_bits == 16

    @pytest.mark.filterwarnings("ignore:.*is deprecated")
    def test_configs_of_torch(self):
        """One for a module is handed on to all that it holds, and asks for none of them."""
        quantization = pytest.importorskip("torch.ao.quantization", reason="no torch.ao here")
        config = quantization.default_dynamic_qconfig
        model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Linear(3, 3))
        model[0].qconfig = config
        assert type(dynquant.convert(model)[0]) is Conv1d
        model.qconfig = config
        quantization.propagate_qconfig_(model)
        converted = dynquant.convert(model)
        assert [type(one) for one in converted] == [nn.Conv1d, Linear]

    @pytest.mark.filterwarnings("error")
    def test_a_hint_that_would_be_an_error_is_not_given(self):
        model = nn.Sequential(nn.Conv1d(8, 80, 3), nn.Linear(3, 3))
        with pytest.warns(UserWarning, match="no quantized form$"):
            dynquant.quantize_dynamic(model, dtype=torch.float16)
        grouped = nn.Sequential(nn.Sequential(nn.Conv1d(8, 8, 3, groups=8)))
        with pytest.warns(UserWarning, match="^no quantized form, left as it is: 0"):
            dynquant.quantize_dynamic(grouped, ["0"])

    def test_a_mapping_of_the_users_own_comes_first(self):
        class Own(nn.Module):
            @classmethod
            def from_float(cls, mod, qconfig=None):
                return cls()

        model = dynquant.quantize_dynamic(nn.Sequential(Block()), mapping={nn.Conv1d: Own})
        assert type(model[0].conv) is Own and type(model[0].depthwise) is Own
        with pytest.warns(UserWarning, match="8 groups"):
            model = dynquant.quantize_dynamic(nn.Sequential(Block()), mapping={nn.Conv1d: Conv1d})
        assert type(model[0].conv) is Conv1d and type(model[0].depthwise) is nn.Conv1d

    def test_a_dtype_that_it_has_no_form_for(self):
        with pytest.raises(ValueError, match=r"\[Conv1d\]: dtype is torch.float16; allowed: torch"):
            dynquant.quantize_dynamic(nn.Sequential(Block()), [nn.Conv1d], dtype=torch.float16)

    def test_a_weight_that_is_not_finite(self):
        model = nn.Sequential(nn.Conv1d(4, 4, 3))
        model[0].weight.data[1, 2, 1] = torch.nan
        with pytest.raises(ValueError, match="0.weight holds"):
            dynquant.quantize_dynamic(model, [nn.Conv1d])

    def test_sizes_that_were_changed(self):
        """As the float module computes with what it has now."""
        x = torch.randn(1, 4, 9)
        for changed in (
            {"padding": 2, "stride": 2, "dilation": 2},
            {"padding": (0,)},
            {"dilation": (2,), "padding": (2,)},
            {"stride": (2,)},
        ):
            conv = nn.Conv1d(4, 4, 3, padding=1)
            vars(conv).update(changed)
            layer = Conv1d.from_float(conv)
            assert layer(x).shape == conv(x).shape == dynquant.dequantize(layer)(x).shape
        conv.weight, conv.bias = nn.Parameter(torch.randn(6, 8, 5)), nn.Parameter(torch.randn(6))
        layer, x = Conv1d.from_float(conv), torch.randn(1, 8, 9)
        assert layer.weight.shape == (6, 8, 5) and layer(x).shape == conv(x).shape
        conv, x = nn.ConvTranspose1d(4, 4, 3, stride=2), torch.randn(1, 4, 9)
        vars(conv).update(padding=(1,), stride=(3,), output_padding=(1,))
        layer = ConvTranspose1d.from_float(conv)
        assert layer(x).shape == conv(x).shape == dynquant.dequantize(layer)(x).shape

    def test_without_channels(self):
        with pytest.raises(ValueError, match="the module has no channels"):
            Conv1d.from_float(nn.Conv1d(0, 4, 3))
        with pytest.raises(ValueError, match="the module has no channels"):
            ConvTranspose1d.from_float(nn.ConvTranspose1d(0, 4, 3))

    @pytest.mark.parametrize("form", SOME_FORMS)
    def test_parametrized(self, form):
        conv = conv_of(form)
        normed = nn.utils.parametrizations.weight_norm(copy.deepcopy(conv), dim=2)
        model = dynquant.quantize_dynamic(nn.Sequential(normed), [nn.Conv1d, nn.ConvTranspose1d])
        expected = (Conv1d if form in FORMS else ConvTranspose1d).from_float(normed)
        x = torch.randn(1, 8, 20)
        assert_same(model(x), expected(x))
        assert_same(model[0].weight + 0, expected.weight + 0)

    @pytest.mark.parametrize("second", [{"groups": 4}, {"stride": 2}, {"padding": 1}], ids=str)
    def test_tied(self, second):
        """One weight of which two convolutions make different rows, or the same."""
        kind = nn.ConvTranspose1d if "stride" in second else nn.Conv1d
        one, other = kind(4, 128, 3), kind(16 if "groups" in second else 4, 128, 3, **second)
        other.weight = one.weight
        model = dynquant.quantize_dynamic(nn.ModuleList([one, other]), [kind])
        for made, conv in zip(model, (one, other), strict=True):
            x = torch.randn(1, conv.in_channels, 9)
            assert_same(made(x), type(made).from_float(conv)(x))
        assert (model[0].packed is model[1].packed) == ("padding" in second)


class TestWeight:
    @pytest.mark.parametrize("form", SOME_FORMS[2:])
    def test_of_transposed_ones(self, form):
        conv, layer = conv_of(form), quantized(form)
        assert layer.weight.shape == conv.weight.shape
        torch.testing.assert_close(layer.weight + 0, conv.weight.detach(), rtol=0, atol=2e-3)
        assert layer.weight.int_repr().shape == conv.weight.shape
        x = torch.randn(1, 8, 20)
        by_hand = nn.functional.conv_transpose1d(
            x, layer.weight, layer.bias, layer.stride, layer.padding, 0, layer.groups
        )
        torch.testing.assert_close(layer(x), by_hand, rtol=0.1, atol=0.05)

    @pytest.mark.parametrize("form", ["plain", "groups"])
    def test_stands_for_the_float_weight(self, form):
        conv, layer = conv_of(form), quantized(form)
        assert layer.weight.shape == conv.weight.shape and layer.weight.dtype == torch.float32
        torch.testing.assert_close(layer.weight + 0, conv.weight.detach(), rtol=0, atol=2e-3)
        integers = layer.weight.int_repr()
        assert integers.dtype == torch.int8
        assert_same(integers * layer.weight_scale[:, None, None], layer.weight + 0)
        assert_same(torch.int_repr(layer.weight), integers)
        assert_same(torch.dequantize(layer.weight), layer.weight.dequantize())
        assert layer.weight.to(torch.bfloat16).dtype == torch.bfloat16
        x = torch.randn(1, 8, 20)
        by_hand = nn.functional.conv1d(
            x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        torch.testing.assert_close(layer(x), by_hand, rtol=0.1, atol=0.05)

    def test_cannot_be_written_to(self):
        with pytest.raises(RuntimeError, match="cannot be written to"):
            quantized().weight.add_(1)

    @pytest.mark.parametrize("form", SOME_FORMS)
    def test_is_scaled_in_place(self, form):
        layer, x = quantized(form), torch.randn(1, 8, 20)
        before = layer(x) - layer.bias[:, None]
        layer.weight.mul_(2.0)
        torch.testing.assert_close(layer(x) - layer.bias[:, None], 2 * before)

    @pytest.mark.parametrize("form", SOME_FORMS)
    def test_is_assigned(self, form):
        layer, other = quantized(form), conv_of(form)
        other.weight.data = torch.randn(other.weight.shape)
        layer.weight = other.weight
        assert_same(layer.weight + 0, type(layer).from_float(other).weight + 0)
        again = quantized(form)
        again.weight = layer.weight
        assert_same(again.weight.int_repr(), layer.weight.int_repr())
        assert again.packed is layer.packed
        for wrong in (Linear.from_float(nn.Linear(6, 8)).weight, torch.zeros(6, 8, 9)):
            match = rf"weight is torch.float32 \[{', '.join(map(str, wrong.shape))}\]; allowed"
            with pytest.raises((ValueError, RuntimeError), match=match):
                layer.weight = wrong

    def test_is_assigned_to_another_kind(self):
        """The rows of both have one shape, and other values."""
        conv, other = nn.Conv1d(8, 8, 3), nn.ConvTranspose1d(8, 8, 3)
        one, two = Conv1d.from_float(conv), ConvTranspose1d.from_float(other)
        two.weight = one.weight
        assert two.packed is not one.packed
        torch.testing.assert_close(two.weight + 0, one.weight + 0, rtol=0, atol=2e-3)


class TestState:
    @pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
    @pytest.mark.parametrize("form", ["dilation", *SOME_FORMS[1:]])
    def test_copies(self, form, copied):
        layer, x = quantized(form), torch.randn(2, 8, 30)
        again = copied(layer)
        assert_same_state(again, layer)
        assert_same(again(x), layer(x))

    def test_state_dict(self):
        state = quantized().state_dict()
        assert {key: tuple(value.shape) for key, value in state.items()} == {
            "weight_int8": (6, 24),
            "weight_scale": (6,),
            "bias": (6,),
            "version": (),
        }
        other = Conv1d.from_float(nn.Conv1d(8, 6, 3))
        other.load_state_dict(safetensors_saved(state))
        assert_same_state(other, quantized())

    @pytest.mark.parametrize(
        ("form", "rows", "k"),
        [("groups", 64, 12), ("transposed", 12, 16), (SOME_FORMS[3], 128, 12)],
    )
    def test_rows_of_groups_and_of_outputs(self, form, rows, k):
        layer = quantized(form)
        state = layer.state_dict()
        assert state["weight_int8"].shape == (rows, k) and state["weight_scale"].shape == (rows,)
        other = quantized(form)
        other.weight = torch.zeros_like(conv_of(form).weight)
        other.load_state_dict(safetensors_saved(state))
        assert_same_state(other, layer)
        x = torch.randn(1, 8, 12)
        assert_same(other(x), layer(x))

    @pytest.mark.parametrize("form", SOME_FORMS)
    def test_of_the_float_module_is_quantized(self, form):
        conv, other = conv_of(form), quantized(form)
        other.weight = torch.zeros_like(conv.weight)
        other.load_state_dict(conv.state_dict())
        assert_same_state(other, quantized(form))
        with pytest.raises(RuntimeError, match="shape"):
            other.load_state_dict(nn.Conv1d(8, 6, 9).state_dict())

    @pytest.mark.parametrize("form", ALL_FORMS)
    def test_dequantized(self, form):
        layer, conv = quantized(form), conv_of(form)
        again = dynquant.dequantize(nn.Sequential(layer))[0]
        assert type(again) is type(conv) and repr(again) == repr(conv)
        assert_same(again.weight.detach(), layer.weight + 0)

    def test_casts(self):
        layer = quantized().half()
        assert layer.bias.dtype == torch.float16 and layer.weight_scale.dtype == torch.float32
        assert layer(torch.randn(1, 8, 20).half()).dtype == torch.float16

    @pytest.mark.parametrize("form", ALL_FORMS)
    def test_meta(self, form):
        expected = conv_of(form)(torch.randn(2, 8, 20)).shape
        layer = quantized(form).to("meta")
        assert layer(torch.randn(2, 8, 20, device="meta")).shape == expected
        layer.to_empty(device="cpu")(torch.randn(2, 8, 20))


class TestCall:
    def test_errors(self):
        layer = quantized()
        with pytest.raises(RuntimeError, match="x must have dtype"):
            layer(torch.randn(1, 8, 20, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="x must have K / kernel_size channels"):
            layer(torch.randn(1, 7, 20))
        with pytest.raises(RuntimeError, match=r"x must have the shape \[B, C, L\]"):
            layer(torch.randn(1, 2, 8, 20))
        with pytest.raises(RuntimeError, match="than the kernel"):
            layer(torch.randn(1, 8, 2))
        with pytest.raises(TypeError, match="input must be a torch.Tensor"):
            layer([1.0])
        for form in ("groups", "transposed, groups"):
            with pytest.raises(RuntimeError, match="channels in each of 2 groups, K = 12 as"):
                quantized(form)(torch.randn(1, 10, 20))

    @pytest.mark.parametrize("form", SOME_FORMS)
    def test_compiled_products_with_the_weight(self, form):
        layer, x = quantized(form), torch.randn(2, 8, 20)
        function = nn.functional.conv1d if form in FORMS else nn.functional.conv_transpose1d
        more = (layer.stride, layer.padding)

        def product(x):
            weight = layer.weight
            return function(x, weight, layer.bias, *more, groups=layer.groups)

        compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), product(x))

    @pytest.mark.parametrize("form", ["stride", *SOME_FORMS[1:]])
    def test_gradient_of_the_input(self, form):
        layer = quantized(form)
        x = torch.randn(2, 8, 20, requires_grad=True)
        layer(x).sum().backward()
        wide = x.detach().requires_grad_()
        conv = dynquant.dequantize(nn.Sequential(layer))
        conv(wide).sum().backward()
        torch.testing.assert_close(x.grad, wide.grad)

    @pytest.mark.parametrize("form", ["same", "reflect", *SOME_FORMS, "transposed, cut"])
    def test_compilers(self, form):
        model, x = nn.Sequential(quantized(form), nn.ReLU()), torch.randn(2, 8, 30)
        expected = model(x)
        assert_same(traced_and_saved(model, x)(x), expected)
        assert_same(torch.jit.script(model)(x), expected)
        assert_same(torch.jit.script(model)(x[0]), expected[0])
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_same(compiled(x), expected)
        sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("length", min=10)}
        exported = torch.export.export(model, (x,), dynamic_shapes=(sizes,)).module()
        longer = torch.randn(3, 8, 55)
        assert_same(exported(longer), model(longer))
        assert torch.fx.symbolic_trace(model)(x).equal(expected)

    @pytest.mark.parametrize("form", ["stride", "groups"])
    def test_what_it_costs_is_counted(self, form):
        from torch.utils.flop_counter import FlopCounterMode

        counts = []
        for model in (conv_of(form), quantized(form)):
            with FlopCounterMode(display=False) as counter:
                model(torch.randn(2, 8, 30))
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


def test_compare():
    model = nn.Sequential(conv_of(), nn.ReLU(), conv_of("dilation", c=6)).eval()
    form = dynquant.quantize_dynamic(model, {nn.Conv1d})
    comparison = dynquant.compare(model, form, torch.randn(2, 8, 40))
    assert [row["name"] for row in comparison.rows] == ["0", "2"]
