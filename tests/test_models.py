"""Real models: quantized with one call, run, saved, loaded in a new process, compiled."""

import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import models
import pytest
import safetensors.torch
import torch
from compare import assert_same
from torch import nn

import dynquant
from dynquant import QConfig

# What must be quantized in each: how many modules of which type.
LINEARS = {"bert": 13, "gpt2": 1, "whisper": 33, "minilm": 37, "transformer": 8, "speech_lm": 2}
CONV1DS = {"gpt2": 8}
ATTENTIONS = {"transformer": 6}
LOWEST_COSINE = 0.99
LOWEST_SNR = 24


@pytest.fixture(params=models.MODELS)
def name(request):
    missing = [
        package
        for package in models.NEEDS.get(request.param, [])
        if importlib.util.find_spec(package) is None
    ]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed (pip install -e '.[models]')")
    return request.param


_cache = {}


@pytest.fixture
def case(name):
    """(float model, its quantized form, arguments, the float output, the quantized output)"""
    if name not in _cache:
        model, arguments = models.built(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is not available yet is told by other tests
            quantized = dynquant.quantize_dynamic(model)
        outputs = models.output_of(model, arguments), models.output_of(quantized, arguments)
        _cache[name] = model, quantized, arguments, *outputs
    return _cache[name]


def count(model, kind):
    # Those within a quantized attention are its own.
    own = {
        id(part)
        for module in model.modules()
        if isinstance(module, dynquant.nn.MultiheadAttention)
        for part in module.children()
    }
    return sum(type(module) is kind and id(module) not in own for module in model.modules())


def test_one_call_quantizes_every_linear_layer(name, case):
    _, quantized, *_ = case
    assert count(quantized, dynquant.nn.Linear) == LINEARS[name]
    assert count(quantized, dynquant.nn.Conv1D) == CONV1DS.get(name, 0)
    assert count(quantized, dynquant.nn.MultiheadAttention) == ATTENTIONS.get(name, 0)
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())


def test_stays_close_to_float(case):
    *_, wanted, given = case
    assert wanted.shape == given.shape and torch.isfinite(given).all()
    assert torch.cosine_similarity(wanted, given, dim=-1).min() > LOWEST_COSINE
    error = (given - wanted).double()
    snr = 10 * (wanted.double().square().sum() / error.square().sum()).log10()
    assert snr > LOWEST_SNR


def test_compiles_without_a_break(name, case):
    model, quantized, arguments, _, expected = case
    if any(isinstance(module, nn.RNNBase) for module in quantized.modules()):
        pytest.skip("torch.compile does not trace torch's own recurrent layers")
    torch._dynamo.reset()
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    result = models.output_of(compiled, arguments)
    torch.testing.assert_close(result, expected, rtol=0, atol=expected.abs().max().item() / 50)


def test_saved_and_loaded_in_a_new_process(tmp_path):
    """All models in one process, which rebuilds them and loads their quantized weights."""
    for name, (_, quantized, _, _, expected) in _cache.items():
        tensors = {key: value.clone() for key, value in quantized.state_dict().items()}
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
        torch.save(expected, tmp_path / f"{name}.pt")
    assert _cache, "runs after the tests of the models"
    code = "import sys, test_models; test_models.load_and_compare(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == set(_cache)


def load_and_compare(folder):
    """In the new process: other float weights, quantized, take the saved state."""
    for file in sorted(Path(folder).glob("*.safetensors")):
        model, arguments = models.built(file.stem)
        for parameter in model.parameters():
            parameter.data.mul_(0.5)
        quantized = dynquant.quantize_dynamic(model)
        quantized.load_state_dict(safetensors.torch.load_file(file))
        expected = torch.load(file.with_suffix(".pt"), weights_only=True)
        assert_same(models.output_of(quantized, arguments), expected, file.stem)
        print(file.stem)


def test_float_checkpoints_load(name, case):
    model, quantized, arguments, _, expected = case
    other, _ = models.built(name)
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    loaded = dynquant.quantize_dynamic(other, inplace=True)
    loaded.load_state_dict(model.state_dict())
    assert_same(models.output_of(loaded, arguments), expected)


class TestTiedHead:
    """transformers ties GPT-2's lm_head to its embedding again whenever it thinks fit."""

    @pytest.fixture
    def gpt2(self):
        pytest.importorskip("transformers", reason="transformers is not installed")
        return models.built("gpt2")

    def test_tie_weights(self, gpt2):
        model, arguments = gpt2
        embedding = model.transformer.wte.weight
        quantized = dynquant.quantize_dynamic(model)
        expected = models.output_of(quantized, arguments)
        quantized.tie_weights()
        assert isinstance(quantized.lm_head, dynquant.nn.Linear)
        assert_same(quantized.transformer.wte.weight, embedding)
        assert_same(models.output_of(quantized, arguments), expected)

    @pytest.mark.parametrize("head", [torch.qint8, torch.float16, None], ids=str)
    @pytest.mark.parametrize("table", [torch.quint8, torch.quint4x2], ids=str)
    def test_tie_weights_with_a_quantized_embedding(self, gpt2, table, head):
        """The head keeps its weight, int8 or 16 bits or float; the embedding its table."""
        model, arguments = gpt2
        spec = {nn.Embedding: QConfig(dtype=table)}
        if head is not None:
            spec[nn.Linear] = QConfig(dtype=head)
        quantized = dynquant.quantize_dynamic(model, spec)
        held = quantized.state_dict()
        expected = models.output_of(quantized, arguments)
        quantized.tie_weights()
        quantized.tie_weights(recompute_mapping=False)
        for key, value in quantized.state_dict().items():
            assert_same(value, held[key], key)
        assert_same(models.output_of(quantized, arguments), expected)
        assert type(quantized.transformer.wte) is dynquant.nn.Embedding
        assert model._tied_weights_keys == type(model)._tied_weights_keys

    def test_resizing_is_an_error_that_changes_nothing(self, gpt2):
        model, arguments = gpt2
        quantized = dynquant.quantize_dynamic(model, {nn.Embedding: QConfig(dtype=torch.quint8)})
        expected = models.output_of(quantized, arguments)
        with pytest.raises(TypeError, match="dynquant.nn.embedding.Embedding.* is not an instance"):
            quantized.resize_token_embeddings(model.config.vocab_size + 3)
        assert_same(models.output_of(quantized, arguments), expected)

    def test_generates(self, gpt2):
        model, arguments = gpt2
        quantized = dynquant.quantize_dynamic(model)
        ids = arguments["input_ids"]
        tokens = quantized.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert tokens.shape == (2, 16)
