"""torchao's quantize_ with a config of dynquant."""

import pytest
import torch
from compare import assert_same
from torch import nn

import dynquant

pytest.importorskip("torchao", reason="torchao is not installed")

from torchao.quantization import (  # noqa: E402
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8StaticActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    MappingType,
    PerRow,
    PerTensor,
    quantize_,
)

from dynquant.torchao import DynamicActivationInt8WeightConfig as Config  # noqa: E402
from dynquant.torchao import from_torchao  # noqa: E402


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Sequential(nn.Linear(70, 9))).eval()


@pytest.mark.parametrize("arguments", [(), ("per_tensor", "per_tensor", True)])
def test_equals_quantize_dynamic(arguments):
    x = torch.randn(5, 40)
    given = model()
    quantize_(given, Config(*arguments))
    expected = dynquant.quantize_dynamic(model(), {nn.Linear: dynquant.QConfig(*arguments)})
    assert type(given[0]) is type(given[2][0]) is dynquant.nn.Linear
    assert_same(given(x), expected(x))
    assert_same(torch.compile(given, backend="eager")(x), expected(x))


def test_filter():
    given = model()
    quantize_(given, Config(), filter_fn=lambda module, name: name == "2.0")
    assert type(given[0]) is nn.Linear and type(given[2][0]) is dynquant.nn.Linear


def test_filter_for_other_types():
    x = torch.randn(3, 2, 8)
    torch.manual_seed(0)
    given = nn.ModuleList([nn.LSTM(8, 12)]).eval()
    expected = dynquant.quantize_dynamic(given)[0](x)[0]
    quantize_(given, Config(), filter_fn=lambda module, name: isinstance(module, nn.LSTM))
    assert_same(given[0](x)[0], expected)


def test_bare_module_and_one_that_is_there_twice():
    x = torch.randn(3, 16)
    linear = nn.Linear(16, 16)
    expected = dynquant.quantize_dynamic(linear)(x)
    twice = nn.Sequential(nn.Sequential(linear), nn.Sequential(linear))
    quantize_(linear, Config())
    assert_same(linear(x), expected)
    assert twice[0][0] is twice[1][0] is linear
    quantize_(twice, Config())
    assert_same(twice[0](x), expected)


def test_state_dict_round_trip():
    given, other = model(), model()
    quantize_(given, Config())
    for parameter in other.parameters():
        parameter.data.zero_()
    quantize_(other, Config())
    other.load_state_dict(given.state_dict())
    x = torch.randn(5, 40)
    assert_same(other(x), given(x))


def test_again_changes_nothing():
    given = model()
    quantize_(given, Config())
    first = given[0]
    quantize_(given, Config())
    assert given[0] is first


def test_wrong_argument():
    with pytest.raises(ValueError, match="activation"):
        Config(activation="per_channel")


class TestFromTorchao:
    """Models that torchao has quantized, on dynquant's kernels."""

    def quantized(self, **arguments):
        given = model()
        quantize_(given, Int8DynamicActivationInt8WeightConfig(**arguments))
        return given

    @pytest.mark.parametrize("inplace", [False, True])
    def test_integers_and_bits(self, inplace):
        given = self.quantized()
        weight, bias = given[0].weight, given[0].bias.detach()
        made = from_torchao(given, inplace=inplace)
        assert (made is given) == inplace
        assert inplace or type(given[0]) is nn.Linear
        assert_same(made[0].weight.int_repr(), weight.qdata)
        assert_same(made[0].weight_scale, weight.scale.flatten())
        x = torch.randn(5, 40)
        packed = torch.ops.dynquant.pack_weight(weight.qdata)
        expected = torch.ops.dynquant.linear_dynamic(
            x, packed, weight.scale.flatten(), bias, True, True
        )
        assert_same(made[0](x), expected)
        wanted, y = model()(x), made(x)
        assert 10 * torch.log10(wanted.square().sum() / (y - wanted).square().sum()) > 30

    @pytest.mark.parametrize(
        ("arguments", "scheme"),
        [
            ({"granularity": PerTensor()}, ("per_tensor", "per_tensor", True)),
            ({"granularity": [PerRow(), PerTensor()]}, ("per_tensor", "per_token", True)),
            ({"act_mapping_type": MappingType.ASYMMETRIC}, ("per_channel", "per_token", False)),
            ({"reduce_range": True}, ("per_channel", "per_token", True)),
        ],
    )
    def test_schemes(self, arguments, scheme):
        made = from_torchao(self.quantized(**arguments))
        assert made[0]._formats["weight"].qconfig == dynquant.QConfig(*scheme)

    def test_bare_tied_and_again(self):
        linear = nn.Linear(16, 16)
        twice = nn.Sequential(linear, nn.ReLU(), linear)
        quantize_(twice, Int8DynamicActivationInt8WeightConfig())
        made = from_torchao(twice)
        assert made[0] is made[2] and type(made[0]) is dynquant.nn.Linear
        bare = from_torchao(linear)
        x = torch.randn(3, 16)
        assert_same(bare(x), made[0](x))
        with pytest.raises(ValueError, match="no weight that torchao has quantized"):
            from_torchao(made)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (Int8WeightOnlyConfig(version=2), "^0: act_quant_kwargs is None: activations in float"),
            (Float8WeightOnlyConfig(), "^0: the weight is a Float8Tensor; allowed: Int8Tensor"),
            (
                Int8StaticActivationInt8WeightConfig(
                    act_quant_scale=torch.tensor([[0.1]]), granularity=PerTensor()
                ),
                "^0: act_quant_scale is a static scale of activations",
            ),
        ],
    )
    def test_refused(self, config, message):
        given = model()
        quantize_(given, config)
        with pytest.raises(ValueError, match=message):
            from_torchao(given, inplace=True)
        assert type(given[0]) is type(given[2][0]) is nn.Linear

    def test_another_module(self):
        given = nn.ModuleDict({"table": nn.Embedding(8, 16)})
        config = Int8DynamicActivationInt8WeightConfig()
        quantize_(given, config, filter_fn=lambda module, name: name == "table")
        with pytest.raises(ValueError, match="table.weight is quantized, but .* Embedding"):
            from_torchao(given)
