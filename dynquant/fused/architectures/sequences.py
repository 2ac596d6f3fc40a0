"""Encoders of speech, and sequence-to-sequence models."""

import dataclasses

from dynquant.fused.adapters import Adapter, Attention, FeedForward, Sublayers
from dynquant.fused.adapters import names_in_transformers as _of
from dynquant.fused.architectures.feed_forward import PLAIN, WAV2VEC2
from dynquant.fused.architectures.forms import (
    IN_CACHE,
    MASKED,
    attention_module,
    layer,
    mlp,
    projections,
    register_all,
    within,
)

# Encoders of speech and of sequence-to-sequence models. Their attention may also be given a second
# sequence.
_two_sequences = ("hidden_states", "key_value_states")
for _model, _prefix, _more in (
    ("whisper", "Whisper", ("output_attentions",)),
    ("bart", "Bart", ()),
):
    attention_module(
        _of(_model, f"{_prefix}Attention"),
        projections("out_proj", **IN_CACHE),
        arguments=(*_two_sequences, "cache", "attention_mask", *_more),
        cache="cache",
        cross="key_value_states",
    )
_moonshine = projections("o_proj", **IN_CACHE, interleaved="first_half")
attention_module(
    _of("moonshine", "MoonshineAttention"),
    _moonshine,
    arguments=(
        *("hidden_states", "position_embeddings", "attention_mask", "cache"),
        "key_value_states",
    ),
    rotary="position_embeddings",
    cache="cache",
    cross="key_value_states",
)
layer(
    _of("moonshine", "MoonshineEncoderLayer"),
    within(
        "self_attn",
        dataclasses.replace(_moonshine, index=None),
        core="self_attn",
        norm="input_layernorm",
    ),
    within("mlp", PLAIN, norm="post_attention_layernorm"),
    norm_first=True,
    arguments=(*MASKED, "position_ids", "cache", "use_cache", "position_embeddings"),
    rotary="position_embeddings",
)
mlp(
    _of("moonshine", "MoonshineDecoderMLP"),
    FeedForward(up="fc1", split="up_first", activation="activation_fn", down="fc2"),
)
# T5's first attention makes the bias of positions for the others, which take it as an argument.
_t5_attention = Attention("q", "k", "v", "key_value_proj_dim", "o", **IN_CACHE)
_behind_a_bias = {"bias": "position_bias", "cache": "cache", "result": "bias"}
attention_module(
    _of("t5", "T5Attention"),
    _t5_attention,
    arguments=("hidden_states", "mask", "key_value_states", "position_bias", "cache"),
    mask="mask",
    cross="key_value_states",
    **_behind_a_bias,
)
layer(
    _of("t5", "T5LayerSelfAttention"),
    within("SelfAttention", _t5_attention, core="SelfAttention", norm="layer_norm"),
    None,
    arguments=(*MASKED, "position_bias", "cache"),
    norm_first=True,
    **_behind_a_bias,
)
attention_module(
    _of("wav2vec2", "Wav2Vec2Attention"),
    projections("out_proj"),
    arguments=(*_two_sequences, "attention_mask", "output_attentions"),
)
for _names, _norm_first in (
    (_of("whisper", "WhisperEncoderLayer"), True),
    (_of("mbart", "MBartEncoderLayer"), True),
    (_of("bart", "BartEncoderLayer"), False),
):
    layer(
        _names,
        within("self_attn", projections("out_proj"), core="self_attn", norm="self_attn_layer_norm"),
        dataclasses.replace(PLAIN, norm="final_layer_norm"),
        norm_first=_norm_first,
    )
for _name, _norm_first, _whole in (
    ("Wav2Vec2EncoderLayer", False, None),
    ("Wav2Vec2EncoderLayerStableLayerNorm", True, "adapter_layer"),
):
    layer(
        _of("wav2vec2", _name),
        within("attention", projections("out_proj"), core="attention", norm="layer_norm"),
        within("feed_forward", WAV2VEC2, norm="final_layer_norm"),
        norm_first=_norm_first,
        whole=_whole,
    )
# Their decoders, and OPT's, which has no second sequence.
attention_module(
    _of("opt", "OPTAttention"),
    projections("out_proj", **IN_CACHE),
    arguments=("hidden_states", "cache", "attention_mask", "output_attentions"),
    cache="cache",
)
_one_sequence = Sublayers("self_attn", "self_attn_layer_norm", "final_layer_norm")
_with_a_second = dataclasses.replace(
    _one_sequence,
    cross="encoder_attn",
    cross_norm="encoder_attn_layer_norm",
    second="encoder_hidden_states",
    second_mask="encoder_attention_mask",
)
for _names, _norm_first, _sublayers in (
    (_of("whisper", "WhisperDecoderLayer"), True, _with_a_second),
    (_of("mbart", "MBartDecoderLayer"), True, _with_a_second),
    (_of("bart", "BartDecoderLayer"), False, _with_a_second),
    (_of("opt", "OPTDecoderLayer"), "do_layer_norm_before", _one_sequence),
):
    _second = (_sublayers.second, _sublayers.second_mask) if _sublayers.second else ()
    register_all(
        _names,
        Adapter(
            arguments=(*MASKED, *_second, "cache", "use_cache"),
            feed_forward=PLAIN,
            inline=True,
            sublayers=_sublayers,
            norm_first=_norm_first,
            mask="attention_mask",
            cache="cache",
        ),
    )
