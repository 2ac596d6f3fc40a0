"""Mixture-of-experts models of transformers: quantized while loading, saved, and loaded again."""

import copy
import json
import re
import warnings

import pytest
import torch
from compare import assert_same

import dynquant

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from dynquant.swap.floats import share_in_float  # noqa: E402
from dynquant.transformers import DynquantConfig, DynquantQuantizer  # noqa: E402

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "vocab_size": 99,
    "num_experts_per_tok": 2,
}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "GptOss": {"num_local_experts": 4},
    "DeepseekV3": {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "head_dim": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
    },
}


def model_of(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | MODELS[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name:  # so that they count for something
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def output(model):
    return model(torch.arange(18).reshape(2, 9) * 5).logits


def experts_in(model):
    return [one for one in model.modules() if isinstance(one, dynquant.nn.Experts)]


def loaded(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


@pytest.mark.parametrize("kind", MODELS)
class TestRoundTrip:
    def test_quantized_while_loading(self, kind, tmp_path):
        model = model_of(kind)
        model.save_pretrained(tmp_path / "float")
        wanted = dynquant.quantize_dynamic(model)
        made = loaded(tmp_path / "float", quantization_config=DynquantConfig())
        assert len(experts_in(made)) == (1 if kind == "DeepseekV3" else 2)
        assert_same(output(made), output(wanted))
        made.save_pretrained(tmp_path / "int8")
        assert_same(output(loaded(tmp_path / "int8")), output(wanted))

    def test_quantized_by_hand(self, kind, tmp_path):
        made = dynquant.quantize_dynamic(model_of(kind))
        made.save_pretrained(tmp_path)
        again = loaded(tmp_path)
        assert len(experts_in(again)) == len(experts_in(made))
        assert_same(output(again), output(made))
        again.save_pretrained(tmp_path / "again")
        assert_same(output(loaded(tmp_path / "again")), output(made))
        assert_same(output(copy.deepcopy(again)), output(made))

    def test_in_16_bits(self, kind, tmp_path):
        model = model_of(kind)
        model.save_pretrained(tmp_path / "float")
        wanted = dynquant.quantize_dynamic(model, dtype=torch.float16)
        made = loaded(tmp_path / "float", quantization_config=DynquantConfig(dtype="float16"))
        assert type(experts_in(made)[0]) is dynquant.nn.HalfExperts
        assert_same(output(made), output(wanted))
        made.save_pretrained(tmp_path / "half")
        assert_same(output(loaded(tmp_path / "half")), output(wanted))

    def test_kept_in_float(self, kind, tmp_path):
        model = model_of(kind)
        model.save_pretrained(tmp_path / "float")
        config = DynquantConfig(modules_to_not_convert=["experts"])
        made = loaded(tmp_path / "float", quantization_config=config)
        assert not experts_in(made)
        made.save_pretrained(tmp_path / "int8")
        again = loaded(tmp_path / "int8")
        assert not experts_in(again)
        assert_same(output(again), output(made))


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_quantized_when_their_weights_are_read(kind, tmp_path, monkeypatch):
    """Before the weights of the next layer are there."""
    model_of(kind).save_pretrained(tmp_path)
    held, original = [], dynquant.nn.Experts.from_float
    preprocess, root = DynquantQuantizer.preprocess_model, []

    def counting(cls, mod, *args, **kwargs):
        held.append(sum(not p.is_meta and p.dim() == 3 for p in root[0].parameters()))
        return original(mod, *args, **kwargs)

    def watched(self, model, **kwargs):
        root.append(model)
        return preprocess(self, model, **kwargs)

    monkeypatch.setattr(dynquant.nn.Experts, "from_float", classmethod(counting))
    monkeypatch.setattr(DynquantQuantizer, "preprocess_model", watched)
    loaded(tmp_path, quantization_config=DynquantConfig())
    assert held == [2, 2]


def test_experts_with_a_norm(tmp_path):
    """Whose weight is loaded beside them."""
    config = transformers.MuseSparkTextConfig(
        **SIZES | {"num_local_experts": 4, "moe_hidden_size": 24, "sliding_window": 8}
    )
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "post_expert_norm" in name:
            torch.nn.init.uniform_(parameter)
    made = dynquant.quantize_dynamic(model)
    made.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    ids = torch.arange(18).reshape(2, 9)
    with torch.no_grad():
        assert_same(again(ids)[0], made(ids)[0])
    assert len(experts_in(again)) == len(experts_in(made)) > 0


def test_what_is_saved(tmp_path):
    dynquant.quantize_dynamic(model_of("Qwen3Moe")).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.experts"
    assert state[f"{name}.gate_up_proj_int8"].shape == (4, 80, 48)
    assert state[f"{name}.down_proj_scale"].shape == (4, 48)
    config = json.loads((tmp_path / "config.json").read_text())
    assert name in config["quantization_config"]["modules"]


def test_what_stays_in_float():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = dynquant.quantize_dynamic(model_of("Mixtral"))
    share = float(re.match(r"[0-9.]+", share_in_float(made))[0])
    assert share < 12 and "Experts" not in share_in_float(made)
