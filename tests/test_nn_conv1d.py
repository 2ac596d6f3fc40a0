"""dynquant.nn.Conv1D, the quantized form of transformers' Conv1D."""

import copy
import pickle
import subprocess
import sys
import types

import pytest
import torch
from compare import assert_same
from torch import nn

import dynquant
from dynquant import QConfig
from dynquant.nn import Conv1D, Conv1D16bit, Linear, Linear16bit


class FloatConv1D(nn.Module):
    """As transformers has it: the weight is [in, out]."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(
            *x.shape[:-1], self.nf
        )


@pytest.fixture(autouse=True)
def transformers(monkeypatch):
    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = FloatConv1D
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)


def as_linear(conv):
    linear = nn.Linear(conv.nx, conv.nf)
    linear.load_state_dict({"weight": conv.weight.t(), "bias": conv.bias})
    return linear


@pytest.mark.parametrize("spec", [None, {nn.Linear}, {FloatConv1D}, {"0"}, {"*"}])
@pytest.mark.parametrize("shape", [(6, 4), (5, 5)])
def test_equals_a_linear_layer(spec, shape):
    conv = FloatConv1D(*shape)
    quantized = dynquant.quantize_dynamic(nn.Sequential(conv), spec)[0]
    assert type(quantized) is Conv1D
    expected = Linear.from_float(as_linear(conv))
    x = torch.randn(2, 3, shape[1])
    assert_same(quantized(x), expected(x))
    assert_same(quantized.weight + 0, expected.weight.t() + 0)
    assert quantized.weight.shape == conv.weight.shape
    assert (quantized.nf, quantized.nx) == shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    conv = FloatConv1D(6, 4)
    quantized = dynquant.quantize_dynamic(nn.Sequential(conv), dtype=dtype)[0]
    assert type(quantized) is Conv1D16bit and (quantized.nf, quantized.nx) == (6, 4)
    expected = Linear16bit.from_float(as_linear(conv), QConfig(dtype=dtype))
    x = torch.randn(2, 3, 4)
    assert_same(quantized(x), expected(x))
    quantized.load_state_dict(expected.state_dict())
    assert_same(quantized.weight + 0, conv.weight.detach().to(dtype).float())


def test_is_kept_in_float():
    model = nn.Sequential(FloatConv1D(4, 4), nn.Linear(4, 4))
    quantized = dynquant.quantize_dynamic(model, {nn.Linear: {}, FloatConv1D: None})
    assert [type(module) for module in quantized] == [FloatConv1D, Linear]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("shape", [(6, 4), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16, torch.bfloat16], ids=str)
def test_checkpoints(shape, dtype, assign):
    one, other = FloatConv1D(*shape), FloatConv1D(*shape)
    expected, quantized = (dynquant.quantize_dynamic(conv, dtype=dtype) for conv in (one, other))
    x = torch.randn(2, shape[1])
    quantized.load_state_dict(one.state_dict(), assign=assign)
    assert_same(quantized(x), expected(x))
    quantized = dynquant.quantize_dynamic(other, dtype=dtype)
    quantized.load_state_dict(expected.state_dict(), assign=assign)
    assert_same(quantized(x), expected(x))


def test_a_checkpoint_of_the_wrong_shape():
    quantized = dynquant.quantize_dynamic(FloatConv1D(6, 4))
    with pytest.raises(RuntimeError, match=r"weight: expected the shape \[4, 6\], found \[6, 4\]"):
        quantized.load_state_dict({"weight": torch.zeros(6, 4), "bias": torch.zeros(6)})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    quantized = dynquant.quantize_dynamic(FloatConv1D(6, 4))
    other, x = copied(quantized), torch.randn(2, 4)
    assert type(other) is Conv1D
    assert_same(other(x), quantized(x))


def test_errors_name_it():
    conv = FloatConv1D(6, 4)
    conv.weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match="^0.weight holds NaN"):
        dynquant.quantize_dynamic(nn.Sequential(conv))
    with pytest.raises(ValueError, match=r"0 \(Conv1D\): 'dynamic' is False"):
        dynquant.quantize_dynamic(nn.Sequential(conv), {"0": {"dynamic": False}})


def test_too_many_rows_are_refused():
    with pytest.raises(ValueError, match="^weight has 65537 columns"):
        dynquant.quantize_dynamic(FloatConv1D(1, 65537))


def test_importing_dynquant_does_not_import_transformers():
    code = (
        "import sys, torch, dynquant\n"
        "dynquant.quantize_dynamic(torch.nn.Linear(2, 2))\n"
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
