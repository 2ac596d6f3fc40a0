"""Models as people have them: in train mode, computed parameters, scripts, traces, histories."""

import copy
import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from compare import assert_same
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import dynquant
from dynquant import QConfig


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, weight):
        return self.dropout(weight)


class TestComputedParameters:
    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("module", [nn.Linear(8, 6), nn.GRUCell(8, 2)], ids=str)
    def test_are_read_as_in_eval_mode(self, module, inplace):
        module = copy.deepcopy(module)
        name = "weight" if isinstance(module, nn.Linear) else "weight_ih"
        original = getattr(module, name).detach().clone()
        parametrize.register_parametrization(module, name, Dropped())
        assert module.training
        form = dynquant.quantize_dynamic(module, inplace=inplace)
        expected, scale = torch.ops.dynquant.quantize_weight(original)
        assert_same(getattr(form, name).int_repr(), expected)
        assert module.training or inplace

    def test_spectral_norm_keeps_its_buffers(self):
        model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 6)))
        before = copy.deepcopy(model.state_dict())
        dynquant.quantize_dynamic(model)
        for key, value in model.state_dict().items():
            assert_same(value, before[key], key)
        assert model.training and model[0].parametrizations.weight.training

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_pruned(self, name):
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
        prune.random_unstructured(model[0], name, 0.5)
        x = torch.randn(3, 8)
        with torch.no_grad():  # torch copies no parameter that was computed with gradients
            model(x)
        with pytest.warns(UserWarning, match=rf"left in float: 0 \(Linear\) has a {name} that a h"):
            quantized = dynquant.quantize_dynamic(model)
        assert_same(quantized[0](x).detach(), model[0](x).detach())
        assert isinstance(quantized[1], dynquant.nn.Linear)


class TestKeywords:
    @pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
    def test_are_those_of_the_float_module(self, dtype):
        for module in (
            nn.Linear(4, 4),
            nn.LSTM(4, 4),
            nn.GRU(4, 4),
            nn.RNN(4, 4),
            nn.LSTMCell(4, 4),
            nn.GRUCell(4, 4),
            nn.RNNCell(4, 4),
            nn.MultiheadAttention(4, 2),
        ):
            form = dynquant.quantize_dynamic(module, dtype=dtype)
            wanted = list(inspect.signature(module.forward).parameters)
            assert list(inspect.signature(form.forward).parameters) == wanted, module
        for module in (nn.Embedding(4, 4), nn.EmbeddingBag(4, 4)):
            form = dynquant.quantize_dynamic(module, dtype=torch.quint8)
            wanted = list(inspect.signature(module.forward).parameters)
            assert list(inspect.signature(form.forward).parameters) == wanted, module

    def test_linear(self):
        layer, x = dynquant.quantize_dynamic(nn.Linear(4, 4)), torch.randn(2, 4)
        assert_same(layer(input=x), layer(x))


class Everything(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 8)
        self.linear = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.cell = nn.GRUCell(8, 8)
        self.bag = nn.EmbeddingBag(9, 8)

    def forward(self, ids):
        x = self.linear(input=self.words(ids))
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.cell(self.lstm(x)[0][:, -1]) + self.bag(ids)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.bfloat16], ids=str)
def test_symbolic_trace(dtype):
    spec = {one: QConfig(dtype=dtype) for one in (nn.Linear, nn.LSTM, nn.GRUCell)}
    tables = {one: QConfig(dtype=torch.quint8) for one in (nn.Embedding, nn.EmbeddingBag)}
    model = dynquant.quantize_dynamic(Everything(), {**spec, **tables})
    traced = torch.fx.symbolic_trace(model)
    ids = torch.arange(6).view(2, 3)
    assert_same(traced(ids).detach(), model(ids).detach())
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert called == {"words", "linear", "attention", "lstm", "cell", "bag"}
    with pytest.raises(RuntimeError, match="trace the model that it belongs to"):
        torch.fx.symbolic_trace(model.linear)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("whole", [False, True])
def test_a_script_module_is_left_with_a_warning(whole):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    if whole:
        model = torch.jit.script(model)
    else:
        model[1] = torch.jit.script(model[1])
    name = r"the model" if whole else "1"
    with pytest.warns(UserWarning, match=rf"nothing within a ScriptModule.*: {name} \(Recursive"):
        quantized = dynquant.quantize_dynamic(model)
    assert whole or isinstance(quantized[0], dynquant.nn.Linear)


class TestCopies:
    @pytest.mark.parametrize(
        "held", [lambda y: y, lambda y: {"last": [y]}], ids=["plain", "nested"]
    )
    def test_the_error_names_what_has_a_history(self, held):
        model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
        model[1].features = held(model(torch.randn(2, 4)))
        with pytest.raises(RuntimeError, match=r"^1.features: .*detach it, or pass inplace=True"):
            dynquant.quantize_dynamic(model)
        assert isinstance(dynquant.quantize_dynamic(model, inplace=True)[0], dynquant.nn.Linear)


def test_a_qconfig_of_torch_is_removed():
    of_torch = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = model[1].qconfig = of_torch.default_dynamic_qconfig
    quantized = dynquant.quantize_dynamic(model)
    assert not any(hasattr(module, "qconfig") for module in quantized.modules())
    assert hasattr(model, "qconfig")


def test_integrations_that_are_not_installed():
    code = (
        "import inspect, sys\n"
        "sys.modules['torchao'] = None\n"
        "import dynquant\n"
        "assert not hasattr(dynquant, 'torchao')\n"
        "assert 'quantize_dynamic' in dict(inspect.getmembers(dynquant))\n"
        "assert callable(dynquant.compat.install)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


class Shifting(nn.Module):
    """Changes its input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x):
        return self.linear(x.add_(1))


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True)), Shifting()], ids=str
)
def test_compare_where_tensors_change_in_place(model):
    x = torch.randn(5, 16)
    before = x.clone()
    comparison = dynquant.compare(model, dynquant.quantize_dynamic(model), x)
    (row,) = comparison.rows
    assert min(row["snr_db"], row["model_snr_db"], comparison.total["snr_db"]) > 35
    assert_same(x, before)
