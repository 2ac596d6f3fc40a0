"""compare, and keep_float_below of quantize_dynamic."""

import copy
import math
import sys
import warnings

import pytest
import torch
from compare import assert_same
from torch import nn

import dynquant


def snr(wanted, given):
    wanted, given = wanted.double(), given.double()
    return 10 * math.log10(wanted.square().sum() / (given - wanted).square().sum())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(32, 8)
        self.unused = nn.Linear(4, 4)

    def forward(self, x, scale=1.0):
        x = self.dropout(self.first(x).relu())
        x = self.attention(x, x, x)[0]
        return {"out": self.head(self.head.weight.new_tensor(scale) * x), "name": "net"}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class TestCompare:
    def test_rows(self, net, x):
        quantized = dynquant.quantize_dynamic(net, {nn.Linear: {}, "head": None})
        quantized.head = dynquant.quantize_dynamic(net.head)
        result = dynquant.compare(net, quantized, x, scale=2.0)
        assert [row["name"] for row in result.rows] == ["first", "attention", "head", "unused"]
        assert [row["type"] for row in result.rows] == [
            "Linear",
            "MultiheadAttention",
            "Linear",
            "Linear",
        ]
        net.eval()
        with torch.no_grad():
            hidden = net.first(x)
            first = snr(hidden, quantized.first(x))
            assert result.rows[0]["snr_db"] == pytest.approx(first)
            assert result.rows[0]["model_snr_db"] == pytest.approx(first)
            attended = net.attention(*3 * [hidden.relu()])[0]
            head = snr(net.head(2 * attended), quantized.head(2 * attended))
            assert result.rows[2]["snr_db"] == pytest.approx(head)
            total = snr(net(x, 2.0)["out"], quantized(x, 2.0)["out"])
        assert result.total["snr_db"] == pytest.approx(total)
        assert result.rows[2]["model_snr_db"] == pytest.approx(total)
        assert math.isnan(result.rows[3]["snr_db"]) and result.rows[3]["seconds"] == 0
        for row in (*result.rows[:3], result.total):
            assert row["seconds"] > 0 and row["float_seconds"] > 0
            assert 0 < row["time_share"] <= 1
        assert result.rows[0]["bytes_before"] == 4 * (16 * 32 + 32)
        assert result.rows[0]["bytes_after"] < result.rows[0]["bytes_before"]
        assert result.total["bytes_after"] < result.total["bytes_before"]

    def test_changes_neither_model(self, net, x):
        observer = dynquant.Observer()
        model = nn.Sequential(observer, net.first)
        quantized = dynquant.quantize_dynamic(model)
        dynquant.compare(model, quantized, x)
        assert model.training and not quantized.training and not observer.has_data
        assert not model[1]._forward_hooks and not quantized[1]._forward_hooks

    def test_bare_layer(self, net, x):
        result = dynquant.compare(net.first, dynquant.quantize_dynamic(net.first), x)
        assert [row["name"] for row in result.rows] == [""]
        assert "(model)" in str(result)

    def test_table(self, net, x):
        text = str(dynquant.compare(net, dynquant.quantize_dynamic(net), x))
        lines = text.splitlines()
        assert lines[0].split()[:4] == ["layer", "type", "bits", "SNR"]
        assert lines[-1].startswith("total")
        assert len(lines) == 10 and "MultiheadAttention" in lines[2] and "%" in lines[2]

    def test_dataframe(self, net, x):
        pandas = pytest.importorskip("pandas", reason="pandas is not installed")
        result = dynquant.compare(net, dynquant.quantize_dynamic(net), x)
        frame = result.to_dataframe()
        assert isinstance(frame, pandas.DataFrame) and list(frame["name"])[0] == "first"

    def test_plot(self, net, x, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        dynquant.compare(net, dynquant.quantize_dynamic(net), x).plot(tmp_path / "layers.png")
        assert (tmp_path / "layers.png").stat().st_size > 1000

    @pytest.mark.parametrize(("name", "call"), [("pandas", "to_dataframe"), ("matplotlib", "plot")])
    def test_what_is_not_installed_is_named(self, net, x, name, call, monkeypatch, tmp_path):
        result = dynquant.compare(net, dynquant.quantize_dynamic(net), x)
        for module in [one for one in sys.modules if one.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
        arguments = (tmp_path / "x.png",) if call == "plot" else ()
        with pytest.raises(ImportError, match=f"pip install {name}"):
            getattr(result, call)(*arguments)

    def test_errors(self, net, x):
        with pytest.raises(TypeError, match="float_model is of type int"):
            dynquant.compare(3, net, x)
        with pytest.raises(ValueError, match="no quantized layer"):
            dynquant.compare(net, net, x)
        with pytest.raises(ValueError, match="float_model has no module 'first'"):
            dynquant.compare(nn.Sequential(net), dynquant.quantize_dynamic(net), x)


class TestKeepFloatBelow:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        # Large weights, for an input that is always zero, leave few steps for all others.
        model[0].bias.data[0] = -1e3
        model[2].weight.data[:, 0] = 50.0
        nn.init.zeros_(model[2].bias)
        return model

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("form", ["tuple", "tensor", "dict"])
    def test_leaves_what_loses_too_much(self, model, inplace, form):
        x = torch.randn(64, 16)
        inputs = {"tuple": (x,), "tensor": x, "dict": {"input": x}}[form]
        reference = copy.deepcopy(model)
        spec = {nn.Linear: dynquant.per_tensor}
        low = dynquant.compare(reference, dynquant.quantize_dynamic(reference, spec), x).rows[1]
        assert low["snr_db"] < 20
        message = rf"below 20 dB: 2 \(Linear\) {low['snr_db']:.1f} dB$"
        with pytest.warns(UserWarning, match=message):
            quantized = dynquant.quantize_dynamic(
                model, spec, inplace=inplace, keep_float_below=20, example_inputs=inputs
            )
        assert isinstance(quantized[0], dynquant.nn.Linear) and type(quantized[2]) is nn.Linear
        assert (quantized is model) == inplace
        if not inplace:
            assert model.training and type(model[0]) is nn.Linear
        assert_same(quantized[0](x), dynquant.quantize_dynamic(reference, spec)[0](x))

    def test_keeps_nothing_where_all_is_well(self, model):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantized = dynquant.quantize_dynamic(
                model, keep_float_below=-100, example_inputs=torch.randn(4, 16)
            )
        assert isinstance(quantized[2], dynquant.nn.Linear)

    def test_names_what_was_not_measured(self, net, x):
        with pytest.warns(UserWarning, match=r"example_inputs do not reach it: unused \(Linear\)$"):
            quantized = dynquant.quantize_dynamic(net, keep_float_below=5, example_inputs=(x,))
        assert type(quantized.unused) is nn.Linear
        assert isinstance(quantized.attention, dynquant.nn.MultiheadAttention)

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"keep_float_below": 30}, ValueError, "need each other"),
            ({"example_inputs": ()}, ValueError, "need each other"),
            ({"keep_float_below": "30", "example_inputs": ()}, TypeError, "a number of dB"),
            ({"keep_float_below": 30, "example_inputs": 3}, TypeError, "is of type int; expected"),
        ],
    )
    def test_errors(self, model, arguments, error, message):
        with pytest.raises(error, match=message):
            dynquant.quantize_dynamic(model, inplace=True, **arguments)
        assert type(model[0]) is nn.Linear
