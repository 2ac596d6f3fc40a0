"""Decoders that generate text."""

import dataclasses

from dynquant.fused.adapters import Attention, FeedForward, SharedKeys, Stretch
from dynquant.fused.adapters import names_in_transformers as _of
from dynquant.fused.architectures.feed_forward import GATED, GPT2_MLP, PHI3_MLP
from dynquant.fused.architectures.forms import (
    IN_CACHE,
    MASKED,
    attention_module,
    layer,
    mlp,
    projections,
    within,
)

_behind_a_cache = {
    "arguments": ("hidden_states", "position_embeddings", "attention_mask", "cache"),
    "rotary": "position_embeddings",
    "cache": "cache",
}
_layer_arguments = (*MASKED, "position_ids", "cache", "use_cache", "position_embeddings")
_token = projections("o_proj", **IN_CACHE)
_token_rotated_or_not = dataclasses.replace(_token, rotates="use_rope")
_token_normed = dataclasses.replace(_token, query_norm="q_norm", key_norm="k_norm")
_token_stretched = dataclasses.replace(
    _token,
    stretch=Stretch(
        positions="position_ids",
        settings="config.rope_parameters",
        factor="llama_4_scaling_beta",
        length="original_max_position_embeddings",
    ),
)
_phi3 = Attention(
    *("qkv_proj", None, None, "head_dim", "o_proj"), kv_heads="num_key_value_heads", **IN_CACHE
)


def _decoder(
    model,
    prefix,
    attention,
    block,
    norms,
    block_norms,
    arguments=_layer_arguments,
    whole=None,
    attention_arguments=_behind_a_cache["arguments"],
):
    """The attention and the layer of a decoder. norms, block_norms: as the two parts name them."""
    attention_module(
        _of(model, f"{prefix}Attention"),
        attention,
        whole=whole,
        **{**_behind_a_cache, "arguments": attention_arguments},
    )
    layer(
        _of(model, f"{prefix}DecoderLayer"),
        within("self_attn", attention, core="self_attn", **norms),
        within("mlp", block, **block_norms),
        norm_first=True,
        whole=whole and f"self_attn.{whole}",
        **{**_behind_a_cache, "arguments": arguments},
    )


_before = {"norm": "input_layernorm"}, {"norm": "post_attention_layernorm"}
for _model, _prefix, _names, _block in (
    ("llama", "Llama", _token, GATED),
    ("mistral", "Mistral", _token, GATED),
    ("qwen2", "Qwen2", _token, GATED),
    ("qwen3", "Qwen3", _token_normed, GATED),
    ("qwen3_vl", "Qwen3VLText", _token_normed, GATED),
    ("seed_oss", "SeedOss", _token, GATED),
    ("smollm3", "SmolLM3", _token_rotated_or_not, GATED),
    ("phi3", "Phi3", _phi3, PHI3_MLP),
    ("starcoder2", "Starcoder2", _token, GPT2_MLP),
):
    _decoder(_model, _prefix, _names, _block, *_before)
_decoder(
    *("arcee", "Arcee", _token, FeedForward("up_proj", "down_proj", "act_fn")),
    *_before,
)
_decoder(
    *("ministral3", "Ministral3", _token_stretched, GATED, *_before),
    attention_arguments=(*_behind_a_cache["arguments"][:3], "position_ids", "cache"),
)
# Some of its sizes have norms of heads, and some the feed-forward block beside the attention, which
# then has no norm of its own.
_decoder(
    *("stablelm", "StableLm", dataclasses.replace(_token, turned="rotary_ndims"), GATED, *_before),
    whole="qk_layernorm",
    attention_arguments=(*_layer_arguments[:4], "output_attentions", *_layer_arguments[4:]),
)
mlp(_of("lfm2", "Lfm2MLP"), FeedForward(up="w3", gate="w1", activation=":F.silu", down="w2"), "x")
attention_module(
    _of("lfm2", "Lfm2Attention"),
    projections("out_proj", **IN_CACHE, query_norm="q_layernorm", key_norm="k_layernorm"),
    **_behind_a_cache,
)
attention_module(
    _of("phi", "PhiAttention"),
    projections("dense", **IN_CACHE, turned="rotary_ndims"),
    whole="qk_layernorm",
    **_behind_a_cache,
)
# Those that turn pairs of neighbors.
_token_of_pairs = dataclasses.replace(_token, interleaved="first_half")
for _model, _prefix, _block in (
    ("glm", "Glm", PHI3_MLP),
    ("helium", "Helium", GATED),
    ("ernie4_5", "Ernie4_5", GATED),
):
    _decoder(_model, _prefix, _token_of_pairs, _block, *_before)
