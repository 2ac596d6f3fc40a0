"""python -m dynquant, called as a function and as a program."""

import importlib.metadata
import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compare import assert_same
from torch import nn

import dynquant
from dynquant.__main__ import main, program

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
needs_transformers = pytest.mark.skipif(
    not HAS_TRANSFORMERS, reason="transformers is not installed"
)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def module(tmp_path):
    """The file of a saved module."""
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), tmp_path / "m.pt")
    return tmp_path / "m.pt"


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder with a tokenizer and weights in two forms."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path / "bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sits", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=80,
        vocab_size=len(words),
    )
    BertModel(config).save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"another form of the weights")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


def loaded(path):
    return torch.load(path, weights_only=False)


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def strict_json(path):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(Path(path).read_text(), parse_constant=refuse)


INT8 = dynquant.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)))


class TestQuantizeModule:
    def test_equals_quantize_dynamic(self, module, tmp_path, capsys):
        out = tmp_path / "q.pt"
        assert main(["quantize", str(module), str(out), "--allow-pickle"]) == 0
        assert "2 quantized modules" in capsys.readouterr().out
        x = torch.randn(3, 32)
        assert_same(loaded(out)(x), dynquant.quantize_dynamic(loaded(module))(x))

    def test_options(self, module, tmp_path):
        out = tmp_path / "q.pt"
        options = ["--activation", "per_tensor", "--symmetric", "--weight", "per_tensor"]
        given = [str(module), str(out), "--allow-pickle", *options, "--keep-float", "2"]
        assert main(["quantize", *given]) == 0
        model = loaded(out)
        assert type(model[2]) is nn.Linear
        assert model[0].symmetric and not model[0].per_token
        assert model[0].weight_scale.numel() == 1

    def test_convolutions(self, tmp_path, capsys):
        model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Linear(10, 6)).eval()
        torch.save(model, tmp_path / "m.pt")
        files = [str(tmp_path / "m.pt"), str(tmp_path / "q.pt")]
        assert main(["quantize", "--convolutions", *files, "--allow-pickle"]) == 0
        assert type(loaded(tmp_path / "q.pt")[0]) is dynquant.nn.Conv1d
        files[1] += "2"
        given = ["quantize", "--convolutions", "--dtype", "float16", *files, "--allow-pickle"]
        assert main(given) == 2
        assert "--convolutions: --dtype is float16; allowed: qint8" in capsys.readouterr().err

    def test_names_before_the_files(self, module, tmp_path):
        out = tmp_path / "q.pt"
        given = ["--keep-float", "0,1", "--keep-float", "2", "--dtype", "bfloat16"]
        assert (
            main(["quantize", *given[:2], *given[4:], "--allow-pickle", str(module), str(out)]) == 0
        )
        model = loaded(out)
        assert type(model[0]) is nn.Linear and type(model[2]) is dynquant.nn.Linear16bit
        both = [*given, "--allow-pickle", str(module), str(tmp_path / "none")]
        assert main(["quantize", *both]) == 2  # nothing is left

    def test_raise_bits_below(self, module, tmp_path, capsys):
        torch.save(torch.randn(64, 32), tmp_path / "x.pt")
        given = ["--allow-pickle", "--raise-bits-below", "99", "--inputs", str(tmp_path / "x.pt")]
        with pytest.warns(UserWarning, match="activations in 16 bits, below 99.0 dB in 8"):
            assert main(["quantize", *given, str(module), str(tmp_path / "q.pt")]) == 0
        assert [one.activation_bits for one in loaded(tmp_path / "q.pt")[::2]] == [16, 16]
        assert main(["report", *given, str(module)]) == 0
        assert "16" in capsys.readouterr().out

    def test_keep_float_below(self, module, tmp_path):
        torch.save(torch.randn(64, 32), tmp_path / "x.pt")
        layers = dynquant.compare(
            loaded(module), dynquant.quantize_dynamic(loaded(module)), torch.randn(64, 32)
        ).rows
        limit = str(sum(row["snr_db"] for row in layers) / 2)
        given = ["--allow-pickle", "--keep-float-below", limit, "--inputs", str(tmp_path / "x.pt")]
        with pytest.warns(UserWarning, match="left in float, below"):
            assert main(["quantize", *given, str(module), str(tmp_path / "q.pt")]) == 0
        kept = [type(one) is nn.Linear for one in loaded(tmp_path / "q.pt")]
        assert sum(kept) == 1

    def test_a_full_disk(self, module, tmp_path):
        code = (
            "import resource, signal, sys; from dynquant.__main__ import main\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        given = ["quantize", str(module), str(tmp_path / "q.pt"), "--allow-pickle"]
        done = subprocess.run(
            [sys.executable, "-c", code, *given], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 2, done.stderr
        assert "cannot be written" in done.stderr and "Traceback" not in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]

    def test_nothing_is_unpickled_unasked(self, tmp_path, capsys):
        trace = tmp_path / "trace"
        for name, write in (("a.pt", torch.save), ("b.pt", dump)):
            write(Evil(trace), tmp_path / name)
            for command in (
                ["quantize", str(tmp_path / name), str(tmp_path / "out")],
                ["report", str(tmp_path / name)],
            ):
                assert main(command) == 2
                assert "--allow-pickle" in capsys.readouterr().err
        assert not trace.exists()

    def test_an_output_that_is_there(self, module, tmp_path, capsys):
        (tmp_path / "out").write_text("precious")
        assert main(["quantize", str(module), str(tmp_path / "out"), "--allow-pickle"]) == 2
        assert "exists already" in capsys.readouterr().err
        assert (tmp_path / "out").read_text() == "precious"

    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda path: None, "does not exist"),
            (lambda path: torch.save({"a": torch.ones(2)}, path), "a dict of 1 tensors"),
            (
                lambda path: torch.save(nn.Linear(4, 4).state_dict(), path),
                "an OrderedDict of 2 tensors, a state dict",
            ),
            (lambda path: torch.save(INT8.state_dict(), path), "quantized already"),
            (lambda path: torch.save({"lr": 1}, path), "the keys 'lr', not a module"),
            (lambda path: torch.save(INT8, path), "quantized already, by dynquant"),
            (lambda path: torch.jit.script(nn.Linear(4, 4)).save(path), "is a ScriptModule"),
            (lambda path: torch.save(nn.Sequential(nn.ReLU()), path), "nothing of the model"),
            (lambda path: path.mkdir(), "no config.json"),
            (lambda path: path.write_text("text"), "cannot be loaded"),
        ],
    )
    def test_wrong_input(self, make, message, tmp_path, capsys):
        make(tmp_path / "in")
        out = tmp_path / "out"
        assert main(["quantize", str(tmp_path / "in"), str(out), "--allow-pickle"]) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()

    def test_a_name_that_is_not_there(self, module, tmp_path, capsys):
        torch.save(nn.Sequential(nn.Transformer(8, 2, 1, 1, 8)), module)
        given = [str(module), str(tmp_path / "q"), "--allow-pickle", "--keep-float", "decoder"]
        assert main(["quantize", *given]) == 2
        assert "'decoder'; did you mean '0.decoder'" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]


