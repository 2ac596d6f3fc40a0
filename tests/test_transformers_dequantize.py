"""Quantized models of transformers as float ones: in float again, and how many parameters."""

import copy
import json

import pytest
import torch
from compare import assert_same
from torch import nn

import dynquant

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from test_transformers_experts import MODELS, SIZES, loaded, model_of, output  # noqa: E402

from dynquant.transformers import DynquantConfig  # noqa: E402

TIED = {
    "Llama": {"tie_word_embeddings": True},
    "GPT2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 99},
    "OPT": {"ffn_dim": 40, "word_embed_proj_dim": 48},
}


def tied_model(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | TIED[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def quantized_by(way, model, folder):
    """The quantized model, made or loaded in one of several ways."""
    model.save_pretrained(folder / "float")
    if way == "by hand":
        return dynquant.quantize_dynamic(model)
    made = loaded(folder / "float", quantization_config=DynquantConfig())
    if way == "while loading":
        return made
    made.save_pretrained(folder / "int8")
    return loaded(folder / "int8")


@pytest.mark.parametrize("way", ["by hand", "while loading", "loaded"])
@pytest.mark.parametrize("kind", [*TIED, *MODELS])
def test_is_the_float_model_again(kind, way, tmp_path):
    model = tied_model(kind) if kind in TIED else model_of(kind)
    made = quantized_by(way, model, tmp_path)
    again = dynquant.dequantize(made)
    assert made.config.quantization_config is not None
    assert {type(one) for one in again.modules()} == {type(one) for one in model.modules()}
    assert again.state_dict().keys() == model.state_dict().keys()
    if kind in TIED:
        head, table = again.get_output_embeddings(), again.get_input_embeddings()
        assert head.weight is table.weight
        assert_same(table.weight, model.get_input_embeddings().weight)
    assert again.all_tied_weights_keys == model.all_tied_weights_keys
    model.load_state_dict(again.state_dict())
    assert_same(output(model), output(again))
    again.save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in config
    assert_same(output(loaded(tmp_path / "again")), output(again))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_method_of_transformers(dtype, tmp_path):
    made = quantized_by("while loading", tied_model("Llama"), tmp_path)
    wanted = dynquant.dequantize(made)
    again = made.dequantize(dtype=dtype)
    assert again is made and not hasattr(again, "hf_quantizer")
    assert not any(type(one).__module__.startswith("dynquant") for one in again.modules())
    assert {one.dtype for one in again.parameters()} == {dtype or torch.float32}
    if dtype is None:
        assert_same(output(again), output(wanted))
    requantized = dynquant.quantize_dynamic(again)
    assert isinstance(requantized.lm_head, dynquant.nn.Linear)
    assert isinstance(again.lm_head, nn.Linear)


@pytest.mark.parametrize("way", ["by hand", "while loading", "loaded"])
@pytest.mark.parametrize("kind", [*TIED, *MODELS])
def test_number_of_parameters(kind, way, tmp_path):
    model = tied_model(kind) if kind in TIED else model_of(kind)
    made = quantized_by(way, model, tmp_path)
    for exclude in (False, True):
        wanted = model.num_parameters(exclude_embeddings=exclude)
        assert made.num_parameters(exclude_embeddings=exclude) == wanted
        assert dynquant.dequantize(made).num_parameters(exclude_embeddings=exclude) == wanted
    trainable = [one.numel() for one in made.parameters() if one.requires_grad]
    assert made.num_parameters(only_trainable=True) == sum(trainable)


def test_number_of_parameters_with_quantized_embeddings(tmp_path):
    model = tied_model("Llama")
    tables = dynquant.QConfig(dtype=torch.quint8)
    made = dynquant.quantize_dynamic(model, {nn.Linear: dynquant.QConfig(), nn.Embedding: tables})
    assert not [one for one in made.parameters() if one.dim() > 1]
    for exclude in (False, True):
        wanted = model.num_parameters(exclude_embeddings=exclude)
        assert made.num_parameters(exclude_embeddings=exclude) == wanted
        assert copy.deepcopy(made).num_parameters(exclude_embeddings=exclude) == wanted
    again = dynquant.dequantize(made)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_number_of_parameters_of_recurrent_and_attention_modules():
    """In a model of transformers; by the plain sums of the float one."""

    class Model(transformers.PreTrainedModel):
        config_class = transformers.BertConfig

        def __init__(self, config):
            super().__init__(config)
            self.lstm, self.attention = nn.LSTM(8, 4, 2), nn.MultiheadAttention(8, 2)
            self.post_init()

    model = Model(transformers.BertConfig())
    made = dynquant.quantize_dynamic(model)
    assert made.num_parameters() == model.num_parameters()
    spec = {nn.Module: dynquant.QConfig(), "lstm.weight_hh_l0": None, "attention.q_proj": None}
    assert dynquant.quantize_dynamic(model, spec).num_parameters() == model.num_parameters()
