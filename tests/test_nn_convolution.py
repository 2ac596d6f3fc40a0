"""dynquant.nn.Conv1d: what it computes, when it is made, its state, copies and what reads it."""

import copy

import pytest
import torch
from compare import assert_same, assert_same_state
from round_trips import COPIES, safetensors_saved, traced_and_saved
from torch import nn

import dynquant
from dynquant import QConfig
from dynquant.nn import Conv1d, Linear

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
}
CONFIGS = {
    "default": QConfig(),
    "16 bits": QConfig(activation_bits=16),
    "per_tensor": QConfig("per_tensor", "per_tensor", True),
}


def conv_of(form="plain", c=8, n=6, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Conv1d(c, n, **FORMS[form]).to(dtype)


def quantized(form="plain", qconfig=None, **sizes):
    return Conv1d.from_float(conv_of(form, **sizes), qconfig)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_is_a_linear_layer_on_what_the_kernel_sees(form, config, dtype):
    conv = conv_of(form, dtype=dtype)
    layer = Conv1d.from_float(conv, CONFIGS[config])
    linear = nn.Linear(conv.kernel_size[0] * 8, 6, conv.bias is not None).to(dtype)
    linear.weight.data = conv.weight.detach().transpose(1, 2).flatten(1).clone()
    if conv.bias is not None:
        linear.bias.data = conv.bias.detach().clone()
    x = torch.randn(2, 8, 41).to(dtype)
    both = conv._reversed_padding_repeated_twice
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = nn.functional.pad(x, both, mode)
    taps, step = conv.kernel_size[0], conv.dilation[0]
    positions = torch.arange(0, padded.shape[2] - step * (taps - 1), conv.stride[0])
    seen = padded[:, :, positions[:, None] + step * torch.arange(taps)]
    rows = seen.permute(0, 2, 3, 1).flatten(2)
    y = layer(x)
    assert y.shape == conv(x).shape and y.dtype == dtype
    expected = Linear.from_float(linear, CONFIGS[config])(rows).mT
    if config == "per_tensor":  # the windows may leave some of x out, so that its range is another
        torch.testing.assert_close(y, expected, rtol=0.1, atol=0.1)
    else:
        assert_same(y, expected)
    torch.testing.assert_close(y, conv(x), rtol=0.1, atol=0.05)
    assert_same(layer(x[0]), y[0] if config != "per_tensor" else layer(x[:1])[0])


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

    def test_of_several_groups_is_left_with_a_warning(self):
        model = nn.Sequential(Block())
        with pytest.warns(UserWarning, match=r"left in float: 0.depthwise \(Conv1d\) has 8 groups"):
            dynquant.quantize_dynamic(model, [nn.Conv1d])
        with pytest.raises(ValueError, match="0.depthwise has 8 groups"):
            Conv1d.check_float(model[0].depthwise, QConfig(), "0.depthwise")

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
        with pytest.warns(UserWarning, match=r"\(Conv1d is quantized only where .* own name\): "):
            dynquant.quantize_dynamic(model, spec)

    def test_the_warning_about_what_stays_in_float_says_how(self):
        with pytest.warns(UserWarning, match="no quantized form, but for Conv1d where that is ask"):
            dynquant.quantize_dynamic(nn.Sequential(nn.Conv1d(8, 8, 3)))
        with pytest.warns(UserWarning, match="no quantized form$"):
            dynquant.quantize_dynamic(nn.Sequential(nn.Conv1d(8, 8, 3, groups=8)))

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

    def test_without_channels(self):
        with pytest.raises(ValueError, match="the module has no channels"):
            Conv1d.from_float(nn.Conv1d(0, 4, 3))

    def test_parametrized(self):
        conv = conv_of()
        normed = nn.utils.parametrizations.weight_norm(copy.deepcopy(conv))
        model = dynquant.quantize_dynamic(nn.Sequential(normed), [nn.Conv1d])
        expected = Conv1d.from_float(normed)
        x = torch.randn(1, 8, 20)
        assert_same(model(x), expected(x))
        assert_same(model[0].weight + 0, expected.weight + 0)


class TestWeight:
    def test_stands_for_the_float_weight(self):
        conv, layer = conv_of(), quantized()
        assert layer.weight.shape == conv.weight.shape and layer.weight.dtype == torch.float32
        torch.testing.assert_close(layer.weight + 0, conv.weight.detach(), rtol=0, atol=2e-3)
        integers = layer.weight.int_repr()
        assert integers.dtype == torch.int8
        assert_same(integers * layer.weight_scale[:, None, None], layer.weight + 0)
        assert_same(torch.int_repr(layer.weight), integers)
        assert_same(torch.dequantize(layer.weight), layer.weight.dequantize())
        assert layer.weight.to(torch.bfloat16).dtype == torch.bfloat16
        x = torch.randn(1, 8, 20)
        by_hand = nn.functional.conv1d(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), by_hand, rtol=0.1, atol=0.05)

    def test_cannot_be_written_to(self):
        with pytest.raises(RuntimeError, match="cannot be written to"):
            quantized().weight.add_(1)

    def test_is_scaled_in_place(self):
        layer, x = quantized(), torch.randn(1, 8, 20)
        before = layer(x) - layer.bias[:, None]
        layer.weight.mul_(2.0)
        torch.testing.assert_close(layer(x) - layer.bias[:, None], 2 * before)

    def test_is_assigned(self):
        layer, other = quantized(), conv_of()
        other.weight.data = torch.randn(other.weight.shape)
        layer.weight = other.weight
        assert_same(layer.weight + 0, Conv1d.from_float(other).weight + 0)
        again = quantized()
        again.weight = layer.weight
        assert_same(again.weight.int_repr(), layer.weight.int_repr())
        with pytest.raises(
            (ValueError, RuntimeError), match=r"weight is torch.float32 \[6, 8, 4\]; allowed"
        ):
            layer.weight = torch.zeros(6, 8, 4)


