"""Quantized models of transformers in float again: ties, config, saving."""

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
