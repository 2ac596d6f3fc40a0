"""torchao's quantize_ with a config of dynquant."""

import pytest
import torch
from compare import assert_same
from torch import nn

import dynquant

pytest.importorskip("torchao", reason="torchao is not installed")

from torchao.quantization import quantize_  # noqa: E402

from dynquant.torchao import DynquantConfig  # noqa: E402


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 70), nn.ReLU(), nn.Sequential(nn.Linear(70, 9))).eval()


@pytest.mark.parametrize("arguments", [(), ("per_tensor", "per_tensor", True)])
def test_equals_quantize_dynamic(arguments):
    x = torch.randn(5, 40)
    given = model()
    quantize_(given, DynquantConfig(*arguments))
    expected = dynquant.quantize_dynamic(model(), {nn.Linear: dynquant.QConfig(*arguments)})
    assert type(given[0]) is type(given[2][0]) is dynquant.nn.Linear
    assert_same(given(x), expected(x))
    assert_same(torch.compile(given, backend="eager")(x), expected(x))


def test_filter():
    given = model()
    quantize_(given, DynquantConfig(), filter_fn=lambda module, name: name == "2.0")
    assert type(given[0]) is nn.Linear and type(given[2][0]) is dynquant.nn.Linear


def test_filter_for_other_types():
    x = torch.randn(3, 2, 8)
    torch.manual_seed(0)
    given = nn.ModuleList([nn.LSTM(8, 12)]).eval()
    expected = dynquant.quantize_dynamic(given)[0](x)[0]
    quantize_(given, DynquantConfig(), filter_fn=lambda module, name: isinstance(module, nn.LSTM))
    assert_same(given[0](x)[0], expected)


def test_bare_module_and_one_that_is_there_twice():
    x = torch.randn(3, 16)
    linear = nn.Linear(16, 16)
    expected = dynquant.quantize_dynamic(linear)(x)
    twice = nn.Sequential(nn.Sequential(linear), nn.Sequential(linear))
    quantize_(linear, DynquantConfig())
    assert_same(linear(x), expected)
    assert twice[0][0] is twice[1][0] is linear
    quantize_(twice, DynquantConfig())
    assert_same(twice[0](x), expected)


def test_state_dict_round_trip():
    given, other = model(), model()
    quantize_(given, DynquantConfig())
    for parameter in other.parameters():
        parameter.data.zero_()
    quantize_(other, DynquantConfig())
    other.load_state_dict(given.state_dict())
    x = torch.randn(5, 40)
    assert_same(other(x), given(x))


def test_again_changes_nothing():
    given = model()
    quantize_(given, DynquantConfig())
    first = given[0]
    quantize_(given, DynquantConfig())
    assert given[0] is first


def test_wrong_argument():
    with pytest.raises(ValueError, match="activation"):
        DynquantConfig(activation="per_channel")