def dump(value, path):
    path.write_bytes(pickle.dumps(value))


@needs_transformers
class TestQuantizeFolder:
    def test_round_trip(self, folder, tmp_path):
        from transformers import AutoModel, AutoTokenizer

        import dynquant.transformers  # noqa: F401

        out = tmp_path / "q"
        assert main(["quantize", str(folder), str(out), "--keep-float", "pooler"]) == 0
        names = {path.relative_to(out).as_posix() for path in out.rglob("*")}
        assert "1_Pooling/config.json" in names and "pytorch_model.bin" not in names
        tokens = AutoTokenizer.from_pretrained(out)("the cat", return_tensors="pt")
        model = AutoModel.from_pretrained(out)
        assert type(model.pooler.dense) is nn.Linear
        spec = {nn.Linear: dynquant.QConfig(), "pooler": None}
        expected = dynquant.quantize_dynamic(AutoModel.from_pretrained(folder), spec)
        with torch.no_grad():
            assert_same(model(**tokens)[0], expected(**tokens)[0])

    def test_quantized_already(self, folder, tmp_path, capsys):
        assert main(["quantize", str(folder), str(tmp_path / "q")]) == 0
        assert main(["quantize", str(tmp_path / "q"), str(tmp_path / "again")]) == 2
        assert "quantized already, by dynquant" in capsys.readouterr().err

    def test_keep_float_below(self, folder, tmp_path, capsys):
        from transformers import AutoModel

        given = ["--keep-float-below", "60", "--keep-float", "pooler", "--text", "the cat sits"]
        with pytest.warns(UserWarning, match="left in float, below 60.0 dB"):
            assert main(["quantize", *given, str(folder), str(tmp_path / "q")]) == 2
        assert "nothing of the model" in capsys.readouterr().err
        given[1] = "0"
        assert main(["quantize", *given, str(folder), str(tmp_path / "q")]) == 0
        model = AutoModel.from_pretrained(tmp_path / "q")
        assert type(model.pooler.dense) is nn.Linear
        assert type(model.encoder.layer[0].output.dense) is dynquant.nn.Linear

    @pytest.mark.parametrize("measured", [[], ["--keep-float-below", "0", "--text", "the cat"]])
    def test_other_dtypes(self, folder, tmp_path, measured):
        from transformers import AutoModel

        dtypes = ["--dtype", "float16", "--embeddings", "quint8"]
        assert main(["quantize", *dtypes, *measured, str(folder), str(tmp_path / "q")]) == 0
        model = AutoModel.from_pretrained(tmp_path / "q")
        assert type(model.pooler.dense) is dynquant.nn.Linear16bit
        assert type(model.embeddings.word_embeddings) is dynquant.nn.Embedding

    def test_raise_bits_below(self, folder, tmp_path):
        from transformers import AutoModel

        given = ["--raise-bits-below", "99", "--keep-float", "pooler", "--text", "the cat sits"]
        with pytest.warns(UserWarning, match="activations in 16 bits, below 99.0 dB in 8"):
            assert main(["quantize", *given, str(folder), str(tmp_path / "q")]) == 0
        model = AutoModel.from_pretrained(tmp_path / "q")
        assert type(model.pooler.dense) is nn.Linear
        assert model.encoder.layer[0].output.dense.activation_bits == 16

    def test_weights_that_are_pickled(self, folder, tmp_path, capsys):
        (folder / "model.safetensors").unlink()
        assert main(["quantize", str(folder), str(tmp_path / "q")]) == 2
        assert "--allow-pickle" in capsys.readouterr().err

    def test_a_name_that_is_not_there(self, folder, tmp_path, capsys):
        given = [str(folder), str(tmp_path / "q"), "--keep-float", "poolr"]
        with pytest.warns(UserWarning, match="fits no module of BertModel; did you mean 'pooler'"):
            assert main(["quantize", *given]) == 2
        assert "'poolr'; did you mean 'pooler'" in capsys.readouterr().err
        assert not (tmp_path / "q").exists()


