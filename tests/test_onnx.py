"""Models exported to ONNX, in ONNX Runtime, beside dynquant's own results."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import dynquant
from dynquant import QConfig, quantize_dynamic

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

from dynquant.onnx import export  # noqa: E402

STANDARD = QConfig(activation="per_tensor")  # what DynamicQuantizeLinear does
SCHEMES = {
    "default": QConfig(),
    "standard": STANDARD,
    "one scale": QConfig("per_tensor", "per_tensor"),
    "symmetric": QConfig(symmetric=True),
    "symmetric per_tensor": QConfig(activation="per_tensor", symmetric=True),
    "16 bits": QConfig(activation_bits=16),
    "16 bits per_tensor": QConfig(activation="per_tensor", activation_bits=16),
    "float16": QConfig(dtype=torch.float16),
    "bfloat16": QConfig(dtype=torch.bfloat16),
}
FEW = ("default", "standard", "symmetric", "16 bits", "float16")
BATCH, LENGTH = Dim("batch"), Dim("length")


class Each(nn.Module):
    """Several modules, each given the same: exporting one model takes less than several."""

    def __init__(self, modules, call=lambda module, *inputs: module(*inputs)):
        super().__init__()
        named = {f"of_{name.replace(' ', '_')}": one for name, one in modules.items()}
        self.parts = nn.ModuleDict(named)
        self.call = call
        self.eval()

    def forward(self, *inputs):
        outputs = [self.call(one, *inputs) for one in self.parts.values()]
        return [one for output in outputs for one in _flat(output)]


def _flat(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [one for part in output if part is not None for one in _flat(part)]


def ran(program, folder, *inputs):
    """What ONNX Runtime gives, from a file that the checker of onnx has seen.

    Its product of uint8 with int8 saturates without VNNI, but for what the session asks for here.
    """
    path = folder / "model.onnx"
    program.save(path)
    onnx.checker.check_model(path, full_check=True)
    options = onnxruntime.SessionOptions()
    if not any(name.endswith("_uint8") for name in program.model.graph.initializers):
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(path, options)
    named = zip(session.get_inputs(), inputs, strict=True)
    outputs = session.run(None, {one.name: value.numpy() for one, value in named})
    return [torch.from_numpy(one) for one in outputs]


def decibels(wanted, given):
    wanted, given = wanted.double(), given.double()
    noise = (given - wanted).square().sum()
    return 10 * torch.log10(wanted.square().sum() / noise) if noise else torch.inf


def check(model, folder, example, inputs=None, dynamic=None, least=120, **options):
    """Exports a model and compares ONNX Runtime's outputs; gives the program and these.

    Args:
        dynamic: the dynamic dimensions of each input.
        least: the signal-to-noise ratio of each output in dB. 120 is what fp32 rounds off.
    """
    if dynamic is not None:
        options["dynamic_shapes"] = (tuple(dynamic for _ in example),)
    options = {"unsigned_weights": True, "verbose": False, **options}
    program = export(model, example, **options)
    inputs = example if inputs is None else inputs
    with torch.no_grad():
        expected = _flat(model(*inputs))
    outputs = ran(program, folder, *inputs)
    assert len(outputs) == len(expected)
    for place, (wanted, given) in enumerate(zip(expected, outputs, strict=True)):
        assert wanted.shape == given.shape and wanted.dtype == given.dtype, place
        assert decibels(wanted, given) >= least, (place, decibels(wanted, given))
        assert (wanted - given).abs().max() <= 10 ** (-least / 20) * 8 * wanted.abs().max(), place
    return program, outputs


def kinds(program):
    return [node.op_type for node in program.model.graph.all_nodes()]


def linears(dtype=torch.float32):
    torch.manual_seed(0)
    return {
        name: quantize_dynamic(
            nn.Linear(37, 70, bias=name != "symmetric").to(dtype), {nn.Linear: qconfig}
        )
        for name, qconfig in SCHEMES.items()
    }


class TestLinear:
    @pytest.mark.parametrize("unsigned", [False, True])
    def test_every_scheme(self, tmp_path, unsigned):
        x = torch.randn(3, 5, 37)
        x[1, 2] = 0
        program, _ = check(
            Each(linears()),
            tmp_path,
            (torch.randn(2, 4, 37),),
            (x,),
            dynamic={0: BATCH, 1: LENGTH},
            unsigned_weights=unsigned,
        )
        found = kinds(program)
        assert found.count("DynamicQuantizeLinear") == 2
        assert found.count("MatMulInteger") == 7
        assert {node.domain for node in program.model.graph.all_nodes()} == {""}
        assert program.model.opset_imports.keys() == {""}
        assert not any("packed" in name for name in program.model.graph.initializers)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_in_16_bits(self, tmp_path, dtype):
        def call(module, x):
            y = module(x.to(dtype))
            assert y.dtype == dtype
            return y.float()  # numpy has no bfloat16

        check(Each(linears(dtype), call), tmp_path, (torch.randn(4, 37),), least=60)

    def test_rows_that_are_not_finite(self, tmp_path):
        names = ["default", "symmetric", "16 bits"]
        model = Each({name: one for name, one in linears().items() if name in names})
        x = torch.randn(6, 37)
        x[1, 3], x[2, 4], x[3, 5] = torch.nan, torch.inf, -torch.inf
        x[4] = 3e38
        x[4, ::2] = -3e38
        outputs = ran(export(model, (x,), verbose=False), tmp_path, x)
        for name, given, wanted in zip(names, outputs, model(x), strict=True):
            assert torch.equal(given.isnan(), wanted.isnan()), name
            assert wanted.isnan().all(1).tolist() == [
                False,
                True,
                True,
                True,
                name != "symmetric",
                False,
            ]
            assert torch.allclose(given[[0, 5]], wanted[[0, 5]], rtol=1e-5, atol=1e-6)

    def test_the_lowest_integer(self, tmp_path):
        integers = torch.full((5, 64), -128, dtype=torch.int8)
        layer = dynquant.nn.Linear.from_integers(integers, torch.ones(5), qconfig=STANDARD)
        check(layer, tmp_path, (torch.rand(3, 64) + 1,))

    def test_one_row(self, tmp_path):
        check(Each(linears()), tmp_path, (torch.randn(37),))

    def test_a_file_with_its_weights_beside(self, tmp_path):
        model = linears()["default"]
        export(model, (torch.randn(2, 37),), tmp_path / "a.onnx", verbose=False)
        assert {one.name for one in tmp_path.iterdir()} == {"a.onnx", "a.onnx.data"}
        file = tmp_path / "b" / "b.onnx"
        file.parent.mkdir()
        export(model, (torch.randn(2, 37),), file, external_data=False, verbose=False)
        assert [one.name for one in file.parent.iterdir()] == ["b.onnx"]
        onnx.checker.check_model(file)


def attentions():
    torch.manual_seed(0)
    return {
        name: quantize_dynamic(
            nn.MultiheadAttention(16, 4, batch_first=True), {nn.MultiheadAttention: SCHEMES[name]}
        )
        for name in FEW
    }


class TestConvolution:
    CONVOLUTIONS = {
        "plain": {"kernel_size": 3},
        "of one position": {"kernel_size": 1, "bias": False},
        "stride": {"kernel_size": 4, "stride": 3, "padding": 2},
        "dilation": {"kernel_size": 3, "dilation": 4, "padding": "same"},
        "reflect": {"kernel_size": 5, "padding": 2, "padding_mode": "reflect"},
        "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
        "groups without bias": {"kernel_size": 1, "groups": 3, "bias": False},
    }
    TRANSPOSED = {
        "transposed": {"kernel_size": 4, "stride": 2, "padding": 1},
        "uneven": {"kernel_size": 7, "stride": 3, "output_padding": 2},
        "transposed groups": {"kernel_size": 4, "stride": 2, "groups": 3},
    }
    SCHEMES = ("default", "symmetric", "16 bits")

    def test_any_batch_and_length(self, tmp_path):
        torch.manual_seed(0)
        made = {
            f"{name}, {scheme}": quantize_dynamic(
                kind(6, 96 if "groups" in name else 5, **sizes), {kind: SCHEMES[scheme]}
            )
            for kind, forms in (
                (nn.Conv1d, self.CONVOLUTIONS),
                (nn.ConvTranspose1d, self.TRANSPOSED),
            )
            for name, sizes in forms.items()
            for scheme in self.SCHEMES
        }
        example, inputs = (torch.randn(2, 6, 20),), (torch.randn(3, 6, 47),)
        dynamic = {0: BATCH, 2: LENGTH}
        program, _ = check(Each(made), tmp_path, example, inputs, dynamic)
        assert not {"Conv", "ConvInteger"} & set(kinds(program))

    def test_16_bits(self, tmp_path):
        torch.manual_seed(0)
        dtype = torch.float16
        made = {
            f"{kind.__name__}, {groups}": quantize_dynamic(
                kind(6, 96, 3, groups=groups).to(dtype), {kind: SCHEMES["default"]}
            )
            for kind in (nn.Conv1d, nn.ConvTranspose1d)
            for groups in (1, 3)
        }
        check(Each(made), tmp_path, (torch.randn(2, 6, 20).to(dtype),), least=40)

    def test_per_tensor_is_an_error(self):
        model = quantize_dynamic(nn.Sequential(nn.Conv1d(6, 5, 3)), {nn.Conv1d: STANDARD})
        with pytest.raises(ValueError, match="whose activation is per_tensor has no form"):
            export(model, (torch.randn(2, 6, 20),), verbose=False)


class TestAttention:
    def test_every_scheme(self, tmp_path):
        def call(module, x, memory):
            return module(x, x, x), module(x, memory, memory, need_weights=False)

        example = (torch.randn(2, 5, 16), torch.randn(2, 3, 16))
        # Scores and softmax are float in both: their last bits differ, and may move an integer.
        check(Each(attentions(), call), tmp_path, example, least=60)

    def test_encoder(self, tmp_path):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        model = quantize_dynamic(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval())
        example, x = torch.randn(2, 5, 16), torch.randn(3, 7, 16)
        model = Each({"encoder": model})
        check(model, tmp_path, (example,), (x,), dynamic={0: BATCH, 1: LENGTH}, least=60)

    def test_fused_blocks_are_exported_as_their_modules(self, tmp_path):
        torch.manual_seed(0)
        quantized = quantize_dynamic(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval())
        fused = dynquant.fuse(quantized)
        kind = type(fused)
        program = export(fused, (torch.randn(2, 5, 16),), verbose=False)
        assert type(fused) is kind and dynquant.fused_blocks(fused) == {"": ""}
        x = torch.randn(2, 5, 16)
        (given,) = ran(program, tmp_path, x)
        with torch.no_grad():
            assert decibels(quantized(x), given) >= 60


class TestRecurrent:
    def test_every_scheme(self, tmp_path):
        """Both directions, over sequences of another length and batch than those of the export."""
        torch.manual_seed(0)
        schemes = [(nn.LSTM, name) for name in FEW]
        schemes += [(nn.GRU, "default"), (nn.RNN, "standard")]
        layers = {
            f"{kind.__name__} {name}": quantize_dynamic(
                kind(6, 10, bidirectional=name == "default"), {kind: SCHEMES[name]}
            )
            for kind, name in schemes
        }
        program, _ = check(
            Each(layers),
            tmp_path,
            (torch.randn(5, 2, 6),),
            (torch.randn(8, 3, 6),),
            dynamic={0: LENGTH, 1: BATCH},
            least=55,
        )
        assert kinds(program).count("Scan") == len(layers) + 2

    def test_layers_states_and_projection(self, tmp_path):
        torch.manual_seed(0)
        lstm = nn.LSTM(6, 10, num_layers=2, proj_size=4, batch_first=True)
        model = Each(
            {
                "int8": quantize_dynamic(lstm),
                "mixed": quantize_dynamic(
                    lstm,
                    {
                        nn.LSTM: QConfig(),
                        "weight_hh_l0": QConfig(activation_bits=16),
                        "weight_ih_l1": None,
                        "weight_hr_l1": QConfig(dtype=torch.float16),
                    },
                ),
            },
            lambda module, x, h, c: module(x, (h, c)),
        )
        example = (torch.randn(3, 5, 6), torch.randn(2, 3, 4), torch.randn(2, 3, 10))
        check(model, tmp_path, example, least=55)

    def test_cells_and_relu(self, tmp_path):
        torch.manual_seed(0)
        cells = {kind.__name__: kind(6, 10) for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)}
        cells["relu"] = nn.RNNCell(6, 10, nonlinearity="relu", bias=False)
        model = Each({name: quantize_dynamic(one) for name, one in cells.items()})
        check(model, tmp_path, (torch.randn(3, 6),), least=100)


class TestEmbedding:
    @pytest.mark.parametrize("dtype", [torch.quint8, torch.quint4x2])
    def test_values(self, tmp_path, dtype):
        model = quantize_dynamic(nn.Embedding(20, 7), dtype=dtype)
        program = export(model, (torch.randint(0, 20, (2, 3)),), verbose=False)
        every = torch.arange(20)[:6].reshape(2, 3)
        (given,) = ran(program, tmp_path, every)
        assert torch.equal(given, model(every))


class TestErrors:
    def test_an_op_without_a_form(self, tmp_path):
        model = Each({"bag": quantize_dynamic(nn.EmbeddingBag(20, 7), dtype=torch.quint8)})
        with pytest.raises(
            ValueError, match=r"^parts\.of_bag: the op embedding_bag has no form in"
        ):
            export(model, (torch.randint(0, 20, (2, 3)),), tmp_path / "a.onnx", verbose=False)
        assert not list(tmp_path.iterdir())

    def test_fused_blocks_in_an_exported_program(self, tmp_path):
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
        fused, x = dynquant.fuse(quantize_dynamic(layer)), torch.randn(2, 5, 16)
        fused(x)
        program = torch.export.export(fused, (x,))
        with pytest.raises(ValueError, match="the fused op .* pass the model itself"):
            export(program, (), tmp_path / "a.onnx", verbose=False)
        assert not list(tmp_path.iterdir())

    def test_arguments(self):
        model, x = linears()["default"], torch.randn(2, 37)
        with pytest.raises(ValueError, match="opset_version is 17; allowed: 18 or more"):
            export(model, (x,), opset_version=17)
        with pytest.raises(TypeError, match="takes no verify"):
            export(model, (x,), verify=True)
