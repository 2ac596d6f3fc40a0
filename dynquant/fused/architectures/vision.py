"""Encoders of images, and of the texts beside them."""

from dynquant.fused.adapters import names_in_transformers as _of
from dynquant.fused.architectures.feed_forward import PLAIN
from dynquant.fused.architectures.forms import attention_module, layer, projections, within

attention_module(
    _of("vit", "ViTAttention") + _of("dinov2", "Dinov2Attention"), projections("o_proj")
)
layer(
    _of("vit", "ViTLayer"),
    within("attention", projections("o_proj"), core="attention", norm="layernorm_before"),
    within("mlp", PLAIN, norm="layernorm_after"),
    norm_first=True,
)
for _model, _prefix in (("clip", "CLIP"), ("siglip", "Siglip")):
    attention_module(_of(_model, f"{_prefix}Attention"), projections("out_proj"))
    layer(
        _of(_model, f"{_prefix}EncoderLayer"),
        within("self_attn", projections("out_proj"), core="self_attn", norm="layer_norm1"),
        within("mlp", PLAIN, norm="layer_norm2"),
        norm_first=True,
    )
