"""The architectures that are known: nn.TransformerEncoderLayer, and those of transformers.

A block that transformers copies from model to model stands here once: classes that run its code
are known by it (known.py). Names are those of transformers 5.24 and torch 2.10 to 2.13; an older or
newer version whose blocks have other parts, or call them otherwise, is found out when a block is
fused, and left alone.
"""

import dataclasses

from dynquant.fused.adapters import (
    Adapter,
    Attention,
    FeedForward,
    LinearBlock,
    Relative,
    Sublayers,
    register,
)
from dynquant.fused.adapters import names_in_transformers as _of

_NOT_READ = frozenset({"position_ids", "token_type_ids"})  # passed on to layers that ignore them
_MASKED = ("hidden_states", "attention_mask")
_USUAL = {"arguments": _MASKED, "mask": "attention_mask", "ignored": _NOT_READ}


def _register(names, adapter):
    for name in names:
        register(name, adapter)


def _linear_block(names, argument="hidden_states", **more):
    """A module that is a linear layer with an activation or a norm, or both."""
    block = LinearBlock("dense", **more)
    arguments = (argument, block.residual) if block.residual else (argument,)
    _register(names, Adapter(arguments=arguments, linear_block=block))


# Post-norm layers with the names that BERT has for them; LayoutLM's have no cache.
_bert_core = {"query": "query", "key": "key", "value": "value", "head_dim": "attention_head_size"}
_bert_layer = Adapter(
    arguments=_MASKED,
    attention=Attention(
        **{key: f"attention.self.{name}" for key, name in _bert_core.items()},
        core="attention.self",
        output="attention.output.dense",
        norm="attention.output.LayerNorm",
    ),
    feed_forward=FeedForward(
        up="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        down="output.dense",
        norm="output.LayerNorm",
    ),
    residual=True,
    mask="attention_mask",
    ignored=_NOT_READ,
    whole="chunk_size_feed_forward",
)
_bert_attention = Adapter(
    arguments=_MASKED,
    attention=Attention(**_bert_core),
    mask="attention_mask",
    ignored=_NOT_READ,
    result="weights",
)
_register(_of("layoutlm", "LayoutLMLayer"), _bert_layer)
_register(_of("layoutlm", "LayoutLMSelfAttention"), _bert_attention)
_cached = (*_MASKED, "encoder_hidden_states", "encoder_attention_mask", "cache")
_register(_of("bert", "BertLayer"), dataclasses.replace(_bert_layer, arguments=_cached))
_register(
    _of("bert", "BertSelfAttention"),
    dataclasses.replace(_bert_attention, arguments=(*_MASKED, "cache")),
)
# What a layer is made of, for one that is not fused as a whole: with a cache, say.
_linear_block(_of("bert", "BertIntermediate"), activation="intermediate_act_fn")
_linear_block(_of("bert", "BertSelfOutput"), norm="LayerNorm", residual="input_tensor")
_linear_block(_of("bert", "BertPooler"), activation="activation", first_token=True)

for _model, _name, _norm in (
    ("bert", "BertPredictionHeadTransform", "LayerNorm"),
    ("nomic_bert", "NomicBertPredictionHeadTransform", "layer_norm"),
):
    _linear_block(_of(_model, _name), activation="transform_act_fn", norm=_norm)
_linear_block(
    _of("electra", "ElectraGeneratorPredictions"),
    "generator_hidden_states",
    activation="activation",
    norm="LayerNorm",
)
_linear_block(_of("modernbert", "ModernBertPredictionHead"), activation="act", norm="norm")


def _attention_module(names, attention, **more):
    """A module of transformers that is an attention with its output projection."""
    usual = {**_USUAL, "attention": attention, "result": "weights"}
    _register(names, Adapter(**usual | more))


def _layer(names, attention, feed_forward, **more):
    """A layer of transformers that keeps its attention in a module: its names begin with that."""
    usual = {**_USUAL, "attention": attention, "feed_forward": feed_forward, "residual": True}
    _register(names, Adapter(**usual | more))


def _within(part, names, **more):
    """The names of an Attention or a FeedForward, seen from the module that has it as `part`."""
    found = {
        name: f"{part}.{value}" if value and name != "split" else value
        for name, value in dataclasses.asdict(names).items()
    }
    return dataclasses.replace(names, **found | more)


