"""Text encoders other than BERT's kind: padding behind their texts is not computed."""

import copy
import inspect

import pytest
import torch
from compare import assert_same
from fused import TEXT, decibels, fused, seen_one_by_one, small
from test_fused_disentangled import V3
from test_fused_padding import LENGTHS, mask_of
from test_fused_transformers import DISTILBERT, ENCODERS
from torch._subclasses import FakeTensorMode

import dynquant
from dynquant.fused.texts import FusedTexts

pytest.importorskip("transformers", reason="transformers is not installed")

MPNET = {**TEXT, "max_position_embeddings": 50}  # which are counted from 2 on
CONFIGS = {
    "DebertaV2": V3,
    "DistilBert": DISTILBERT,
    "ModernBert": ENCODERS["ModernBert"][0],
    **dict.fromkeys(("Electra", "Ernie", "Gte", "JinaEmbeddingsV3", "NomicBert"), TEXT),
    "MPNet": MPNET,
}
MASK = mask_of(LENGTHS)[torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(0))]
IDS = torch.randint(3, 99, MASK.shape, generator=torch.Generator().manual_seed(1)) * MASK


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return fused(small(request.param, CONFIGS[request.param]))[1]


@pytest.fixture(scope="module")
def mpnet():
    return fused(small("MPNet", MPNET))[1]


def call(model, mask=MASK, **arguments):
    with torch.no_grad():
        return model(**{"input_ids": IDS, "attention_mask": mask.long(), **arguments})


def leaves_out_padding(result):
    return not result[0][~MASK].any()


def test_every_token_has_the_bits_of_its_text_alone(model):
    assert isinstance(model, FusedTexts)
    found = call(model)
    assert leaves_out_padding(found)
    for index in (0, 5, 17, 31):
        seen = MASK[index]
        alone = call(model, seen[seen][None], input_ids=IDS[index : index + 1, seen])
        assert_same(found[0][index, seen], alone[0][0])
        if "pooler_output" in found:
            assert_same(found.pooler_output[index], alone.pooler_output[0])


@torch.no_grad()
def test_forms_of_the_call(model):
    found = call(model)
    positional, named = model(IDS, MASK), call(model, mask=MASK.float())
    for other in (positional, named, call(model, return_dict=False)):
        assert_same(other[0], found[0])
    assert type(call(model, return_dict=False)) is tuple
    own = inspect.signature(type(model)._base.forward)
    assert inspect.signature(type(model).forward) == own
    if "token_type_ids" in own.parameters:
        types = torch.zeros_like(IDS)
        assert_same(call(model, token_type_ids=types)[0], found[0])


def test_whole_where_more_is_asked_for(mpnet):
    states = call(mpnet, output_hidden_states=True)
    assert not leaves_out_padding(states) and len(states.hidden_states) == 3
    assert_same(states[0][MASK], call(mpnet)[0][MASK])
    embedded = mpnet.embeddings.word_embeddings(IDS).detach()
    with torch.no_grad():
        result = mpnet(inputs_embeds=embedded, attention_mask=MASK.long())
    assert not leaves_out_padding(result)
    assert not leaves_out_padding(call(mpnet, MASK.flip(1)))
    with pytest.raises(TypeError):
        mpnet(IDS, MASK, input_ids=IDS)


def test_whole_where_something_is_in_the_way(mpnet):
    expected = call(mpnet)[0][MASK]
    hooked = copy.deepcopy(mpnet)
    seen = []
    hooked.encoder.layer[0].register_forward_hook(lambda *given: seen.append(given[2][0].shape))
    result = call(hooked)
    assert_same(result[0][MASK], expected)
    assert seen == [(*MASK.shape, 48)]
    result = call(seen_one_by_one(copy.deepcopy(mpnet)))
    assert not leaves_out_padding(result)
    assert_same(result[0][MASK], expected)
    replaced = copy.deepcopy(mpnet)
    replaced.encoder.layer[1] = dynquant.dequantize(replaced.encoder.layer[1])
    assert not leaves_out_padding(call(replaced))
    result = mpnet(input_ids=IDS, attention_mask=MASK)  # wants gradients
    assert result[0].requires_grad and not leaves_out_padding(result)


def test_a_convolution_sees_neighbours():
    floats = small("DebertaV2", {**V3, "conv_kernel_size": 3, "conv_act": "gelu"})
    assert not isinstance(fused(floats)[1], FusedTexts)
    spec = {torch.nn.Linear, torch.nn.Conv1d}
    assert not isinstance(dynquant.quantize_dynamic(floats, spec, fuse=True), FusedTexts)


@torch.no_grad()
def test_a_model_without_a_pooler():
    """It gives nothing in the place of what a pooler gives."""
    from transformers import MPNetConfig, MPNetModel

    _, model = fused(MPNetModel(MPNetConfig(**MPNET), add_pooling_layer=False))
    states, pooled = call(model, return_dict=False)
    assert leaves_out_padding((states,)) and pooled is None
    assert_same(call(model).last_hidden_state, states)


@pytest.mark.parametrize("name", ["NomicBert", "Gte"])
def test_angles_that_depend_on_the_longest_text(name):
    angles = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    sizes = {**TEXT, "max_position_embeddings": 16, "rope_parameters": angles}
    quantized, model = fused(small(name, sizes), attention="float")
    found, expected = call(model)[0], call(quantized)[0]
    assert found[~MASK].any()
    assert decibels(found[MASK], expected[MASK]) > 35


@pytest.mark.parametrize("name", ["MPNet", "DebertaV2"])
def test_shapes_alone(name):
    model = fused(small(name, CONFIGS[name]))[1]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        given = mode.from_tensor(IDS), mode.from_tensor(MASK.long())
        assert model(*given)[0].shape == (*MASK.shape, 48)


def test_copies_and_pickles(mpnet, tmp_path):
    torch.save(mpnet, tmp_path / "model.pt")
    for other in (copy.deepcopy(mpnet), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert leaves_out_padding(call(other))
        assert_same(call(other)[0], call(mpnet)[0])


def test_compiled_and_exported(mpnet):
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(mpnet), backend="eager")
    found = call(compiled)[0]
    assert (found[MASK] - call(mpnet)[0][MASK]).abs().max() < 0.2
    given = {"input_ids": IDS, "attention_mask": MASK.long()}
    program = torch.export.export(copy.deepcopy(mpnet), (), given, strict=False)
    assert (program.module()(**given)[0] - found)[MASK].abs().max() < 0.2
