"""Blocks of real architectures of transformers, each from a small configuration of its own."""

import copy
import importlib
from types import SimpleNamespace

import pytest
import torch
from compare import assert_same
from fused import (
    IDS,
    LENGTHS,
    MASK,
    MOONSHINE,
    SEQUENCES,
    TEXT,
    WHISPER,
    decibels,
    fused,
    hidden,
    ops_of,
    randomized,
    seen_one_by_one,
    small,
)
from torch import nn

import dynquant
from dynquant.fused.functions import FusedNorm

pytest.importorskip("transformers", reason="transformers is not installed")

DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 12}
IMAGE = {**TEXT, "image_size": 16, "patch_size": 4}


# The config of each encoder, and where its blocks are.
DISTILBERT = {
    "dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 80,
    "vocab_size": 99,
    "max_position_embeddings": 40,
}
ENCODERS = {
    **dict.fromkeys(
        ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra", "Ernie", "MPNet")
        + ("Data2VecText", "RoCBert", "LayoutLM", "Splinter"),
        (TEXT, "encoder.layer"),
    ),
    **dict.fromkeys(("NomicBert", "Gte", "JinaEmbeddingsV3"), (TEXT, "layers")),
    "DistilBert": (DISTILBERT, "transformer.layer"),
    "Esm": ({**TEXT, "position_embedding_type": "rotary"}, "encoder.layer"),
    "ModernBert": ({**TEXT, "global_attn_every_n_layers": 2, "local_attention": 6}, "layers"),
}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 40}


