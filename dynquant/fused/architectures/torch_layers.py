"""nn.TransformerEncoderLayer, and attentions."""

from dynquant.fused.adapters import Adapter, Attention, FeedForward, register
from dynquant.fused.architectures.forms import within

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
        attention=within("self_attn", _torch, core="self_attn", norm="norm1"),
        feed_forward=FeedForward(
            up="linear1", activation="activation", down="linear2", norm="norm2"
        ),
        residual=True,
        norm_first="norm_first",
        mask="src_mask",
        family="torch_layer",
    ),
)