def _mlp(names, feed_forward, argument="hidden_states"):
    """A module that is a feed-forward block."""
    _register(names, Adapter(arguments=(argument,), feed_forward=feed_forward))


def _projections(output, **more):
    return Attention("q_proj", "k_proj", "v_proj", "head_dim", output, **more)


_distilbert = Attention("q_lin", "k_lin", "v_lin", "attention_head_size", "out_lin")
_distilbert_ffn = FeedForward(up="lin1", activation="activation", down="lin2")
_attention_module(_of("distilbert", "DistilBertSelfAttention"), _distilbert)
_layer(
    _of("distilbert", "TransformerBlock"),
    _within("attention", _distilbert, core="attention", norm="sa_layer_norm"),
    _within("ffn", _distilbert_ffn, norm="output_layer_norm"),
    whole="ffn.chunk_size_feed_forward",
)

_albert = Attention(
    *("query", "key", "value", "attention_head_size", "dense"),
    norm="LayerNorm",
    dropout="output_dropout",
)
_attention_module(_of("albert", "AlbertAttention"), _albert, residual=True)
_layer(
    _of("albert", "AlbertLayer"),
    _within("attention", _albert, core="attention"),
    FeedForward(up="ffn", activation="activation", down="ffn_output", norm="full_layer_layer_norm"),
    whole="chunk_size_feed_forward",
)

_mpnet = Attention("q", "k", "v", "attention_head_size", "o")
_attention_module(
    _of("mpnet", "MPNetSelfAttention"),
    _mpnet,
    arguments=(*_MASKED, "position_bias", "output_attentions"),
    bias="position_bias",
    result="tuple",
)
_layer(
    _of("mpnet", "MPNetLayer"),
    _within("attention.attn", _mpnet, core="attention.attn", norm="attention.LayerNorm"),
    FeedForward(
        up="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        down="output.dense",
        norm="output.LayerNorm",
    ),
    arguments=(*_MASKED, "position_bias", "output_attentions"),
    bias="position_bias",
    result="tuple",
)


def _disentangled(part="", **more):
    """DeBERTa's attention, seen from the module that has it under that name."""

    def of_part(names):
        return {key: part + name for key, name in names.items()}

    relative = {
        "span": "pos_ebd_size",
        "terms": "pos_att_type",
        "shared": "share_att_key",
        "key": "pos_key_proj",
        "query": "pos_query_proj",
    }
    own = {
        "query": "query_proj",
        "key": "key_proj",
        "value": "value_proj",
        "head_dim": "attention_head_size",
    }
    names = Relative(vectors="rel_embeddings", positions="relative_pos", **of_part(relative))
    return Attention(**of_part(own), relative=names, **more)


_deberta = {"mask": "attention_mask", "result": "weights", "family": "disentangled"}
_distances = "query_states", "relative_pos", "rel_embeddings"
_register(
    _of("deberta_v2", "DisentangledSelfAttention"),
    Adapter(
        arguments=(*_MASKED, "output_attentions", *_distances),
        attention=_disentangled(),
        **_deberta,
    ),
)
_register(
    _of("deberta_v2", "DebertaV2Layer"),
    Adapter(
        arguments=(*_MASKED, *_distances, "output_attentions"),
        attention=_disentangled(
            "attention.self.",
            core="attention.self",
            output="attention.output.dense",
            norm="attention.output.LayerNorm",
        ),
        feed_forward=_bert_layer.feed_forward,
        residual=True,
        **_deberta,
    ),
)

