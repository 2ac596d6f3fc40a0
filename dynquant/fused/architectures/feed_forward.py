"""Feed-forward blocks of their own; the layers around them are known elsewhere, or have caches."""

from dynquant.fused.adapters import Adapter, FeedForward
from dynquant.fused.adapters import names_in_transformers as _of
from dynquant.fused.architectures.forms import mlp, register_all

GATED = FeedForward(up="up_proj", gate="gate_proj", activation="act_fn", down="down_proj")
PLAIN = FeedForward(up="fc1", activation="activation_fn", down="fc2")
mlp(_of("llama", "LlamaMLP") + _of("gte", "GteMLP"), GATED, "x")
mlp(_of("qwen2_5_vl", "Qwen2_5_VLMLP"), GATED, "hidden_state")
PHI3_MLP = FeedForward(
    up="gate_up_proj", split="gate_first", activation="activation_fn", down="down_proj"
)
mlp(_of("phi3", "Phi3MLP"), PHI3_MLP)
mlp(
    _of("granitemoehybrid", "GraniteMoeHybridMLP"),
    FeedForward("input_linear", "output_linear", "activation", split="gate_first"),
)
mlp(_of("dinov3_vit", "DINOv3ViTMLP"), FeedForward("up_proj", "down_proj", "act_fn"), "x")
mlp(_of("clip", "CLIPMLP") + _of("detr", "DetrMLP"), PLAIN)
_gpt_neox = FeedForward(up="dense_h_to_4h", activation="act", down="dense_4h_to_h")
mlp(_of("gpt_neox", "GPTNeoXMLP"), _gpt_neox)
mlp(_of("falcon", "FalconMLP"), _gpt_neox, "x")
GPT2_MLP = FeedForward(up="c_fc", activation="act", down="c_proj")
mlp(_of("gpt2", "GPT2MLP") + _of("starcoder2", "Starcoder2MLP"), GPT2_MLP)
mlp(_of("bark", "BarkMLP"), FeedForward(up="in_proj", activation="gelu", down="out_proj"))
mlp(
    _of("parakeet", "ParakeetEncoderFeedForward"),
    FeedForward(up="linear1", activation="activation", down="linear2"),
)
register_all(
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
mlp(_of("t5", "T5DenseActDense"), _t5)
mlp(_of("t5", "T5DenseGatedActDense"), _t5_gated)
WAV2VEC2 = FeedForward(
    up="intermediate_dense", activation="intermediate_act_fn", down="output_dense"
)
mlp(_of("wav2vec2", "Wav2Vec2FeedForward"), WAV2VEC2)