class TestState:
    @pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
    def test_copies(self, copied):
        layer, x = quantized("dilation"), torch.randn(2, 8, 30)
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

    def test_of_the_float_module_is_quantized(self):
        other = Conv1d.from_float(nn.Conv1d(8, 6, 3))
        other.load_state_dict(conv_of().state_dict())
        assert_same_state(other, quantized())
        with pytest.raises(RuntimeError, match="shape"):
            other.load_state_dict(nn.Conv1d(8, 6, 4).state_dict())

    @pytest.mark.parametrize("form", FORMS)
    def test_dequantized(self, form):
        layer = quantized(form)
        conv = dynquant.dequantize(nn.Sequential(layer))[0]
        assert type(conv) is nn.Conv1d and repr(conv) == repr(conv_of(form))
        assert_same(conv.weight.detach(), layer.weight + 0)

    def test_casts(self):
        layer = quantized().half()
        assert layer.bias.dtype == torch.float16 and layer.weight_scale.dtype == torch.float32
        assert layer(torch.randn(1, 8, 20).half()).dtype == torch.float16

    def test_meta(self):
        layer = quantized().to("meta")
        assert layer(torch.randn(2, 8, 20, device="meta")).shape == (2, 6, 18)


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

    def test_gradient_of_the_input(self):
        layer = quantized("stride")
        x = torch.randn(2, 8, 20, requires_grad=True)
        layer(x).sum().backward()
        wide = x.detach().requires_grad_()
        conv = dynquant.dequantize(nn.Sequential(layer))
        conv(wide).sum().backward()
        torch.testing.assert_close(x.grad, wide.grad)

    @pytest.mark.parametrize("form", ["plain", "same", "reflect"])
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

    def test_what_it_costs_is_counted(self):
        from torch.utils.flop_counter import FlopCounterMode

        counts = []
        for model in (conv_of("stride"), quantized("stride")):
            with FlopCounterMode(display=False) as counter:
                model(torch.randn(2, 8, 30))
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0


def test_compare():
    model = nn.Sequential(conv_of(), nn.ReLU(), conv_of("dilation", c=6)).eval()
    form = dynquant.quantize_dynamic(model, {nn.Conv1d})
    comparison = dynquant.compare(model, form, torch.randn(2, 8, 40))
    assert [row["name"] for row in comparison.rows] == ["0", "2"]