CONFIGS = {
    "no JSON": ("{nope", "config.json is not JSON"),
    "a list": ("[1]", "config.json holds a list"),
    "an unknown architecture": ('{"architectures": ["No"]}', "is a No, which this transformers"),
    "no architecture": ('{"architectures": "pipeline"}', "is a pipeline, which this transformers"),
    "no model type": ("{}", "cannot be loaded: Unrecognized model"),
    "another quantization": ('{"quantization_config": "x"}', "is quantized already, by x"),
    "no weights": (
        '{"architectures": ["BertModel"], "model_type": "bert", "quantization_config": null}',
        "cannot be loaded",
    ),
}


@needs_transformers
class TestFoldersThatAreNoModels:
    @pytest.mark.parametrize("config, message", CONFIGS.values(), ids=CONFIGS)
    def test_config(self, config, message, tmp_path, capsys):
        folder = tmp_path / "in"
        folder.mkdir()
        (folder / "config.json").write_text(config)
        (folder / "model.safetensors").write_bytes(bytes(100))
        assert main(["quantize", str(folder), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["in"]

    def test_an_output_within_the_input(self, folder, capsys):
        before = sorted(folder.rglob("*"))
        for out in (folder / "q", folder / "1_Pooling" / "q"):
            assert main(["quantize", str(folder), str(out)]) == 2
            assert "which is copied" in capsys.readouterr().err
        assert sorted(folder.rglob("*")) == before


class Broken(nn.Module):
    """A model whose second layer gives NaN or infinity once it is quantized."""

    def __init__(self, value):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.unreached = nn.Linear(4, 4)
        with torch.no_grad():
            self.second.weight[:] = value

    def forward(self, x):
        return self.second(self.first(x))


class TestReport:
    @pytest.mark.parametrize("value", [3e38, 1e30])
    def test_layers_that_are_lost(self, value, tmp_path, capsys):
        torch.save(Broken(value), tmp_path / "m.pt")
        torch.save(torch.full((3, 4), 1e9), tmp_path / "x.pt")
        given = [str(tmp_path / "m.pt"), "--allow-pickle", "--inputs", str(tmp_path / "x.pt")]
        assert main(["report", *given]) == 0
        report = str(tmp_path / "r.json")
        assert main(["report", *given, "--fail-below", "20", "--json", report]) == 1
        error = capsys.readouterr().err
        assert "second, the whole model" in error and "unreached" not in error
        rows = {row["name"]: row for row in strict_json(report)["rows"]}
        assert rows["unreached"]["snr_db"] is None

    @pytest.mark.parametrize("option", ["--json", "--plot"])
    def test_a_folder_that_is_not_there(self, option, module, tmp_path, capsys):
        torch.save(torch.randn(4, 32), tmp_path / "x.pt")
        given = [str(module), "--allow-pickle", "--inputs", str(tmp_path / "x.pt")]
        assert main(["report", *given, option, str(tmp_path / "no" / "r")]) == 2
        shown = capsys.readouterr()
        assert "no is not a folder" in shown.err and not shown.out  # before the model runs

    def test_of_a_module(self, module, tmp_path, capsys):
        torch.save(torch.randn(4, 32), tmp_path / "x.pt")
        given = [str(module), "--allow-pickle", "--inputs", str(tmp_path / "x.pt")]
        assert main(["report", *given, "--json", str(tmp_path / "r.json")]) == 0
        out = capsys.readouterr().out
        assert "SNR dB" in out and "total" in out
        assert "in model: the same with the quantized model's input" in out
        assert "no parameter stays in float" in out
        rows = strict_json(tmp_path / "r.json")["rows"]
        assert [row["name"] for row in rows] == ["0", "2"]
        assert min(row["snr_db"] for row in rows) > 30
        assert main(["report", *given, "--fail-below", "90"]) == 1
        assert "below 90.0 dB: 0, 2, the whole model" in capsys.readouterr().err

    def test_plot(self, module, tmp_path):
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        torch.save({"input": torch.randn(4, 32)}, tmp_path / "x.pt")
        given = [str(module), "--allow-pickle", "--inputs", str(tmp_path / "x.pt")]
        assert main(["report", *given, "--plot", str(tmp_path / "r.png")]) == 0
        assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")

    def test_inputs_are_not_unpickled(self, module, tmp_path, capsys):
        torch.save(Evil(tmp_path / "trace"), tmp_path / "x.pt")
        given = [str(module), "--allow-pickle", "--inputs", str(tmp_path / "x.pt")]
        assert main(["report", *given]) == 2
        assert "holds no tensors" in capsys.readouterr().err
        assert not (tmp_path / "trace").exists()

    def test_inputs_that_do_not_fit(self, module, tmp_path, capsys):
        torch.save(torch.randn(4, 31), tmp_path / "x.pt")
        given = [str(module), "--allow-pickle", "--inputs", str(tmp_path / "x.pt")]
        assert main(["report", *given]) == 2
        assert "does not run on these inputs" in capsys.readouterr().err
        torch.save(None, tmp_path / "x.pt")
        assert main(["report", *given]) == 2
        assert "does not run on these inputs" in capsys.readouterr().err

    @needs_transformers
    def test_of_a_folder(self, folder, capsys):
        assert main(["report", str(folder), "--text", "the cat", "--text", "the cat sits."]) == 0
        assert "pooler.dense" in capsys.readouterr().out

    @needs_transformers
    def test_a_folder_without_a_tokenizer(self, folder, capsys):
        for path in folder.glob("*token*"):
            path.unlink()
        for path in folder.glob("vocab*"):
            path.unlink()
        assert main(["report", str(folder)]) == 2
        assert "tokenizer" in capsys.readouterr().err


def run(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, "-m", "dynquant", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_bench(tmp_path):
    assert run("bench", "compare", "a", "b").returncode == 2  # from its own arguments
    assert "python -m benchmarks layers" in run("bench", "layers", "--help").stdout
    done = run("bench", "--help", cwd=tmp_path)
    assert done.returncode == 2
    assert "clone of the repository" in done.stderr


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["isa"] == dynquant.info()["isa"]


@pytest.mark.parametrize("command", ["info", "quantize", "report"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"dynquant {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["fly"], ["quantize", "one"], ["report", "one", "--fail-below", "nan"]]
)
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: dynquant" in capsys.readouterr().err


def test_the_bare_command(capsys):
    assert main([]) == 0
    assert "usage: dynquant" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"dynquant {dynquant.__version__}\n"


def test_entry_point():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="dynquant")
    assert entry.load() is program
