"""Decoders that generate text."""

import dataclasses

from dynquant.fused.adapters import Attention, FeedForward, Stretch
from dynquant.fused.adapters import names_in_transformers as _of
from dynquant.fused.architectures.feed_forward import GATED, GPT2_MLP, PHI3_MLP
from dynquant.fused.architectures.forms import (
    BEHIND_A_CACHE,
    IN_CACHE,
    MASKED,
    TOKEN,
    TOKEN_NORMED,
    attention_module,
    layer,
    mlp,
    within,
)

_layer_arguments = (*MASKED, "position_ids", "cache", "use_cache", "position_embeddings")
_token_rotated_or_not = dataclasses.replace(TOKEN, rotates="use_rope")
_token_stretched = dataclasses.replace(
    TOKEN,
    stretch=Stretch(
        positions="position_ids",
        settings="config.rope_parameters",
        factor="llama_4_scaling_beta",
        length="original_max_position_embeddings",
    ),
)
_token_capped = dataclasses.replace(TOKEN, softcap="attn_logit_softcapping")
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
    attention_arguments=BEHIND_A_CACHE["arguments"],
):
    """The attention and the layer of a decoder. norms, block_norms: as the two parts name them."""
    attention_module(
        _of(model, f"{prefix}Attention"),
        attention,
        whole=whole,
        **{**BEHIND_A_CACHE, "arguments": attention_arguments},
    )
    layer(
        _of(model, f"{prefix}DecoderLayer"),
        within("self_attn", attention, core="self_attn", **norms),
        within("mlp", block, **block_norms),
        norm_first=True,
        whole=whole and f"self_attn.{whole}",
        **{**BEHIND_A_CACHE, "arguments": arguments},
    )


_before = {"norm": "input_layernorm"}, {"norm": "post_attention_layernorm"}
for _model, _prefix, _names, _block in (
    ("llama", "Llama", TOKEN, GATED),
    ("mistral", "Mistral", TOKEN, GATED),
    ("qwen2", "Qwen2", TOKEN, GATED),
    ("qwen3", "Qwen3", TOKEN_NORMED, GATED),
    ("seed_oss", "SeedOss", TOKEN, GATED),
    ("smollm3", "SmolLM3", _token_rotated_or_not, GATED),
    ("phi3", "Phi3", _phi3, PHI3_MLP),
    ("starcoder2", "Starcoder2", TOKEN, GPT2_MLP),
):
    _decoder(_model, _prefix, _names, _block, *_before)
_decoder(
    *("arcee", "Arcee", TOKEN, FeedForward("up_proj", "down_proj", "act_fn")),
    *_before,
)
_decoder(
    *("ministral3", "Ministral3", _token_stretched, GATED, *_before),
    attention_arguments=(*BEHIND_A_CACHE["arguments"][:3], "position_ids", "cache"),
)
# Some of its sizes have norms of heads, and some the feed-forward block beside the attention, which
# then has no norm of its own.
_decoder(
    *("stablelm", "StableLm", dataclasses.replace(TOKEN, turned="rotary_ndims"), GATED, *_before),
    whole="qk_layernorm",
    attention_arguments=(*_layer_arguments[:4], "output_attentions", *_layer_arguments[4:]),
)
mlp(_of("lfm2", "Lfm2MLP"), FeedForward(up="w3", gate="w1", activation=":F.silu", down="w2"), "x")
# Those that turn pairs of neighbors.
_token_of_pairs = dataclasses.replace(TOKEN, interleaved="first_half")
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
    _decoder(_model, _prefix, TOKEN_NORMED, GATED, *_behind, whole=_without)
_gemma_layer = (
    *("hidden_states", "position_embeddings", "attention_mask"),
    *("position_ids", "cache"),
)
for _model, _prefix, _names in (
    ("gemma2", "Gemma2", _token_capped),
    ("gemma3", "Gemma3", TOKEN_NORMED),
):
    _decoder(
        *(_model, _prefix, _names, GATED),
        {"norm": "input_layernorm", **_behind[0]},
        {"norm": "pre_feedforward_layernorm", **_behind[1]},
        arguments=_gemma_layer,
    )
_decoder(
    *("vaultgemma", "VaultGemma", _token_capped, GATED),
    *({"norm": "input_layernorm"}, {"norm": "pre_feedforward_layernorm"}),
    arguments=_gemma_layer,
)
_decoder(
    *("qwen3_vl", "Qwen3VLText", TOKEN_NORMED, GATED),
    *_before,
    arguments=(*_gemma_layer, "use_cache"),
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
