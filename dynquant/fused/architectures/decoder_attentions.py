"""Attentions of decoders in layers that are not known."""

from dataclasses import replace

from dynquant.fused.adapters import SharedKeys
from dynquant.fused.adapters import names_in_transformers as _of
from dynquant.fused.architectures.forms import (
    BEHIND_A_CACHE,
    IN_CACHE,
    MASKED,
    TOKEN,
    TOKEN_NORMED,
    attention_module,
    projections,
)

_twice = replace(TOKEN, interleaved="each_twice")
_sinks = replace(TOKEN, sinks="sinks")
_sinks_or_unturned = replace(_sinks, unturned=True)
_values_normed = replace(TOKEN_NORMED, value_norm="v_norm")
_sharing = replace(
    _values_normed,
    shared=SharedKeys(
        states="shared_kv_states",
        entry="layer_type",
        stores="store_full_length_kv",
        reuses="is_kv_shared_layer",
        groups="num_key_value_groups",
    ),
)
_sharing_or_key = replace(_sharing, value_is_key="use_alternative_attention")
_first = BEHIND_A_CACHE["arguments"][:3]
_states_last = {"arguments": (*_first, "cache", "shared_kv_states")}
_states_first = {"arguments": (*_first, "shared_kv_states", "cache")}

# By model and class: the names, and what the adapter has besides.
_ALONE = (
    (
        "lfm2",
        "Lfm2Attention",
        projections("out_proj", **IN_CACHE, query_norm="q_layernorm", key_norm="k_layernorm"),
        {},
    ),
    (
        "phi",
        "PhiAttention",
        projections("dense", **IN_CACHE, turned="rotary_ndims"),
        {"whole": "qk_layernorm"},
    ),
    # Pairs of neighbors turned, or some layers not turned.
    ("cohere", "CohereAttention", _twice, {"whole": "use_qk_norm"}),
    ("cohere2", "Cohere2Attention", replace(_twice, rotates="sliding_window"), {}),
    (
        "granitemoehybrid",
        "GraniteMoeHybridAttention",
        replace(TOKEN, unturned=True),
        {"arguments": (*MASKED, "cache")},
    ),
    ("nemotron_h", "NemotronHAttention", TOKEN, {"arguments": (*MASKED, "cache"), "rotary": None}),
    # Gates.
    ("qwen3_5", "Qwen3_5Attention", replace(TOKEN_NORMED, gated=True), {}),
    ("lfm3", "Lfm3Attention", replace(TOKEN_NORMED, head_gate="g_proj"), {}),
    (
        "afmoe",
        "AfmoeAttention",
        replace(TOKEN_NORMED, head_gate="gate_proj", rotates="is_local_attention"),
        {},
    ),
    # Experts in the layer, an activation that is not known, another form of the layer.
    ("qwen3_vl_moe", "Qwen3VLMoeTextAttention", TOKEN_NORMED, {}),
    ("minimax_m2", "MiniMaxM2Attention", TOKEN_NORMED, {}),
    ("hy_v3", "HYV3Attention", TOKEN_NORMED, {}),
    ("apertus", "ApertusAttention", TOKEN_NORMED, {}),
    ("olmo", "OlmoAttention", TOKEN, {"whole": "config.clip_qkv"}),
    ("olmoe", "OlmoeAttention", TOKEN_NORMED, {"whole": "config.clip_qkv"}),
    ("glm4_moe", "Glm4MoeAttention", TOKEN, {"whole": "use_qk_norm"}),
    (
        "modernbert_decoder",
        "ModernBertDecoderAttention",
        projections("Wo", **IN_CACHE, dropout="out_drop"),
        {},
    ),
    # Scores that stand for nothing.
    ("gpt_oss", "GptOssAttention", replace(_sinks, once=True), {}),
    ("granite_swa", "GraniteSWAAttention", _sinks_or_unturned, {}),
    ("granitemoe_swa", "GraniteMoeSWAAttention", _sinks_or_unturned, {}),
    ("flint", "FlintAttention", replace(TOKEN_NORMED, sinks="sinks", rotates="sliding_window"), {}),
    # Norms of values; keys and values of an earlier layer.
    ("gemma3n", "Gemma3nTextAttention", _sharing, _states_last),
    ("gemma4", "Gemma4TextAttention", _sharing_or_key, _states_first),
    ("gemma4_unified", "Gemma4UnifiedTextAttention", _sharing_or_key, _states_first),
)
for _model, _name, _names, _more in _ALONE:
    attention_module(_of(_model, _name), _names, **{**BEHIND_A_CACHE, **_more})
# All tokens see each other, and there is no cache.
attention_module(
    _of("embedding_gemma2", "EmbeddingGemma2Attention"),
    replace(_values_normed, index=None),
    arguments=(*MASKED, "position_embeddings"),
    rotary="position_embeddings",
)