# Feed-forward blocks of their own; the layers around them are known below, or have other caches.
_gated = FeedForward(up="up_proj", gate="gate_proj", activation="act_fn", down="down_proj")
_plain = FeedForward(up="fc1", activation="activation_fn", down="fc2")
_mlp(_of("llama", "LlamaMLP") + _of("gte", "GteMLP"), _gated, "x")
_mlp(_of("qwen2_5_vl", "Qwen2_5_VLMLP"), _gated, "hidden_state")
_phi3_mlp = FeedForward(
    up="gate_up_proj", split="gate_first", activation="activation_fn", down="down_proj"
)
_mlp(_of("phi3", "Phi3MLP"), _phi3_mlp)
_mlp(_of("dinov3_vit", "DINOv3ViTMLP"), FeedForward("up_proj", "down_proj", "act_fn"), "x")
_mlp(_of("clip", "CLIPMLP") + _of("detr", "DetrMLP"), _plain)
_gpt_neox = FeedForward(up="dense_h_to_4h", activation="act", down="dense_4h_to_h")
_mlp(_of("gpt_neox", "GPTNeoXMLP"), _gpt_neox)
_mlp(_of("falcon", "FalconMLP"), _gpt_neox, "x")
_gpt2_mlp = FeedForward(up="c_fc", activation="act", down="c_proj")
_mlp(_of("gpt2", "GPT2MLP") + _of("starcoder2", "Starcoder2MLP"), _gpt2_mlp)
_mlp(_of("bark", "BarkMLP"), FeedForward(up="in_proj", activation="gelu", down="out_proj"))
_mlp(
    _of("parakeet", "ParakeetEncoderFeedForward"),
    FeedForward(up="linear1", activation="activation", down="linear2"),
)
_register(
    _of("xlnet", "XLNetFeedForward"),
    Adapter(
        arguments=("inp",),
        feed_forward=FeedForward(
            up="layer_1", activation="activation_function", down="layer_2", norm="layer_norm"
        ),
        residual=True,
    ),
)
_t5 = FeedForward(up="wi", activation="act", down="wo")
_t5_gated = FeedForward(up="wi_1", gate="wi_0", activation="act", down="wo")
_mlp(_of("t5", "T5DenseActDense"), _t5)
_mlp(_of("t5", "T5DenseGatedActDense"), _t5_gated)
_wav2vec2 = FeedForward(
    up="intermediate_dense", activation="intermediate_act_fn", down="output_dense"
)
_mlp(_of("wav2vec2", "Wav2Vec2FeedForward"), _wav2vec2)

_rotary = {
    "arguments": (*_MASKED, "position_embeddings"),
    "rotary": "position_embeddings",
}
for _model, _prefix, _names in (
    ("nomic_bert", "NomicBert", _gated),
    ("gte", "Gte", _gated),
    ("jina_embeddings_v3", "JinaEmbeddingsV3", _plain),
):
    _attention_module(_of(_model, f"{_prefix}Attention"), _projections("o_proj"), **_rotary)
    _layer(
        _of(_model, f"{_prefix}Layer"),
        _within(
            "self_attn", _projections("o_proj"), core="self_attn", norm="post_attention_layernorm"
        ),
        _within("mlp", _names, norm="post_mlp_layernorm"),
        **_rotary,
    )

_esm = {
    "arguments": (*_cached[:-1], "position_embeddings"),
    "rotary": "position_embeddings",
    "whole": "is_decoder",
}
_linear_block(_of("esm", "EsmIntermediate"), activation=":gelu")
_attention_module(_of("esm", "EsmSelfAttention"), _bert_attention.attention, **_esm)
_layer(
    _of("esm", "EsmLayer"),
    dataclasses.replace(_bert_layer.attention, norm="attention.LayerNorm"),
    FeedForward("intermediate.dense", "output.dense", ":gelu", norm="LayerNorm"),
    norm_first=True,
    **_esm,
)

