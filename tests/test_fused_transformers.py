"""Blocks of real architectures of transformers, each from a small configuration of its own."""

import copy

import pytest
import torch
from compare import assert_same
from fused import decibels, fused, randomized, seen_one_by_one

import dynquant

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "vocab_size": 99,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 12}
IMAGE = {**TEXT, "image_size": 16, "patch_size": 4}
LENGTHS = (11, 5)


def _distilbert():
    config = transformers.DistilBertConfig(
        dim=48, n_layers=2, n_heads=4, hidden_dim=80, vocab_size=99, max_position_embeddings=40
    )
    return transformers.DistilBertModel(config)


def _modernbert():
    config = {**TEXT, "global_attn_every_n_layers": 2, "local_attention": 6}
    return transformers.ModernBertModel(transformers.ModernBertConfig(**config))


# By name: what makes the model, and where its blocks are.
ENCODERS = {
    "Bert": (lambda: transformers.BertModel(transformers.BertConfig(**TEXT)), "encoder.layer"),
    "Roberta": (
        lambda: transformers.RobertaModel(transformers.RobertaConfig(**TEXT)),
        "encoder.layer",
    ),
    "XLMRoberta": (
        lambda: transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**TEXT)),
        "encoder.layer",
    ),
    "Camembert": (
        lambda: transformers.CamembertModel(transformers.CamembertConfig(**TEXT)),
        "encoder.layer",
    ),
    "Electra": (
        lambda: transformers.ElectraModel(transformers.ElectraConfig(**TEXT)),
        "encoder.layer",
    ),
    "Ernie": (lambda: transformers.ErnieModel(transformers.ErnieConfig(**TEXT)), "encoder.layer"),
    "MPNet": (lambda: transformers.MPNetModel(transformers.MPNetConfig(**TEXT)), "encoder.layer"),
    "DistilBert": (_distilbert, "transformer.layer"),
    "ModernBert": (_modernbert, "layers"),
    "NomicBert": (
        lambda: transformers.NomicBertModel(transformers.NomicBertConfig(**TEXT)),
        "layers",
    ),
    "Gte": (lambda: transformers.GteModel(transformers.GteConfig(**TEXT)), "layers"),
}


def _clip_text():
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, eos_token_id=2))


def _whisper():
    config = transformers.WhisperConfig(
        d_model=48,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=80,
        decoder_ffn_dim=80,
        vocab_size=99,
        max_source_positions=20,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperModel(config)


def _t5(gated):
    config = transformers.T5Config(
        d_model=48,
        d_kv=12,
        d_ff=80,
        num_layers=2,
        num_heads=4,
        vocab_size=99,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
    return transformers.T5Model(config)


def _gpt2():
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=99, n_positions=40)
    return transformers.GPT2Model(config)


def _decoder(name):
    config = getattr(transformers, f"{name}Config")(**DECODER)
    return getattr(transformers, f"{name}Model")(config)


# By name: what makes the model, the names of its blocks, and what it is called with.
OTHERS = {
    "ViT": (
        lambda: transformers.ViTModel(transformers.ViTConfig(**IMAGE)),
        ["layers.0", "layers.1"],
        lambda: {"pixel_values": floats(2, 3, 16, 16)},
    ),
    "CLIPVision": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE)),
        ["encoder.layers.0", "encoder.layers.1"],
        lambda: {"pixel_values": floats(2, 3, 16, 16)},
    ),
    "CLIPText": (
        _clip_text,
        ["encoder.layers.0", "encoder.layers.1"],
        lambda: {"input_ids": ids(), "attention_mask": mask()},
    ),
    "Whisper": (
        _whisper,
        ["encoder.layers.0", "encoder.layers.1"],
        lambda: {
            "input_features": floats(2, 8, 40),
            "decoder_input_ids": ids(),
            "use_cache": False,
        },
    ),
    "GPT2": (_gpt2, ["h.0.mlp", "h.1.mlp"], lambda: {"input_ids": ids()}),
    **{
        name: (
            lambda name=name: _decoder(name),
            ["layers.0.mlp", "layers.1.mlp"],
            lambda: {"input_ids": ids(), "attention_mask": mask()},
        )
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "SmolLM3")
    },
}


def floats(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def ids():
    drawn = torch.randint(3, 99, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    return drawn * mask()


def mask():
    return (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()


def first(output):
    return output[0]


@torch.no_grad()
def hidden(model, **arguments):
    given = {"input_ids": ids(), "attention_mask": mask(), **arguments}
    return first(model(**given))[mask().bool()]


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request):
    make, layers = ENCODERS[request.param]
    torch.manual_seed(0)
    return (*fused(make()), layers)


class TestEncoders:
    def test_layers_are_fused(self, encoder):
        _, model, layers = encoder
        assert dynquant.fused_blocks(model) == {f"{layers}.0": "", f"{layers}.1": ""}

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
                alone = first(model(input_ids=ids()[row : row + 1, :length]))[0]
            assert_same(together[begin : begin + length], alone)
            begin += length


@pytest.mark.parametrize("name", OTHERS)
class TestOthers:
    def test_blocks(self, name):
        make, blocks, arguments = OTHERS[name]
        quantized, model = fused(make())
        found = dynquant.fused_blocks(model)
        assert found == dict.fromkeys(blocks, "")
        with torch.no_grad():
            result = first(model(**arguments()))
            assert decibels(result, first(quantized(**arguments()))) > 25
            assert_same(first(seen_one_by_one(model)(**arguments())), result)


@pytest.mark.parametrize("gated", [False, True])
def test_t5(gated):
    quantized, model = fused(_t5(gated))
    blocks = dynquant.fused_blocks(model)
    assert len(blocks) == 4 and not any(blocks.values())
    arguments = {"input_ids": ids(), "attention_mask": mask(), "decoder_input_ids": ids()}
    with torch.no_grad():
        result = first(model(**arguments, use_cache=False))
        assert decibels(result, first(quantized(**arguments, use_cache=False))) > 25
        assert_same(first(seen_one_by_one(model)(**arguments, use_cache=False)), result)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_masks_of_each_implementation(implementation):
    config = transformers.BertConfig(**TEXT, attn_implementation=implementation)
    quantized, model = fused(transformers.BertModel(config))
    assert decibels(hidden(model), hidden(quantized)) > 25


def test_a_mask_of_every_pair():
    seen = torch.rand(2, 1, 11, 11, generator=torch.Generator().manual_seed(2)) < 0.7
    seen[..., 0] = True
    quantized, model = fused(transformers.BertModel(transformers.BertConfig(**TEXT)))
    found, expected = (hidden(one, attention_mask=seen) for one in (model, quantized))
    assert decibels(found, expected) > 25
    assert_same(hidden(seen_one_by_one(model), attention_mask=seen), found)


def test_a_causal_bert():
    config = transformers.BertConfig(**TEXT, is_decoder=True)
    quantized, model = fused(transformers.BertModel(config))
    for given in (mask(), None):
        found, expected = (
            hidden(one, attention_mask=given, use_cache=False) for one in (model, quantized)
        )
        assert decibels(found, expected) > 25


def test_a_16_bit_model():
    model = randomized(transformers.BertModel(transformers.BertConfig(**TEXT))).bfloat16()
    quantized = dynquant.quantize_dynamic(model)
    model = dynquant.fuse(quantized)
    found = hidden(model)
    assert found.dtype == torch.bfloat16 and not any(dynquant.fused_blocks(model).values())
    assert decibels(found, hidden(quantized)) > 20
    assert_same(hidden(seen_one_by_one(model)), found)