_decoder(
    *("glm4", "Glm4", _token_of_pairs, PHI3_MLP),
    {"norm": "input_layernorm", "result_norm": "post_self_attn_layernorm"},
    {"norm": "post_attention_layernorm", "result_norm": "post_mlp_layernorm"},
)
_twice = dataclasses.replace(_token, interleaved="each_twice")
attention_module(_of("cohere", "CohereAttention"), _twice, whole="use_qk_norm", **_behind_a_cache)
attention_module(
    _of("cohere2", "Cohere2Attention"),
    dataclasses.replace(_twice, rotates="sliding_window"),
    **_behind_a_cache,
)
# Attentions in layers that are not known: with gates, norms of heads, activations that are not
# known, experts, and without rotation in all layers or some.
attention_module(
    _of("qwen3_5", "Qwen3_5Attention"),
    dataclasses.replace(_token_normed, gated=True),
    **_behind_a_cache,
)
for _model, _name, _gate in (
    ("lfm3", "Lfm3Attention", {"head_gate": "g_proj"}),
    ("afmoe", "AfmoeAttention", {"head_gate": "gate_proj", "rotates": "is_local_attention"}),
    ("qwen3_vl_moe", "Qwen3VLMoeTextAttention", {}),
    ("minimax_m2", "MiniMaxM2Attention", {}),
    ("hy_v3", "HYV3Attention", {}),
    ("apertus", "ApertusAttention", {}),
):
    attention_module(
        _of(_model, _name), dataclasses.replace(_token_normed, **_gate), **_behind_a_cache
    )
attention_module(
    _of("modernbert_decoder", "ModernBertDecoderAttention"),
    projections("Wo", **IN_CACHE, dropout="out_drop"),
    **_behind_a_cache,
)
for _model, _name, _names, _whole in (
    ("olmo", "OlmoAttention", _token, "config.clip_qkv"),
    ("olmoe", "OlmoeAttention", _token_normed, "config.clip_qkv"),
    ("glm4_moe", "Glm4MoeAttention", _token, "use_qk_norm"),
):
    attention_module(_of(_model, _name), _names, whole=_whole, **_behind_a_cache)
attention_module(
    _of("nemotron_h", "NemotronHAttention"),
    _token,
    arguments=(*MASKED, "cache"),
    cache="cache",
)
attention_module(
    _of("granitemoehybrid", "GraniteMoeHybridAttention"),
    dataclasses.replace(_token, unturned=True),
    **{**_behind_a_cache, "arguments": ("hidden_states", "attention_mask", "cache")},
)
# Norms of values as well, and layers that take keys and values from one before them; where all
# tokens see each other, there is no cache.
_values_normed = dataclasses.replace(_token_normed, value_norm="v_norm")
attention_module(
    _of("embedding_gemma2", "EmbeddingGemma2Attention"),
    dataclasses.replace(_values_normed, index=None),
    arguments=(*MASKED, "position_embeddings"),
    rotary="position_embeddings",
)
_sharing = dataclasses.replace(
    _values_normed,
    shared=SharedKeys(
        states="shared_kv_states",
        entry="layer_type",
        stores="store_full_length_kv",
        reuses="is_kv_shared_layer",
        groups="num_key_value_groups",
    ),
)
_first = _behind_a_cache["arguments"][:3]
attention_module(
    _of("gemma3n", "Gemma3nTextAttention"),
    _sharing,
    **{**_behind_a_cache, "arguments": (*_first, "cache", "shared_kv_states")},
)
for _model, _prefix in (("gemma4", "Gemma4"), ("gemma4_unified", "Gemma4Unified")):
    attention_module(
        _of(_model, f"{_prefix}TextAttention"),
        dataclasses.replace(_sharing, value_is_key="use_alternative_attention"),
        **{**_behind_a_cache, "arguments": (*_first, "shared_kv_states", "cache")},
    )
# No norm before the attention or the feed-forward block, and one of what it gives. With a sliding
# window, Exaone rotates in the layers alone that have it.
_behind = (
    {"result_norm": "post_attention_layernorm"},
    {"result_norm": "post_feedforward_layernorm"},
)
for _model, _prefix, _without in (
    ("olmo2", "Olmo2", None),
    ("olmo3", "Olmo3", None),
    ("exaone4", "Exaone4", "sliding_window"),
):
    _decoder(_model, _prefix, _token_normed, GATED, *_behind, whole=_without)
_decoder(
    *("gemma3", "Gemma3", _token_normed, GATED),
    {"norm": "input_layernorm", **_behind[0]},
    {"norm": "pre_feedforward_layernorm", **_behind[1]},
    arguments=(
        *("hidden_states", "position_embeddings", "attention_mask"),
        *("position_ids", "cache"),
    ),
)
_gpt2 = Attention(
    *("c_attn", None, None, "head_dim", "c_proj"), dropout="resid_dropout", **IN_CACHE
)
_gpt2_arguments = (
    *("hidden_states", "cache", "attention_mask"),
    *("encoder_hidden_states", "encoder_attention_mask"),
)
attention_module(
    _of("gpt2", "GPT2Attention"),
    _gpt2,
    arguments=(*_gpt2_arguments, "output_attentions"),
    cache="cache",
)
layer(
    _of("gpt2", "GPT2Block"),
    within("attn", _gpt2, core="attn", norm="ln_1"),
    within("mlp", GPT2_MLP, norm="ln_2"),
    norm_first=True,
    arguments=(*_gpt2_arguments, "use_cache"),
    cache="cache",
)