# Decoders.
_behind_a_cache = {
    "arguments": ("hidden_states", "position_embeddings", "attention_mask", "cache"),
    "rotary": "position_embeddings",
    "cache": "cache",
}
_layer_arguments = (*_MASKED, "position_ids", "cache", "use_cache", "position_embeddings")
_in_cache = {"scale": "scaling", "index": "layer_idx"}
_token = _projections("o_proj", **_in_cache)
_token_rotated_or_not = dataclasses.replace(_token, rotates="use_rope")
_token_normed = dataclasses.replace(_token, query_norm="q_norm", key_norm="k_norm")
_phi3 = Attention(
    *("qkv_proj", None, None, "head_dim", "o_proj"), kv_heads="num_key_value_heads", **_in_cache
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
    _attention_module(
        _of(model, f"{prefix}Attention"),
        attention,
        whole=whole,
        **{**_behind_a_cache, "arguments": attention_arguments},
    )
    _layer(
        _of(model, f"{prefix}DecoderLayer"),
        _within("self_attn", attention, core="self_attn", **norms),
        _within("mlp", block, **block_norms),
        norm_first=True,
        whole=whole and f"self_attn.{whole}",
        **{**_behind_a_cache, "arguments": arguments},
    )


_before = {"norm": "input_layernorm"}, {"norm": "post_attention_layernorm"}
for _model, _prefix, _names, _block in (
    ("llama", "Llama", _token, _gated),
    ("mistral", "Mistral", _token, _gated),
    ("qwen2", "Qwen2", _token, _gated),
    ("qwen3", "Qwen3", _token_normed, _gated),
    ("smollm3", "SmolLM3", _token_rotated_or_not, _gated),
    ("phi3", "Phi3", _phi3, _phi3_mlp),
    ("starcoder2", "Starcoder2", _token, _gpt2_mlp),
):
    _decoder(_model, _prefix, _names, _block, *_before)
# Some of its sizes have norms of heads, and some the feed-forward block beside the attention, which
# then has no norm of its own.
_decoder(
    *("stablelm", "StableLm", dataclasses.replace(_token, turned="rotary_ndims"), _gated, *_before),
    whole="qk_layernorm",
    attention_arguments=(*_layer_arguments[:4], "output_attentions", *_layer_arguments[4:]),
)
_mlp(_of("lfm2", "Lfm2MLP"), FeedForward(up="w3", gate="w1", activation=":F.silu", down="w2"), "x")
_attention_module(
    _of("lfm2", "Lfm2Attention"),
    _projections("out_proj", **_in_cache, query_norm="q_layernorm", key_norm="k_layernorm"),
    **_behind_a_cache,
)
_attention_module(
    _of("phi", "PhiAttention"),
    _projections("dense", **_in_cache, turned="rotary_ndims"),
    whole="qk_layernorm",
    **_behind_a_cache,
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
    _decoder(_model, _prefix, _token_normed, _gated, *_behind, whole=_without)
_decoder(
    *("gemma3", "Gemma3", _token_normed, _gated),
    {"norm": "input_layernorm", **_behind[0]},
    {"norm": "pre_feedforward_layernorm", **_behind[1]},
    arguments=(
        *("hidden_states", "position_embeddings", "attention_mask"),
        *("position_ids", "cache"),
    ),
)
_gpt2 = Attention(
    *("c_attn", None, None, "head_dim", "c_proj"), dropout="resid_dropout", **_in_cache
)
_gpt2_arguments = (
    *("hidden_states", "cache", "attention_mask"),
    *("encoder_hidden_states", "encoder_attention_mask"),
)
_attention_module(
    _of("gpt2", "GPT2Attention"),
    _gpt2,
    arguments=(*_gpt2_arguments, "output_attentions"),
    cache="cache",
)
_layer(
    _of("gpt2", "GPT2Block"),
    _within("attn", _gpt2, core="attn", norm="ln_1"),
    _within("mlp", _gpt2_mlp, norm="ln_2"),
    norm_first=True,
    arguments=(*_gpt2_arguments, "use_cache"),
    cache="cache",
)

_attention_module(
    _of("vit", "ViTAttention") + _of("dinov2", "Dinov2Attention"), _projections("o_proj")
)
_layer(
    _of("vit", "ViTLayer"),
    _within("attention", _projections("o_proj"), core="attention", norm="layernorm_before"),
    _within("mlp", _plain, norm="layernorm_after"),
    norm_first=True,
)
for _model, _prefix in (("clip", "CLIP"), ("siglip", "Siglip")):
    _attention_module(_of(_model, f"{_prefix}Attention"), _projections("out_proj"))
    _layer(
        _of(_model, f"{_prefix}EncoderLayer"),
        _within("self_attn", _projections("out_proj"), core="self_attn", norm="layer_norm1"),
        _within("mlp", _plain, norm="layer_norm2"),
        norm_first=True,
    )

# Encoders of speech and of sequence-to-sequence models. Their attention may also be given a second
# sequence.
_two_sequences = ("hidden_states", "key_value_states")
for _model, _prefix, _more in (
    ("whisper", "Whisper", ("output_attentions",)),
    ("bart", "Bart", ()),
):
    _attention_module(
        _of(_model, f"{_prefix}Attention"),
        _projections("out_proj", **_in_cache),
        arguments=(*_two_sequences, "cache", "attention_mask", *_more),
        cache="cache",
        cross="key_value_states",
    )
# T5's first attention makes the bias of positions for the others, which take it as an argument.
_t5_attention = Attention("q", "k", "v", "key_value_proj_dim", "o", **_in_cache)
_behind_a_bias = {"bias": "position_bias", "cache": "cache", "result": "bias"}
_attention_module(
    _of("t5", "T5Attention"),
    _t5_attention,
    arguments=("hidden_states", "mask", "key_value_states", "position_bias", "cache"),
    mask="mask",
    cross="key_value_states",
    **_behind_a_bias,
)
_layer(
    _of("t5", "T5LayerSelfAttention"),
    _within("SelfAttention", _t5_attention, core="SelfAttention", norm="layer_norm"),
    None,
    arguments=(*_MASKED, "position_bias", "cache"),
    norm_first=True,
    **_behind_a_bias,
)
_attention_module(
    _of("wav2vec2", "Wav2Vec2Attention"),
    _projections("out_proj"),
    arguments=(*_two_sequences, "attention_mask", "output_attentions"),
)
for _names, _norm_first in (
    (_of("whisper", "WhisperEncoderLayer"), True),
    (_of("mbart", "MBartEncoderLayer"), True),
    (_of("bart", "BartEncoderLayer"), False),
):
    _layer(
        _names,
        _within(
            "self_attn", _projections("out_proj"), core="self_attn", norm="self_attn_layer_norm"
        ),
        dataclasses.replace(_plain, norm="final_layer_norm"),
        norm_first=_norm_first,
    )
for _name, _norm_first, _whole in (
    ("Wav2Vec2EncoderLayer", False, None),
    ("Wav2Vec2EncoderLayerStableLayerNorm", True, "adapter_layer"),
):
    _layer(
        _of("wav2vec2", _name),
        _within("attention", _projections("out_proj"), core="attention", norm="layer_norm"),
        _within("feed_forward", _wav2vec2, norm="final_layer_norm"),
        norm_first=_norm_first,
        whole=_whole,
    )
# Their decoders, and OPT's, which has no second sequence.
_attention_module(
    _of("opt", "OPTAttention"),
    _projections("out_proj", **_in_cache),
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
    _register(
        _names,
        Adapter(
            arguments=(*_MASKED, *_second, "cache", "use_cache"),
            feed_forward=_plain,
            inline=True,
            sublayers=_sublayers,
            norm_first=_norm_first,
            mask="attention_mask",
            cache="cache",
        ),
    )

_modernbert = Attention("Wqkv", None, None, "head_dim", "Wo", dropout="out_drop")
_modernbert_mlp = FeedForward(up="Wi", activation="act", down="Wo", split="gate_first")
_mlp(_of("modernbert", "ModernBertMLP"), _modernbert_mlp)
_attention_module(
    _of("modernbert", "ModernBertAttention"),
    _modernbert,
    arguments=("hidden_states", "position_embeddings", "attention_mask"),
    rotary="position_embeddings",
)
_layer(
    _of("modernbert", "ModernBertEncoderLayer"),
    _within("attn", _modernbert, core="attn", norm="attn_norm"),
    _within("mlp", _modernbert_mlp, norm="mlp_norm"),
    norm_first=True,
    **_rotary,
)

_torch = Attention("q_proj", "k_proj", "v_proj", "head_dim", "out_proj")
register(
    "dynquant.nn.attention.MultiheadAttention",
    Adapter(
        arguments=("query", "key", "value"),
        attention=_torch,
        result="weights",
        family="torch_attention",
    ),
)
register(
    "torch.nn.modules.transformer.TransformerEncoderLayer",
    Adapter(
        arguments=("src", "src_mask", "src_key_padding_mask", "is_causal"),
        attention=_within("self_attn", _torch, core="self_attn", norm="norm1"),
        feed_forward=FeedForward(
            up="linear1", activation="activation", down="linear2", norm="norm2"
        ),
        residual=True,
        norm_first="norm_first",
        mask="src_mask",
        family="torch_layer",
    ),
)