def floats(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


PIXELS = {"pixel_values": floats(2, 3, 16, 16)}
TOKENS = {"input_ids": IDS, "attention_mask": MASK}
SPEECH = {"input_features": floats(2, 8, 40), "decoder_input_ids": IDS, "use_cache": False}
TRANSLATED = {**TOKENS, "decoder_input_ids": IDS, "use_cache": False}
# Layers with norms behind, and with norms in front.
WAV2VEC2 = {
    **TEXT,
    "conv_dim": (16, 16),
    "conv_kernel": (3, 3),
    "conv_stride": (2, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
STABLE = {**WAV2VEC2, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}
HEARD = {
    "input_values": floats(2, 90),
    "attention_mask": (torch.arange(90) < torch.tensor([[90], [50]])).long(),
}
XLNET = {"d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 80, "vocab_size": 99}
OPT = {**TEXT, "ffn_dim": 80, "word_embed_proj_dim": 48}
DECODERS = ["decoder.layers.0", "decoder.layers.1"]


def _layers(path, part=""):
    return [f"{path}.{index}{part}" for index in (0, 1)]


BOTH = _layers("encoder.layers")
SPOKEN = {
    "input_values": floats(2, 4000),
    "attention_mask": (torch.arange(4000) < torch.tensor([[4000], [2500]])).long(),
    "decoder_input_ids": IDS,
    "use_cache": False,
}
# The config of each model, the names of its blocks, what it is called with, and how many
# attentions, feed-forward blocks and linear blocks then run as ops.
OTHERS = {
    "ViT": (IMAGE, [*_layers("layers"), "pooler"], PIXELS, (2, 2, 1)),
    "DeiT": (IMAGE, [*_layers("layers"), "pooler"], PIXELS, (2, 2, 1)),
    "Dinov2": (
        IMAGE,
        _layers("encoder.layer", ".attention") + _layers("encoder.layer", ".mlp"),
        PIXELS,
        (2, 2, 0),
    ),
    # A layer that is called twice.
    "Albert": (
        {**TEXT, "embedding_size": 32},
        ["encoder.albert_layer_groups.0.albert_layers.0"],
        TOKENS,
        (2, 2, 0),
    ),
    "XLNet": (XLNET, _layers("layer", ".ff"), TOKENS, (0, 2, 0)),
    "CLIPVision": (IMAGE, BOTH, PIXELS, (2, 2, 0)),
    "SiglipVision": (IMAGE, [*BOTH, "head.attention", "head.mlp"], PIXELS, (2, 3, 0)),
    "CLIPText": (TEXT | {"eos_token_id": 2}, BOTH, TOKENS, (2, 2, 0)),
    "Wav2Vec2": (WAV2VEC2, BOTH, HEARD, (2, 2, 0)),
    "Hubert": (STABLE, BOTH, HEARD, (2, 2, 0)),
    "WavLM": (WAV2VEC2, _layers("encoder.layers", ".feed_forward"), HEARD, (0, 2, 0)),
    # Attention to a second sequence is of the class of the others, and stays as it is.
    **{
        name: (
            config,
            BOTH
            + DECODERS
            + _layers("decoder.layers", ".self_attn")
            + _layers("decoder.layers", ".encoder_attn"),
            arguments,
            (4, 4, 0),
        )
        for name, config, arguments in (
            ("Whisper", WHISPER, SPEECH),
            ("Bart", SEQUENCES, TRANSLATED),
            ("Marian", SEQUENCES, TRANSLATED),
            ("MBart", SEQUENCES, TRANSLATED),
            ("M2M100", SEQUENCES, TRANSLATED),
        )
    },
    # Its layers turn pairs of neighbors; those of its decoder are not known.
    "Moonshine": (
        MOONSHINE,
        BOTH
        + _layers("decoder.layers", ".self_attn")
        + _layers("decoder.layers", ".encoder_attn")
        + _layers("decoder.layers", ".mlp"),
        SPOKEN,
        (4, 4, 0),
    ),
    # Few tokens with a mask run as those behind a cache do.
    "OPT": (OPT, DECODERS + _layers("decoder.layers", ".self_attn"), TOKENS, (2, 2, 0)),
    "GPT2": (GPT2, _layers("h"), {"input_ids": IDS}, (2, 2, 0)),
    "GPTNeoX": (TEXT, _layers("layers", ".mlp"), TOKENS, (0, 2, 0)),
    "Phi": (TEXT, _layers("layers", ".mlp") + _layers("layers", ".self_attn"), TOKENS, (2, 2, 0)),
    "Falcon": (TEXT, _layers("h", ".mlp"), TOKENS, (0, 2, 0)),
    # An encoder whose layers run the code of Llama's.
    "EuroBert": (DECODER, _layers("layers"), TOKENS, (2, 2, 0)),
    # Behind a cache: test_fused_token.py.
    **dict.fromkeys(
        ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3", "SmolLM3", "Starcoder2"),
        (DECODER, _layers("layers"), TOKENS, (2, 2, 0)),
    ),
    "StableLm": (
        {
            **TEXT,
            "hidden_size": 128,
            "num_key_value_heads": 2,
        },  # of whose heads of 32 features a quarter is turned
        _layers("layers"),
        TOKENS,
        (2, 2, 0),
    ),
    "Granite": (
        DECODER,
        _layers("layers", ".self_attn") + _layers("layers", ".mlp"),
        TOKENS,
        (2, 2, 0),
    ),
    "Lfm2": (
        {**TEXT, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
        ["layers.0.feed_forward", "layers.1.self_attn", "layers.1.feed_forward"],
        TOKENS,
        (1, 2, 0),
    ),
    "Gemma2": (DECODER, _layers("layers"), TOKENS, (2, 2, 0)),
    "VaultGemma": (DECODER, _layers("layers"), TOKENS, (2, 2, 0)),
    "Qwen3VLText": (DECODER, _layers("layers"), TOKENS, (2, 2, 0)),
    "SeedOss": (DECODER, _layers("layers"), TOKENS, (2, 2, 0)),
}


def first(output):
    return output[0]


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    config, layers = ENCODERS[request.param]
    return (*fused(small(request.param, config)), layers)


class TestEncoders:
    def test_layers_are_fused(self, encoder):
        _, model, layers = encoder
        blocks = {f"{layers}.0": "", f"{layers}.1": ""}
        if getattr(model, "pooler", None) is not None:
            blocks["pooler"] = ""
        assert dynquant.fused_blocks(model) == blocks
        counts = {"attention": 2, "feed_forward": 2, "linear_block": len(blocks) - 2}
        assert ops_of(model, **TOKENS) == counts

    def test_padded_batch(self, encoder):
        quantized, model, _ = encoder
        assert decibels(hidden(model), hidden(quantized)) > 25

    def test_a_float_attention_differs_by_the_rounding_of_bytes(self, encoder):
        quantized, model, _ = encoder
        model = dynquant.fuse(quantized, attention="float")
        assert decibels(hidden(model), hidden(quantized)) > 35

    def test_unfused_for_a_call_changes_no_bit(self, encoder):
        _, model, _ = encoder
        other = seen_one_by_one(copy.deepcopy(model))
        assert all(why.endswith("has hooks") for why in dynquant.fused_blocks(other).values())
        assert_same(hidden(other), hidden(model))

    def test_padding_and_batch_change_no_bit(self, encoder):
        _, model, _ = encoder
        together = hidden(model)
        begin = 0
        for row, length in enumerate(LENGTHS):
            with torch.no_grad():
                alone = first(model(input_ids=IDS[row : row + 1, :length]))[0]
            assert_same(together[begin : begin + length], alone)
            begin += length


@pytest.mark.parametrize("name", OTHERS)
class TestOthers:
    def test_blocks(self, name):
        config, blocks, arguments, counts = OTHERS[name]
        quantized, model = fused(small(name, config))
        found = dynquant.fused_blocks(model)
        assert found == dict.fromkeys(blocks, "")
        assert tuple(ops_of(model, **arguments).values()) == counts
        with torch.no_grad():
            result = first(model(**arguments))
            assert decibels(result, first(quantized(**arguments))) > 25
            assert_same(first(seen_one_by_one(model)(**arguments)), result)


@pytest.mark.parametrize(
    ("model", "name", "sizes"),
    [
        ("qwen2_5_vl", "Qwen2_5_VLMLP", ()),
        ("dinov3_vit", "DINOv3ViTMLP", ()),
        ("detr", "DetrMLP", (48, 80)),
        ("rt_detr", "RTDetrMLP", (48, 80, "relu")),
        ("parakeet", "ParakeetEncoderFeedForward", ()),
        ("bark", "BarkMLP", ()),
    ],
)
def test_feed_forward_blocks_of_larger_models(model, name, sizes):
    config = SimpleNamespace(
        hidden_size=48,
        intermediate_size=80,
        mlp_bias=True,
        attention_bias=True,
        bias=True,
        hidden_act="gelu",
        activation_function="gelu",
        activation_dropout=0.1,
        dropout=0.1,
    )
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    quantized, fast = fused(nn.Sequential(getattr(module, name)(config, *sizes)))
    assert dynquant.fused_blocks(fast) == {"0": ""}
    x = floats(2, 5, 48)
    with torch.no_grad():
        assert decibels(fast(x), quantized(x)) > 35


@pytest.mark.parametrize(("name", "count"), [("Llama", 5), ("Qwen3", 9), ("Gemma", 5)])
def test_rms_norms_are_ops_wherever_they_are(name, count):
    """Those in front of the attention, of its heads, and the last one, too."""
    quantized, model = fused(small(name, DECODER))
    norms = [each for each in model.modules() if isinstance(each, FusedNorm)]
    assert len(norms) == count
    assert {type(each) for each in quantized.modules()} & {type(each)._base for each in norms}
    x = floats(2, 5, *norms[0].weight.shape) * 10
    with torch.no_grad():
        plain = type(norms[0])._base.forward
        assert decibels(norms[0](x), plain(norms[0], x)) > 120
        # What a norm gives for another dtype than its own is up to its library.
        half = x.bfloat16()
        assert_same(norms[0](half), plain(norms[0], half))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_of_each_implementation(implementation):
    quantized, model = fused(small("Bert", attn_implementation=implementation))
    assert decibels(hidden(model), hidden(quantized)) > 25


def test_a_mask_of_every_pair():
    seen = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(2)) < 0.7
    seen[..., 0] = True
    quantized, model = fused(small("Bert"))
    found, expected = (hidden(one, attention_mask=seen) for one in (model, quantized))
    assert decibels(found, expected) > 25
    assert_same(hidden(seen_one_by_one(model), attention_mask=seen), found)


def test_a_causal_bert():
    quantized, model = fused(small("Bert", is_decoder=True))
    for given in (MASK, None):
        found, expected = (
            hidden(one, attention_mask=given, use_cache=False) for one in (model, quantized)
        )
        assert decibels(found, expected) > 25


def test_a_16_bit_model():
    model = randomized(small("Bert")).bfloat16()
    quantized = dynquant.quantize_dynamic(model)
    model = dynquant.fuse(quantized)
    found = hidden(model)
    assert found.dtype == torch.bfloat16 and not any(dynquant.fused_blocks(model).values())
    assert decibels(found, hidden(quantized)) > 20
    assert_same(hidden(seen_one_by_one(model)), found)


HEADS = {
    "Bert": "cls.predictions.transform",
    "Ernie": "cls.predictions.transform",
    "NomicBert": "cls.predictions.transform",
    "Electra": "generator_predictions",
    "ModernBert": "head",
}


@pytest.mark.parametrize("name", HEADS)
def test_prediction_heads(name):
    import transformers

    options = TEXT | ({"embedding_size": 32} if name == "Electra" else {})
    config = getattr(transformers, f"{name}Config")(**options)
    quantized, model = fused(getattr(transformers, f"{name}ForMaskedLM")(config))
    assert dynquant.fused_blocks(model)[HEADS[name]] == ""
    head = model.get_submodule(HEADS[name])
    x = floats(2, 5, 48)
    with torch.no_grad():
        found = head(x)
        assert decibels(found, quantized.get_submodule(HEADS[name])(x)) > 35
        head.dense.register_forward_hook(lambda *given: None)
        assert_same(head(x), found)


@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_parts_of_a_layer_that_is_not_fused(name):
    """With a cache, or with a second sequence to attend to, its ends still are ops."""
    quantized, model = fused(small(name, is_decoder=True, add_cross_attention=True))
    layer, plain = model.encoder.layer[0], quantized.encoder.layer[0]
    x, states = floats(2, 5, 48), floats(2, 7, 48)
    with torch.no_grad():
        assert decibels(layer.intermediate(x), plain.intermediate(x)) > 35
        wide = floats(2, 5, 80)
        assert decibels(layer.output(wide, x), plain.output(wide, x)) > 35
        found = layer(x, encoder_hidden_states=states)
        assert decibels(found, plain(x, encoder_hidden_states=states)) > 25
        seen = seen_one_by_one(copy.deepcopy(model)).encoder.layer[0]
        assert_same(seen(x, encoder_hidden_states=states), found)
        assert_same(seen.output(wide, input_tensor=x), layer.output(wide, x))
        # What is added to it in another shape is added by torch.
        assert layer.output(wide, x[:1]).shape == (2, 5, 48)
