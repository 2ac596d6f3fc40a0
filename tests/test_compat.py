"""dynquant.compat: torch's names for quantize_dynamic, and code written for torch."""

import importlib
import subprocess
import sys
import warnings

import pytest
import torch
from compare import assert_same
from torch import nn

import dynquant
from dynquant import compat

torch_ao = pytest.importorskip("torch.ao.quantization", reason="this torch has no torch.ao")


@pytest.fixture
def installed():
    compat.install()
    yield
    compat.uninstall()


@pytest.mark.parametrize(
    "name",
    [
        "torch.ao.quantization",
        "torch.ao.quantization.quantize",
        "torch.quantization",
        "torch.quantization.quantize",
    ],
)
def test_every_name(name, installed):
    module = importlib.import_module(name)
    assert module.quantize_dynamic is dynquant.quantize_dynamic
    compat.uninstall()
    assert module.quantize_dynamic is not dynquant.quantize_dynamic


def test_twice_and_never():
    original = torch_ao.quantize_dynamic
    compat.uninstall()
    compat.install()
    compat.install()
    assert compat.installed()
    compat.uninstall()
    assert torch_ao.quantize_dynamic is original and not compat.installed()


def test_forms_of_torch(installed):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    expected = dynquant.quantize_dynamic(model)(x)
    for arguments in (
        {"qconfig_spec": {nn.Linear}, "dtype": torch.qint8},
        {"qconfig_spec": {nn.Linear}, "inplace": False},
        {"qconfig_spec": {nn.Linear}, "mapping": None},
        {
            "qconfig_spec": {nn.Linear},
            "mapping": torch_ao.get_default_dynamic_quant_module_mappings(),
        },
    ):
        quantized = torch.quantization.quantize_dynamic(model, **arguments)
        assert isinstance(quantized[0], dynquant.nn.Linear)
        assert_same(quantized(x), expected)
    spec = {nn.Linear: torch_ao.per_channel_dynamic_qconfig, "2": None}
    quantized = torch_ao.quantize_dynamic(model, spec)
    assert isinstance(quantized[0], dynquant.nn.Linear) and type(quantized[2]) is nn.Linear


def test_code_that_imports_the_name_afterwards():
    code = (
        "import dynquant.compat; dynquant.compat.install()\n"
        "import torch\n"
        "from torch.ao.quantization import quantize_dynamic as one\n"
        "from torch.quantization import quantize_dynamic as other\n"
        "import dynquant\n"
        "model = one(torch.nn.Sequential(torch.nn.Linear(2, 2)), {torch.nn.Linear})\n"
        "assert one is other and isinstance(model[0], dynquant.nn.Linear)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


class TestMapping:
    def test_a_mapping_of_torch_and_the_users_own(self):
        class Own(nn.Module):
            def forward(self, x):
                return x

        class OwnQuantized(nn.Module):
            @classmethod
            def from_float(cls, mod):
                return cls()

        mapping = {**torch_ao.get_default_dynamic_quant_module_mappings(), Own: OwnQuantized}
        model = dynquant.quantize_dynamic(nn.Sequential(Own(), nn.Linear(2, 2)), mapping=mapping)
        assert [type(module) for module in model] == [OwnQuantized, dynquant.nn.Linear]

    @pytest.mark.parametrize("own_mapping", [False, True])
    def test_linear_of_dynamic_quantization_aware_training(self, own_mapping):
        qat = pytest.importorskip("torch.ao.nn.qat.dynamic")
        mapping = torch_ao.get_default_dynamic_quant_module_mappings() if own_mapping else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer = qat.Linear(3, 2, qconfig=torch_ao.qconfig.default_dynamic_qat_qconfig)
        model = dynquant.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, mapping=mapping)
        plain = nn.Linear(3, 2)
        plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
        x = torch.randn(4, 3)
        assert_same(model(x), dynquant.quantize_dynamic(plain)(x))


@pytest.mark.parametrize(
    "name",
    [
        "default_dynamic_qconfig",
        "per_channel_dynamic_qconfig",
        "default_qconfig",
        "default_per_channel_qconfig",
        "default_weight_only_qconfig",
    ],
)
def test_every_qconfig_of_torch_for_8_bits(name):
    config = getattr(torch_ao, name)
    layer = dynquant.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear: config})[0]
    assert isinstance(layer, dynquant.nn.Linear)
    per_channel = "per_channel" in name
    assert layer.weight_scale.numel() == (3 if per_channel else 1)
