"""Checkpoints that compressed-tensors and torchao have quantized, on dynquant's kernels."""

import copy
import json
import re

import pytest
import reference
import torch
from compare import assert_same, widened
from torch import nn

import dynquant

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402

from dynquant.transformers import DynquantConfig, load_int8  # noqa: E402

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=99)
HEADS = dict(num_attention_heads=2, num_key_value_heads=2)
# As compressed-tensors 0.20 writes it.
SCHEME = {
    "config_groups": {
        "group_0": {
            "format": "int-quantized",
            "input_activations": {
                "dynamic": True,
                "group_size": None,
                "num_bits": 8,
                "strategy": "token",
                "symmetric": True,
                "type": "int",
            },
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "dynamic": False,
                "group_size": None,
                "num_bits": 8,
                "strategy": "channel",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "int-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.20.0",
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def ids():
    return torch.randint(0, 99, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(ids())[0]


def decibels(wanted, given):
    wanted, given = wanted.float(), given.float()
    return 10 * torch.log10(wanted.square().sum() / (given - wanted).square().sum())


def rounded(weight, strategy):
    """int8 with -128 in it, and the scale in the weight's dtype."""
    weight = weight.float()
    most = (
        weight.abs().amax(1, keepdim=True) if strategy == "channel" else weight.abs().amax()[None]
    )
    scale = most / 128
    return (weight / scale).round().clamp(-128, 127).to(torch.int8), scale


def write(folder, change=lambda tensors, scheme: None, strategy="channel", kind="llama"):
    """Writes a float folder "float" and a W8A8 folder "w8a8", whose path is given."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **SIZES, **HEADS, dtype="bfloat16")
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder / "float")
    model.save_pretrained(folder / "w8a8")
    file = folder / "w8a8" / "model.safetensors"
    tensors = load_file(file)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight, scale = rounded(module.weight.detach(), strategy)
            tensors[f"{name}.weight"] = weight
            tensors[f"{name}.weight_scale"] = scale.to(torch.bfloat16)
    scheme = copy.deepcopy(SCHEME)
    scheme["config_groups"]["group_0"]["weights"]["strategy"] = strategy
    change(tensors, scheme)
    save_file(tensors, file, {"format": "pt"})
    describe(folder / "w8a8", scheme)
    return folder / "w8a8"


def describe(folder, scheme):
    file = folder / "config.json"
    held = json.loads(file.read_text())
    file.write_text(json.dumps({**held, "quantization_config": scheme}))


def group(scheme):
    return scheme["config_groups"]["group_0"]


class TestCompressedTensors:
    @pytest.mark.parametrize("strategy", ["channel", "tensor"])
    def test_integers_and_bits(self, tmp_path, strategy):
        folder = write(tmp_path, strategy=strategy)
        model = load_int8(AutoModelForCausalLM, folder)
        tensors = load_file(folder / "model.safetensors")
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, dynquant.nn.Linear)
        }
        assert len(layers) == 2 * 7 and type(model.lm_head) is nn.Linear
        lowest = set()
        for name, layer in layers.items():
            integers, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
            assert_same(layer.weight.int_repr(), integers)
            assert_same(layer.weight_scale, scale.float().flatten())
            x = torch.randn(5, layer.in_features).to(torch.bfloat16)
            expected = reference.linear_dynamic(
                widened(x), integers.numpy(), widened(scale).ravel(), None, True, True, "bfloat16"
            )
            assert_same(layer(x), expected)
            lowest.add(int(integers.min()))
        assert -128 in lowest
        assert (
            decibels(
                logits(AutoModelForCausalLM.from_pretrained(tmp_path / "float")), logits(model)
            )
            > 30
        )

    def test_saved_as_dynquants_own(self, tmp_path):
        model = load_int8(AutoModelForCausalLM, write(tmp_path), dtype=torch.float32)
        assert model.dtype == torch.float32
        model.save_pretrained(tmp_path / "own")
        held = json.loads((tmp_path / "own" / "config.json").read_text())["quantization_config"]
        assert held["quant_method"] == "dynquant" and "source" not in held
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "own")
        assert_same(logits(again), logits(model))

    def test_without_its_head(self, tmp_path):
        folder = write(tmp_path)
        model = load_int8(AutoModel, folder)
        expected = load_int8(AutoModelForCausalLM, folder).model
        assert_same(logits(model), logits(expected))

    def test_groups_of_layers(self, tmp_path):
        def change(tensors, scheme):
            other = copy.deepcopy(group(scheme))
            other["targets"] = ["re:.*mlp.*", "model.layers.1.self_attn.o_proj"]
            other["input_activations"] |= {"symmetric": False}
            last = copy.deepcopy(group(scheme))
            last["targets"] = ["model.layers.1.mlp.up_proj"]
            last["input_activations"] |= {"strategy": "tensor"}
            scheme["config_groups"] |= {"group_1": other, "group_2": last}

        model = load_int8(AutoModel, write(tmp_path, change))
        schemes = {
            name: (module.per_token, module.symmetric)
            for name, module in model.named_modules()
            if isinstance(module, dynquant.nn.Linear)
        }
        assert schemes["layers.1.mlp.up_proj"] == (False, True)
        assert schemes["layers.0.mlp.up_proj"] == schemes["layers.1.self_attn.o_proj"]
        assert schemes["layers.0.mlp.up_proj"] == (True, False)
        assert schemes["layers.0.self_attn.o_proj"] == (True, True)

    def test_biases(self, tmp_path):
        model = load_int8(AutoModel, write(tmp_path, kind="qwen2"))
        layer = model.layers[1].self_attn.k_proj
        tensors = load_file(tmp_path / "w8a8" / "model.safetensors")
        assert_same(layer.bias, tensors["model.layers.1.self_attn.k_proj.bias"])

    def test_names_with_another_prefix(self, tmp_path):
        folder = write(tmp_path)
        file = folder / "model.safetensors"
        expected = logits(load_int8(AutoModel, folder))
        tensors = {
            key.removeprefix("model."): one
            for key, one in load_file(file).items()
            if key.startswith("model.")
        }
        save_file(tensors, file, {"format": "pt"})
        assert_same(logits(load_int8(AutoModel, folder)), expected)

    REFUSED = {
        "static activations": (
            lambda t, s: group(s)["input_activations"].update(dynamic=False, strategy="tensor"),
            r"layers\.0\.\S+: input_activations.dynamic is False; allowed: True",
        ),
        "a static scale": (
            lambda t, s: t.update({f"{Q_PROJ}.input_scale": torch.ones(1)}),
            f"{Q_PROJ}: the checkpoint's input_scale is a static scale",
        ),
        "activations in float": (
            lambda t, s: group(s).update(input_activations=None),
            "input_activations is None: activations in float",
        ),
        "groups": (
            lambda t, s: group(s)["weights"].update(strategy="group", group_size=16),
            "weights.strategy is 'group'; allowed: 'channel' or 'tensor'",
        ),
        "asymmetric weights": (
            lambda t, s: group(s)["weights"].update(symmetric=False),
            "weights.symmetric is False",
        ),
        "a zero point": (
            lambda t, s: t.update(
                {f"{Q_PROJ}.weight_zero_point": torch.ones(32, 1, dtype=torch.int8)}
            ),
            f"{Q_PROJ}: the weight is asymmetric",
        ),
        "4 bits": (lambda t, s: group(s)["weights"].update(num_bits=4), "weights.num_bits is 4"),
        "float": (lambda t, s: group(s)["weights"].update(type="float"), "type is 'float'"),
        "packed": (
            lambda t, s: (s.update(format="pack-quantized"), group(s).pop("format")),
            "format is 'pack-quantized'; allowed: 'int-quantized'",
        ),
        "a packed weight": (
            lambda t, s: t.update({f"{Q_PROJ}.weight_packed": t.pop(f"{Q_PROJ}.weight").int()}),
            f"{Q_PROJ}: the checkpoint's weight_packed is a weight packed",
        ),
        "outputs": (
            lambda t, s: group(s).update(output_activations={"num_bits": 8}),
            "output_activations",
        ),
        "keys and values": (
            lambda t, s: s.update(kv_cache_scheme={"num_bits": 8}),
            "kv_cache_scheme",
        ),
        "rotations": (lambda t, s: s.update(transform_config={"config_groups": 1}), "transform"),
        "sparse": (lambda t, s: s.update(sparsity_config={"format": "marlin-24"}), "marlin-24"),
        "no scale": (
            lambda t, s: t.pop(f"{Q_PROJ}.weight_scale"),
            f"{Q_PROJ}.weight is int8 without a scale",
        ),
        "no weight": (lambda t, s: t.pop(f"{Q_PROJ}.weight"), f"has no {Q_PROJ}.weight"),
        "a shape of the scale": (
            lambda t, s: t.update({f"{Q_PROJ}.weight_scale": torch.ones(32, 2)}),
            r"\[32, 2\]; allowed: \[32, 1\] or \[32\]",
        ),
        "a scale of 0": (
            lambda t, s: t.update({f"{Q_PROJ}.weight_scale": torch.zeros(32, 1)}),
            "holds 0.0; scales are positive",
        ),
        "a dtype of the weight": (
            lambda t, s: t.update({f"{Q_PROJ}.weight": torch.zeros(32, 32)}),
            "the weight's dtype is 'F32'; allowed: 'I8'",
        ),
        "no group": (
            lambda t, s: s["config_groups"].update(
                group_0={**group(s), "targets": ["a"]}, group_1={**group(s), "targets": ["re:b"]}
            ),
            "its group of config_groups is missing",
        ),
        "a pattern": (
            lambda t, s: s["config_groups"].update(group_1={**group(s), "targets": ["re:("]}),
            r"the pattern '\(' cannot be used",
        ),
        "another module": (
            lambda t, s: t.update(
                {
                    "model.norm.weight": torch.ones(32, 1, dtype=torch.int8),
                    "model.norm.weight_scale": torch.ones(32, 1),
                }
            ),
            "has LlamaRMSNorm of the name model.norm; allowed: nn.Linear",
        ),
        "no module": (
            lambda t, s: t.update(
                {
                    "model.layers.7.up.weight": torch.ones(32, 1, dtype=torch.int8),
                    "model.layers.7.up.weight_scale": torch.ones(32, 1),
                }
            ),
            r"has no module of the name model\.layers\.7\.up",
        ),
    }

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused(self, tmp_path, name):
        change, message = self.REFUSED[name]
        with pytest.raises(ValueError, match=message):
            load_int8(AutoModelForCausalLM, write(tmp_path, change))

    def test_experts(self, tmp_path):
        """transformers would join the experts' weights, in integers, into one parameter."""
        torch.manual_seed(0)
        sizes = dict(num_local_experts=2, num_experts_per_tok=1)
        config = transformers.MixtralConfig(**SIZES, **HEADS, **sizes)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        names = [key for key in tensors if re.search(r"experts\.\d\.w\d\.weight$", key)]
        assert len(names) == 2 * 2 * 3
        for key in names:
            integers, scale = rounded(tensors[key], "channel")
            tensors |= {key: integers, f"{key}_scale": scale}
        save_file(tensors, file, {"format": "pt"})
        describe(tmp_path, SCHEME)
        with pytest.raises(ValueError, match=r"experts\.0\.w1 is quantized .* joins, splits or"):
            load_int8(AutoModelForCausalLM, tmp_path)


class TestTorchao:
    """Folders that transformers and torchao write."""

    @pytest.fixture
    def written(self, tmp_path):
        pytest.importorskip("torchao", reason="torchao is not installed")
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        def write_with(**arguments):
            write(tmp_path)
            config = transformers.TorchAoConfig(Int8DynamicActivationInt8WeightConfig(**arguments))
            model = AutoModelForCausalLM.from_pretrained(
                tmp_path / "float", quantization_config=config
            )
            model.save_pretrained(tmp_path / "ao")
            return tmp_path / "ao"

        return write_with

    @pytest.mark.parametrize("kind", ["PerRow", "PerTensor", "asymmetric"])
    def test_integers_and_bits(self, written, tmp_path, kind):
        from torchao import quantization

        if kind == "asymmetric":
            folder = written(act_mapping_type=quantization.MappingType.ASYMMETRIC)
        else:
            folder = written(granularity=getattr(quantization, kind)())
        model = load_int8(AutoModelForCausalLM, folder)
        tensors = load_file(folder / "model.safetensors")
        layer = model.get_submodule(Q_PROJ)
        integers, scale = (tensors[f"{Q_PROJ}._weight_{key}"] for key in ("qdata", "scale"))
        assert_same(layer.weight.int_repr(), integers)
        x = torch.randn(5, 32)
        expected = reference.linear_dynamic(
            widened(x),
            integers.numpy(),
            scale.numpy().ravel(),
            None,
            kind != "PerTensor",
            kind != "asymmetric",
        )
        assert_same(layer(x), expected)
        wanted = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "float"))
        assert decibels(wanted, logits(model)) > 30
        model.save_pretrained(tmp_path / "own")
        assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "own")), logits(model))

    def test_equals_the_model_in_memory(self, written, tmp_path):
        import dynquant.torchao

        folder = written()
        given = AutoModelForCausalLM.from_pretrained(folder)
        made = dynquant.torchao.from_torchao(given)
        assert_same(logits(made), logits(load_int8(AutoModelForCausalLM, folder)))
        assert given.config.quantization_config.quant_method == "torchao"
        made.save_pretrained(tmp_path / "own")
        assert_same(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "own")), logits(made))

    REFUSED = {
        "activations in float": (
            lambda one, t: one["_data"].update(act_quant_kwargs=None),
            f"{Q_PROJ}: act_quant_kwargs is None: activations in float",
        ),
        "groups": (
            lambda one, t: one["_data"].update(block_size=[1, 16]),
            rf"{Q_PROJ}: block_size of a weight \[32, 32\] is \[1, 16\]; allowed: \[1, K\]",
        ),
        "asymmetric weights": (
            lambda one, t: t.update(
                {f"{Q_PROJ}._weight_zero_point": torch.ones(32, 1, dtype=torch.int8)}
            ),
            f"{Q_PROJ}: the weight is asymmetric",
        ),
        "static activations": (
            lambda one, t: one["_tensor_data_names"].append("act_quant_scale"),
            f"{Q_PROJ}: act_quant_scale is a static scale",
        ),
        "scaled activations": (
            lambda one, t: one["_tensor_data_names"].append("act_pre_scale"),
            f"{Q_PROJ}: act_pre_scale is a scale",
        ),
        "another tensor": (
            lambda one, t: one.update(_type="Int4Tensor"),
            f"{Q_PROJ}.weight: the tensor's type is 'Int4Tensor'; allowed: 'Int8Tensor'",
        ),
        "no integers": (
            lambda one, t: t.pop(f"{Q_PROJ}._weight_qdata"),
            f"{Q_PROJ}: the checkpoint has no {Q_PROJ}._weight_qdata",
        ),
        "no scale": (
            lambda one, t: t.pop(f"{Q_PROJ}._weight_scale"),
            f"{Q_PROJ}: the checkpoint has no {Q_PROJ}._weight_scale",
        ),
    }

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused(self, written, name):
        change, message = self.REFUSED[name]
        file = written() / "model.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        described, tensors = json.loads(metadata[f"{Q_PROJ}.weight"]), load_file(file)
        change(described, tensors)
        save_file(tensors, file, metadata | {f"{Q_PROJ}.weight": json.dumps(described)})
        with pytest.raises(ValueError, match=message):
            load_int8(AutoModelForCausalLM, file.parent)


class TestArguments:
    def test_a_float_checkpoint(self, tmp_path):
        write(tmp_path)
        with pytest.raises(ValueError, match="has no quantization_config: its weights are float"):
            load_int8(AutoModel, tmp_path / "float")

    def test_another_method(self, tmp_path):
        write(tmp_path)
        describe(tmp_path / "float", {"quant_method": "gptq", "bits": 4})
        with pytest.raises(ValueError, match="'gptq'; allowed: compressed-tensors, torchao"):
            load_int8(AutoModel, tmp_path / "float")

    def test_a_config_of_its_own(self, tmp_path):
        with pytest.raises(TypeError, match="takes no quantization_config"):
            load_int8(AutoModel, tmp_path, quantization_config=DynquantConfig())

    def test_a_pickle(self, tmp_path):
        folder = write(tmp_path)
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="not a safetensors file"):
            load_int8(AutoModel, folder)
