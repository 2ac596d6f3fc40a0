"""Encoders of text, of BERT's kind and others, and of proteins."""

import dataclasses

from dynquant.fused.adapters import Adapter, Attention, FeedForward, Relative
from dynquant.fused.adapters import names_in_transformers as _of
from dynquant.fused.architectures.feed_forward import GATED, PLAIN
from dynquant.fused.architectures.forms import (
    MASKED,
    NOT_READ,
    attention_module,
    layer,
    linear_block,
    mlp,
    projections,
    register_all,
    within,
)

# Post-norm layers with the names that BERT has for them; LayoutLM's have no cache.
_bert_core = {"query": "query", "key": "key", "value": "value", "head_dim": "attention_head_size"}
_bert_layer = Adapter(
    arguments=MASKED,
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
    ignored=NOT_READ,
    whole="chunk_size_feed_forward",
)
_bert_attention = Adapter(
    arguments=MASKED,
    attention=Attention(**_bert_core),
    mask="attention_mask",
    ignored=NOT_READ,
    result="weights",
)
register_all(_of("layoutlm", "LayoutLMLayer"), _bert_layer)
register_all(_of("layoutlm", "LayoutLMSelfAttention"), _bert_attention)
_cached = (*MASKED, "encoder_hidden_states", "encoder_attention_mask", "cache")
register_all(_of("bert", "BertLayer"), dataclasses.replace(_bert_layer, arguments=_cached))
register_all(
    _of("bert", "BertSelfAttention"),
    dataclasses.replace(_bert_attention, arguments=(*MASKED, "cache")),
)
# What a layer is made of, for one that is not fused as a whole: with a cache, say.
linear_block(_of("bert", "BertIntermediate"), activation="intermediate_act_fn")
linear_block(_of("bert", "BertSelfOutput"), norm="LayerNorm", residual="input_tensor")
linear_block(_of("bert", "BertPooler"), activation="activation", first_token=True)

for _model, _name, _norm in (
    ("bert", "BertPredictionHeadTransform", "LayerNorm"),
    ("nomic_bert", "NomicBertPredictionHeadTransform", "layer_norm"),
):
    linear_block(_of(_model, _name), activation="transform_act_fn", norm=_norm)
linear_block(
    _of("electra", "ElectraGeneratorPredictions"),
    "generator_hidden_states",
    activation="activation",
    norm="LayerNorm",
)
linear_block(_of("modernbert", "ModernBertPredictionHead"), activation="act", norm="norm")

_distilbert = Attention("q_lin", "k_lin", "v_lin", "attention_head_size", "out_lin")
_distilbert_ffn = FeedForward(up="lin1", activation="activation", down="lin2")
attention_module(_of("distilbert", "DistilBertSelfAttention"), _distilbert)
layer(
    _of("distilbert", "TransformerBlock"),
    within("attention", _distilbert, core="attention", norm="sa_layer_norm"),
    within("ffn", _distilbert_ffn, norm="output_layer_norm"),
    whole="ffn.chunk_size_feed_forward",
)

_albert = Attention(
    *("query", "key", "value", "attention_head_size", "dense"),
    norm="LayerNorm",
    dropout="output_dropout",
)
attention_module(_of("albert", "AlbertAttention"), _albert, residual=True)
layer(
    _of("albert", "AlbertLayer"),
    within("attention", _albert, core="attention"),
    FeedForward(up="ffn", activation="activation", down="ffn_output", norm="full_layer_layer_norm"),
    whole="chunk_size_feed_forward",
)

_mpnet = Attention("q", "k", "v", "attention_head_size", "o")
attention_module(
    _of("mpnet", "MPNetSelfAttention"),
    _mpnet,
    arguments=(*MASKED, "position_bias", "output_attentions"),
    bias="position_bias",
    result="tuple",
)
layer(
    _of("mpnet", "MPNetLayer"),
    within("attention.attn", _mpnet, core="attention.attn", norm="attention.LayerNorm"),
    FeedForward(
        up="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        down="output.dense",
        norm="output.LayerNorm",
    ),
    arguments=(*MASKED, "position_bias", "output_attentions"),
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
register_all(
    _of("deberta_v2", "DisentangledSelfAttention"),
    Adapter(
        arguments=(*MASKED, "output_attentions", *_distances),
        attention=_disentangled(),
        **_deberta,
    ),
)
register_all(
    _of("deberta_v2", "DebertaV2Layer"),
    Adapter(
        arguments=(*MASKED, *_distances, "output_attentions"),
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

_rotary = {
    "arguments": (*MASKED, "position_embeddings"),
    "rotary": "position_embeddings",
}
for _model, _prefix, _names in (
    ("nomic_bert", "NomicBert", GATED),
    ("gte", "Gte", GATED),
    ("jina_embeddings_v3", "JinaEmbeddingsV3", PLAIN),
):
    attention_module(_of(_model, f"{_prefix}Attention"), projections("o_proj"), **_rotary)
    layer(
        _of(_model, f"{_prefix}Layer"),
        within(
            "self_attn", projections("o_proj"), core="self_attn", norm="post_attention_layernorm"
        ),
        within("mlp", _names, norm="post_mlp_layernorm"),
        **_rotary,
    )

_esm = {
    "arguments": (*_cached[:-1], "position_embeddings"),
    "rotary": "position_embeddings",
    "whole": "is_decoder",
}
linear_block(_of("esm", "EsmIntermediate"), activation=":gelu")
attention_module(_of("esm", "EsmSelfAttention"), _bert_attention.attention, **_esm)
layer(
    _of("esm", "EsmLayer"),
    dataclasses.replace(_bert_layer.attention, norm="attention.LayerNorm"),
    FeedForward("intermediate.dense", "output.dense", ":gelu", norm="LayerNorm"),
    norm_first=True,
    **_esm,
)

_modernbert = Attention("Wqkv", None, None, "head_dim", "Wo", dropout="out_drop")
_modernbert_mlp = FeedForward(up="Wi", activation="act", down="Wo", split="gate_first")
mlp(_of("modernbert", "ModernBertMLP"), _modernbert_mlp)
attention_module(
    _of("modernbert", "ModernBertAttention"),
    _modernbert,
    arguments=("hidden_states", "position_embeddings", "attention_mask"),
    rotary="position_embeddings",
)
layer(
    _of("modernbert", "ModernBertEncoderLayer"),
    within("attn", _modernbert, core="attn", norm="attn_norm"),
    within("mlp", _modernbert_mlp, norm="mlp_norm"),
    norm_first=True,
    **_rotary,
)
