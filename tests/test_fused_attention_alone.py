"""Attentions that run as ops in layers of decoders that are not known as a whole."""

import copy
import importlib
import inspect

import pytest
import torch
from compare import assert_same
from fused import Counting, Wrapped, decibels, fused, randomized, small
from test_fused_token import CONFIG, MODELS, NEXT, PROMPT, after_prompt, assert_close
from torch import nn

import dynquant
from dynquant.fused.adapters import registered
from dynquant.fused.block import FusedBlock

GRANITE4 = {
    **CONFIG,
    "layer_types": 2 * ["attention"],
    **{"num_local_experts": 0, "mamba_n_heads": 4, "mamba_d_head": 24},
}
ATTENTION = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
# Both of Cohere turn pairs of neighbors, the second where it has a window; Granite 4 H may have no
# rotary embedding, Nemotron H has none; Qwen 3.5 has gates, LFM3 and AFMoE those of a linear layer
# of their own. Norms are of each head, or of all together (OLMoE, MiniMax M2).
# gpt-oss, Granite with windows and Flint have sinks.
ALONE = {
    "Granite": CONFIG,
    "Cohere": CONFIG,
    "Cohere2": {**CONFIG, "layer_types": ATTENTION, "sliding_window": 8},
    "GraniteMoeHybrid": GRANITE4,
    "GraniteMoeHybrid turned": {**GRANITE4, "position_embedding_type": "rope"},
    "Qwen3_5Text": {**CONFIG, "layer_types": 2 * ["full_attention"]},
    "Lfm3": {**CONFIG, "layer_types": 2 * ["full_attention"], "use_attention_gate": True, **ENDS},
    "Lfm3 without gates": {
        **{**CONFIG, "layer_types": 2 * ["full_attention"], "use_attention_gate": False, **ENDS}
    },
    "Afmoe": {**CONFIG, **EXPERTS, "layer_types": ATTENTION, "sliding_window": 8},
    "Apertus": CONFIG,
    "Olmo": CONFIG,
    "Olmoe": {**CONFIG, **EXPERTS},
    "MiniMaxM2": {**CONFIG, **ENDS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Glm4Moe": {
        **{**CONFIG, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"n_group": 1, "topk_group": 1},
    },
    "NemotronH": {**CONFIG, "layers_block_type": ["attention", "mlp", "attention"]},
    "GptOss": {**CONFIG, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GraniteSWA": {**CONFIG, "layer_types": ATTENTION, "sliding_window": 8},
    "Flint": {**CONFIG, **EXPERTS, "layer_types": ATTENTION, "sliding_window": 8},
    "ModernBertDecoder": {**CONFIG, **ENDS, "cls_token_id": 1, "sep_token_id": 2},
}


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:fuse. left as it is")  # an activation that is not known
def test_an_attention_alone(name, dtype):
    model = randomized(small(name.split()[0], ALONE[name]).to(dtype))
    quantized = dynquant.quantize_dynamic(model)
    model = dynquant.fuse(quantized)
    blocks = {name: model.get_submodule(name) for name in dynquant.fused_blocks(model)}
    found = [
        one.why_not()
        for one in blocks.values()
        if isinstance(one, FusedBlock) and one._current_parts().attention
    ]
    assert found == ["", ""]
    for tokens in (NEXT, PROMPT[:, :3]):
        assert after_prompt(model, tokens)[2]["query_key_value"] == 2
        # Where a byte rounds otherwise, a router may choose another expert.
        limits = (40, 15) if "num_experts_per_tok" in ALONE[name] else (90, 25)
        least = limits[0] if dtype == torch.float32 else limits[1]
        assert_close(model, quantized, least, tokens=tokens)


@pytest.mark.parametrize("name", ["Cohere", "Glm4", "Qwen3_5Text", "Lfm3", "Afmoe", "Ministral3"])
def test_the_attention_is_called_by_its_linear_layers(name):
    """As with an adapter on one of them: to the bits of the op."""
    config = ALONE[name] if name in ALONE else MODELS[name]
    _, model = fused(small(name, config))
    given = {"cache": None, "use_cache": False}
    with torch.no_grad():
        expected = model(input_ids=PROMPT, **given)[0]
        for layer in model.layers:
            layer.self_attn.v_proj = Wrapped(layer.self_attn.v_proj)
        with Counting() as counting:
            found = model(input_ids=PROMPT, **given)[0]
    assert not counting.found["query_key_value"] and counting.found["scaled_dot_product"]
    assert_same(found, expected)


def test_values_that_an_option_changes():
    """Where they are clipped, or normed in some sizes alone, the attention stays as it is."""
    for name, options, why in (
        ("Olmo", {"clip_qkv": 8.0}, "config.clip_qkv is 8.0"),
        ("Glm4Moe", {"use_qk_norm": True}, "use_qk_norm is True"),
    ):
        quantized = dynquant.quantize_dynamic(randomized(small(name, ALONE[name], **options)))
        with pytest.warns(UserWarning, match=why):
            dynquant.fuse(quantized)


def test_a_gate_of_another_size_is_left_as_it_is():
    model = randomized(small("Lfm3", ALONE["Lfm3"]))
    model.layers[0].self_attn.g_proj = nn.Linear(48, 8)
    with pytest.warns(UserWarning, match="8 features of gates for 4 heads"):
        dynquant.fuse(dynquant.quantize_dynamic(model))


def test_arguments_are_those_of_the_classes():
    """In the order in which their forward takes them."""
    for name, adapter in registered().items():
        module, _, kind = name.rpartition(".")
        if not module.startswith("transformers."):
            continue
        forward = inspect.unwrap(getattr(importlib.import_module(module), kind).forward)
        own = list(inspect.signature(forward).parameters)[1:]
        assert own[: len(adapter.arguments)] == list(adapter.arguments), name


@pytest.mark.parametrize("start", [0, 2, 11])
def test_positions_that_stretch_the_query(start):
    """They are those of the call, and both numbers those of the config at that time."""
    quantized, model = fused(small("Ministral3", MODELS["Ministral3"]))
    positions = torch.arange(start, start + PROMPT.shape[1])[None]
    given = {"input_ids": PROMPT, "position_ids": positions, "use_cache": False}
    results = []
    for beta in (0.5, 2.0):
        for one in (model, quantized):
            if beta == 0.5:
                one.config.rope_parameters["llama_4_scaling_beta"] = beta
            else:  # and another config
                for layer in one.layers:
                    layer.self_attn.config = config = copy.deepcopy(one.config)
                    config.rope_parameters["llama_4_scaling_beta"] = beta
        with torch.no_grad(), Counting() as counting:
            found = model(**given)[0]
        assert counting.found["query_key_value"] == 2
        with torch.no_grad():
            assert decibels(found, quantized(**given)[0]) > 90
        results.append(found)
    assert decibels(*results) < 60


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [("Gemma2", "attn_logit_softcapping", 0.3), ("GptOss", "sinks", torch.full((4,), 2.0))],
)
def test_a_change_of_the_softmax_is_noticed(name, attribute, value):
    config = ALONE[name] if name in ALONE else MODELS[name]
    quantized, model = fused(small(name, config))
    before = after_prompt(model)[0][0]
    for one in (model, quantized):
        attention = one.layers[1].self_attn
        assert getattr(attention, attribute) is not None
        if isinstance(value, torch.Tensor):
            value = nn.Parameter(value, requires_grad=False)
        setattr(attention, attribute, value)
    found, _, ops = after_prompt(model)
    assert ops["query_key_value"] == 2 and decibels(found[0], before) < 60
    assert_close(model, quantized)


def test_a_softcap_that_is_none_or_no_number():
    config = MODELS["Gemma2"]
    quantized, model = fused(small("Gemma2", {**config, "attn_logit_softcapping": None}))
    assert after_prompt(model)[2]["query_key_value"] == 2
    assert_close(model, quantized)
    for layer in quantized.layers:
        layer.self_attn.attn_logit_softcapping = -1.0
    with pytest.warns(UserWarning, match="attn_logit_softcapping is -1.0, no positive number"):
        dynquant.fuse(quantized)
