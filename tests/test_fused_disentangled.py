"""DeBERTa: an attention with terms for distances, as one op where it can be."""

import copy
import dataclasses

import pytest
import torch
from compare import assert_same
from fused import (
    IDS,
    LENGTHS,
    MASK,
    TEXT,
    Counting,
    decibels,
    fused,
    hidden,
    randomized,
    seen_one_by_one,
    small,
)

import dynquant
from dynquant.fused import Adapter, Attention, Relative

pytest.importorskip("transformers", reason="transformers is not installed")

V3 = {
    **TEXT,
    "relative_attention": True,
    "position_buckets": 4,  # distances from 2 on share vectors
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
CONFIGS = {
    "v3": V3,
    "no buckets": {**V3, "position_buckets": -1},
    "fewer distances than tokens": {**V3, "position_buckets": -1, "max_relative_positions": 5},
    "projections of their own": {**V3, "share_att_key": False},
    "c2p": {**V3, "pos_att_type": ["c2p"]},
    "p2c": {**V3, "pos_att_type": ["p2c"], "share_att_key": False},
    "a convolution": {**V3, "conv_kernel_size": 3, "conv_act": "gelu"},
}
LAYERS = ["encoder.layer.0", "encoder.layer.1"]
ATTENTIONS = [f"encoder.layer.{i}.attention.self" for i in (0, 1)]


def count_of(model, **arguments):
    with torch.no_grad(), Counting() as counting:
        model(input_ids=IDS, **{"attention_mask": MASK, **arguments})
    return counting.found["relative_attention"]


@pytest.fixture(scope="module", params=CONFIGS)
def made(request):
    return fused(small("DebertaV2", CONFIGS[request.param]))


@pytest.fixture(scope="module")
def v3():
    return fused(small("DebertaV2", V3))


def test_as_the_unfused(made):
    quantized, model = made
    blocks = dynquant.fused_blocks(model)
    assert blocks == dict.fromkeys(LAYERS, "")
    assert count_of(model) == 2
    assert decibels(hidden(model), hidden(quantized)) > 25
    model = dynquant.fuse(quantized, attention="float")
    assert decibels(hidden(model), hidden(quantized)) > 35


def test_at_the_padding_too(v3):
    """A row that sees nothing sees all alike, as in the model itself."""
    quantized, _ = v3
    model = dynquant.fuse(quantized, attention="float")
    with torch.no_grad():
        found, expected = (one(input_ids=IDS, attention_mask=MASK)[0] for one in (model, quantized))
    assert decibels(found, expected) > 35


def test_unfused_for_a_call_changes_no_bit(made):
    _, model = made
    other = seen_one_by_one(copy.deepcopy(model))
    assert all(why.endswith("has hooks") for why in dynquant.fused_blocks(other).values())
    assert_same(hidden(other), hidden(model))


def test_padding_and_batch_change_no_bit(v3):
    _, model = v3
    together = hidden(model)
    begin = 0
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            alone = model(input_ids=IDS[row : row + 1, :length])[0][0]
        assert_same(together[begin : begin + length], alone)
        begin += length


@pytest.mark.parametrize("length", [1, 2, 3, 39])
def test_lengths(v3, length):
    quantized, model = v3
    given = {"input_ids": torch.arange(3, 3 + length)[None]}
    with torch.no_grad():
        assert decibels(model(**given)[0], quantized(**given)[0]) > 25


MASKS = {
    "bool": MASK.bool(),
    "float": MASK.float(),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks(v3, kind):
    quantized, model = v3
    found, expected = (hidden(one, attention_mask=MASKS[kind]) for one in (model, quantized))
    assert decibels(found, expected) > 25
    assert count_of(model, attention_mask=MASKS[kind]) == 2


def attended(models, **changes):
    """What the first attention of each gives for a text, and how often the op ran."""
    x = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(5)
    given = {
        "attention_mask": torch.ones(1, 1, 5, 5, dtype=torch.long),
        "relative_pos": (numbers[:, None] - numbers)[None],
        "rel_embeddings": torch.randn(8, 48, generator=torch.Generator().manual_seed(1)),
        **changes,
    }
    with torch.no_grad(), Counting() as counting:
        found = [one.get_submodule(ATTENTIONS[0])(x, **given)[0] for one in models]
    return *found, counting.found["relative_attention"]


def test_a_mask_of_every_pair(v3):
    seen = torch.rand(1, 1, 5, 5, generator=torch.Generator().manual_seed(2)) < 0.6
    expected, found, count = attended(v3, attention_mask=seen)
    assert count == 1 and decibels(found, expected) > 25


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_positions_and_masks_that_change_in_place(v3, mode):
    with mode():
        mask = torch.ones(1, 1, 5, 5, dtype=torch.long)
        numbers = torch.arange(5)
        positions = (numbers[:, None] - numbers)[None]
        given = {"attention_mask": mask, "relative_pos": positions}
        first = attended(v3, **given)[1]
        assert_same(attended(v3, **given)[1], first)
        mask[..., 3:] = 0
        expected, found, count = attended(v3, **given)
        assert count == 1 and decibels(found, expected) > 25 > decibels(found, first)
        positions[0, 0, 0] = 2  # more than the distance counts
        expected, found, count = attended(v3, **given)
        assert count == 0
        assert_same(found, expected)
        positions[0, 0, 0] = 0
        mask.fill_(1)
        assert_same(attended(v3, **given)[1], first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model(dtype):
    """Its rows that see nothing see all alike, too."""
    quantized = dynquant.quantize_dynamic(randomized(small("DebertaV2", V3)).to(dtype))
    model = dynquant.fuse(quantized, attention="float")
    with torch.no_grad():
        found, expected = (one(input_ids=IDS, attention_mask=MASK)[0] for one in (model, quantized))
    assert found.dtype == dtype
    assert decibels(found, expected) > 25


class TestAsItsOwnCode:
    """Where the op cannot do it, the model's own attention runs."""

    def test_weights_are_asked_for(self, v3):
        quantized, model = v3
        with torch.no_grad():
            found, expected = (
                one(input_ids=IDS, attention_mask=MASK, output_attentions=True)
                for one in (model, quantized)
            )
        assert_same(found[0][MASK.bool()], hidden(model))
        # Those of the first layer, whose inputs are the same.
        assert decibels(found.attentions[0], expected.attentions[0]) > 60

    def test_a_gradient(self, v3):
        _, model = v3
        result = model(input_ids=IDS, attention_mask=MASK)[0]
        result.square().sum().backward()
        assert model.encoder.rel_embeddings.weight.grad.abs().sum() > 0
        model.zero_grad(set_to_none=True)

    @pytest.mark.parametrize(
        "changes",
        [
            {"relative_pos": torch.arange(25).view(1, 5, 5) % 4},  # more than distances
            {"relative_pos": torch.zeros(2, 5, 5, dtype=torch.long)},
            {"query_states": torch.ones(1, 5, 48)},
            {"attention_mask": torch.ones(1, 4, 5, 5, dtype=torch.long)},
        ],
    )
    def test_other_arguments(self, v3, changes):
        try:
            expected, found, count = attended(v3, **changes)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                attended(v3[:1], **changes)
            return
        assert count == 0
        assert_same(found, expected)

    def test_ranges_of_whole_tensors(self):
        """They would be of fewer rows than the model's."""
        spec = {torch.nn.Linear: dynquant.QConfig(activation="per_tensor")}
        model = randomized(small("DebertaV2", V3))
        quantized = dynquant.quantize_dynamic(model, spec)
        with pytest.warns(UserWarning, match="per_tensor"):
            model = dynquant.fuse(quantized)
        assert "per_tensor" in dynquant.fused_blocks(model)[ATTENTIONS[0]]
        assert count_of(model) == 0
        assert decibels(hidden(model), hidden(quantized)) > 35

    def test_compiled(self, v3):
        quantized, model = v3
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(model), backend="eager")
        assert decibels(hidden(compiled), hidden(quantized)) > 25

    def test_exported(self, v3):
        quantized, model = v3
        given = {"input_ids": IDS, "attention_mask": MASK}
        program = torch.export.export(copy.deepcopy(model), (), given, strict=False)
        found = program.module()(**given)[0][MASK.bool()]
        assert decibels(found, hidden(quantized)) > 25


def test_without_relative_attention():
    """Nothing is added then, by another code."""
    model = small("DebertaV2", {**TEXT, "pos_att_type": None, "relative_attention": False})
    with pytest.warns(UserWarning, match="pos_att_type is"):
        model = dynquant.fuse(dynquant.quantize_dynamic(model.eval()))
    assert dynquant.fused_blocks(model)[ATTENTIONS[0]].startswith("pos_att_type is ")


def test_a_hook_sees_the_vectors_as_a_batch(v3):
    _, model = v3
    model = copy.deepcopy(model)
    shapes = []
    key = model.get_submodule(ATTENTIONS[0]).key_proj
    key.register_forward_hook(lambda module, args, result: shapes.append(tuple(args[0].shape)))
    hidden(model)
    assert shapes == [(2, 12, 48), (1, 7, 48)]  # for 23 distances


def _scale_in_place(layer):
    layer.weight_scale.mul_(2)


def _write_past_the_count(layer):
    layer.bias.data.add_(1)


def _load(layer):
    other = dynquant.quantize_dynamic(torch.nn.Linear(48, 48))
    layer.load_state_dict(other.state_dict())


def _replace_weight(layer):
    layer.packed = layer.packed.clone()
    layer.packed[200] += 1


class TestKeptProjections:
    """The vectors of distances are projected once, until one of them or a layer changes."""

    def run(self, model):
        with torch.no_grad(), Counting() as counting:
            result = model(input_ids=IDS, attention_mask=MASK)[0]
        return result, counting.found["linear_dynamic"] + counting.found["scaled_mm"]

    def test_once(self, v3):
        _, model = v3
        model = copy.deepcopy(model)
        (expected, first), (result, second) = self.run(model), self.run(model)
        assert first - second == 4  # by two layers of each attention
        assert_same(result, expected)
        model.encoder.rel_embeddings.weight.data[3] += 1
        changed, third = self.run(model)
        assert third == first and not torch.equal(changed, expected)

    @pytest.mark.parametrize(
        "change", [_scale_in_place, _write_past_the_count, _load, _replace_weight]
    )
    @pytest.mark.parametrize("name", ["query_proj", "key_proj"])
    def test_a_change_is_noticed(self, v3, change, name):
        _, model = v3
        model = copy.deepcopy(model)
        self.run(model)
        with torch.inference_mode():
            change(model.get_submodule(ATTENTIONS[1]).get_submodule(name))
        expected = self.run(copy.deepcopy(model))[0]  # copies begin without
        assert_same(self.run(model)[0], expected)

    def test_another_dtype(self, v3):
        """Even of vectors that are the same numbers in both."""
        model = copy.deepcopy(v3[1])
        model.encoder.norm_rel_ebd = ["none"]
        model.encoder.rel_embeddings.weight.data.round_()
        for layer in model.encoder.layer:
            for name in ("query_proj", "key_proj"):
                layer.attention.self.get_submodule(name).bias.data.zero_()
        self.run(model)
        assert self.run(model.bfloat16())[0].dtype == torch.bfloat16

    def test_of_many_they_are_made_anew(self):
        wide = {**V3, "position_buckets": -1, "max_position_embeddings": 200}
        model = fused(small("DebertaV2", wide))[1]
        given = {"input_ids": torch.randint(3, 99, (1, 65))}
        with torch.no_grad(), Counting() as counting:
            model(**given)
            model(**given)
        found = counting.found
        assert found["linear_dynamic"] + found["scaled_mm"] == 8

    def test_in_inference_mode_and_out_of_it(self, v3):
        _, model = v3
        model = copy.deepcopy(model)
        with torch.inference_mode():
            expected = model(input_ids=IDS, attention_mask=MASK)[0]
        assert_same(self.run(model)[0], expected)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        assert_same(model(input_ids=IDS, attention_mask=MASK)[0], expected)


def test_copies(v3, tmp_path):
    _, model = v3
    expected = hidden(model)
    assert_same(hidden(copy.deepcopy(model)), expected)
    torch.save(model, tmp_path / "model.pt")
    assert_same(hidden(torch.load(tmp_path / "model.pt", weights_only=False)), expected)


def test_adapters():
    names = Relative("vectors", "positions", "span", "terms", "shared", "key", "query")
    attention = Attention("q", "k", "v", "head_dim", relative=names)
    given = {"arguments": ("x",), "mask": "mask"}
    Adapter(**given, attention=attention, family="disentangled")
    with pytest.raises(ValueError, match="relative: it goes with the family"):
        Adapter(**given, attention=attention)
    with pytest.raises(ValueError, match="relative: it goes with the family"):
        plain = dataclasses.replace(attention, relative=None)
        Adapter(**given, attention=plain, family="disentangled")
