"""Fused models keep what they are called with: every change of their modules is noticed."""

import copy

import pytest
import torch
from compare import assert_same
from fused import ELSEWHERE, IDS, decibels, fused, hidden, small
from torch import nn

import dynquant
from dynquant import _C

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def made():
    return fused(small("Bert"))[1]


@pytest.fixture
def model(made):
    """One that has kept what it is called with."""
    model = copy.deepcopy(made)
    assert_same(hidden(model), hidden(model))
    assert model.__dict__["_kept"] is not None
    return model


def layer_of(model):
    return model.encoder.layer[1]


def other_weight(model):
    linear = layer_of(model).intermediate.dense
    integers = linear.state_dict()["weight_int8"]
    linear.load_state_dict(linear.state_dict() | {"weight_int8": integers.flip(0)})


def other_scale(model):
    linear = layer_of(model).attention.self.query
    linear.weight_scale = linear.weight_scale * 2


def other_bias(model):
    layer_of(model).output.dense.bias = nn.Parameter(torch.ones(48), requires_grad=False)


def bias_in_place(model):
    layer_of(model).output.dense.bias.data.add_(1)


def other_norm_weight(model):
    layer_of(model).output.LayerNorm.weight = nn.Parameter(torch.full((48,), 3.0))


def other_epsilon(model):
    layer_of(model).attention.output.LayerNorm.eps = 1.0


def other_linear(model):
    layer_of(model).output.dense = copy.deepcopy(model.encoder.layer[0].output.dense)


def other_layer(model):
    model.encoder.layer[1] = copy.deepcopy(model.encoder.layer[0])


def one_more_layer(model):
    model.encoder.layer.append(copy.deepcopy(model.encoder.layer[0]))


def one_layer_less(model):
    del model.encoder.layer[1]


def float_linear(model):
    layer_of(model).output.dense = nn.Linear(80, 48)


def bf16(model):
    model.to(torch.bfloat16)


def other_words(model):
    words = model.embeddings.word_embeddings
    words.weight = nn.Parameter(words.weight.detach() * 2)


def words_in_place(model):
    model.embeddings.word_embeddings.weight.data.mul_(2)


def other_positions(model):
    positions = copy.deepcopy(model.embeddings.position_embeddings)
    positions.weight.data.mul_(2)
    model.embeddings.position_embeddings = positions


def bounded_words(model):
    model.embeddings.word_embeddings.max_norm = 0.1


def other_embedding_norm(model):
    model.embeddings.LayerNorm.eps = 1.0


def other_embeddings(model):
    model.embeddings = copy.deepcopy(model.embeddings)
    words_in_place(model)


def other_pooler(model):
    model.pooler = copy.deepcopy(model.pooler)
    model.pooler.dense.weight_scale.mul_(2)


def no_pooler(model):
    model.pooler = None


@torch.no_grad()
@pytest.mark.parametrize("change", [other_pooler, no_pooler])
def test_a_change_of_the_pooler_is_noticed(model, change):
    before = model(IDS).pooler_output
    change(model)
    after, copied = model(IDS).pooler_output, copy.deepcopy(model)(IDS).pooler_output
    if model.pooler is None:
        assert after is None
    else:
        assert not torch.equal(after, before)
        assert_same(after, copied)


CHANGES = (
    *(other_weight, other_scale, other_bias, bias_in_place, other_norm_weight, other_epsilon),
    *(other_linear, other_layer, one_more_layer, one_layer_less, float_linear, bf16),
    *(other_words, words_in_place, other_positions, bounded_words, other_embedding_norm),
    other_embeddings,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(model, change):
    before = hidden(model)
    change(model)
    after = hidden(model)
    assert not torch.equal(after, before)
    assert_same(after, hidden(copy.deepcopy(model)))  # a copy keeps no plan
    assert_same(after, hidden(model))


@pytest.mark.parametrize("change", ELSEWHERE, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["encoder.layer.1.output.LayerNorm", "embeddings.LayerNorm"])
def test_a_norm_whose_parameters_are_elsewhere(change, name):
    quantized, model = fused(small("Bert"), attention="float")
    before = hidden(model)
    for one in (model, quantized):
        norm = one.get_submodule(name)
        norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
        norm.bias.data.normal_(generator=torch.Generator().manual_seed(0))
        change(norm)
    found = hidden(model)
    assert decibels(found, before) < 20 and decibels(found, hidden(quantized)) > 35


def hook_on(module, called):
    module.register_forward_hook(lambda *_: called.append("hook"))


def pre_hook_on(module, called):
    module.register_forward_pre_hook(lambda *_: called.append("pre"))


def forward_of(module, called):
    original = module.forward
    module.forward = lambda *args, **kwargs: called.append("forward") or original(*args, **kwargs)


@pytest.mark.parametrize("watch", [hook_on, pre_hook_on, forward_of])
@pytest.mark.parametrize(
    "name",
    [
        *("encoder", "encoder.layer.1", "encoder.layer.1.output.dense", "pooler", "pooler.dense"),
        *("embeddings", "embeddings.word_embeddings", "embeddings.dropout"),
        "embeddings.LayerNorm",
    ],
)
def test_what_watches_is_called(model, name, watch):
    before, called = hidden(model), []
    watch(model.get_submodule(name), called)
    assert_same(hidden(model), before)
    assert len(called) == 1


def test_training_is_noticed(model):
    dropout = layer_of(model).output.dropout
    dropout.train()
    assert dynquant.fused_blocks(model)["encoder.layer.1"] == "dropout is in training mode"
    assert not torch.equal(hidden(model), hidden(model))
    dropout.eval()
    assert_same(hidden(model), hidden(model))


def test_a_loaded_state_dict_is_noticed(model):
    after = fused(small("Bert"))[1]
    with torch.no_grad():
        for linear in (one for one in after.modules() if isinstance(one, dynquant.nn.Linear)):
            linear.weight_scale.mul_(2)
    model.load_state_dict(after.state_dict())
    assert_same(hidden(model), hidden(after))


@torch.no_grad()
def test_a_causal_layer_is_noticed(model):
    before = model(IDS)[0]
    layer_of(model).attention.self.is_causal = True
    after = model(IDS)[0]
    assert not torch.equal(after, before)
    assert_same(after, copy.deepcopy(model)(IDS)[0])


@torch.no_grad()
def test_a_change_of_the_config_is_noticed():
    model = fused(small("Bert"))[1]  # copies share the config
    assert model(IDS).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(IDS).hidden_states) == 3
    model.config.output_hidden_states = False
    assert model(IDS).hidden_states is None
    model.config.return_dict = False
    assert type(model(IDS)) is tuple
    assert model(IDS, return_dict=True).hidden_states is None


@torch.no_grad()
@pytest.mark.parametrize("shape", [(2, 12), (1, 12)])
def test_types_of_tokens(model, shape):
    types = torch.ones(shape, dtype=torch.int64)
    after = hidden(model, token_type_ids=types)
    assert not torch.equal(after, hidden(model))
    assert_same(after, hidden(model, token_type_ids=types.expand(2, 12).clone()))


def test_gradients_are_given(model):
    ids = torch.tensor([[5, 6, 7]])
    result = model(ids).last_hidden_state
    result.sum().backward()
    assert model.embeddings.word_embeddings.weight.grad is not None


@torch.no_grad()
def test_layers_that_are_not_alike_run_one_by_one(model):
    layer = layer_of(model)
    for linear in (one for one in layer.modules() if isinstance(one, dynquant.nn.Linear)):
        linear.activation_bits = 16
    layer.__dict__.pop("_parts")
    model.__dict__.pop("_kept")
    after = hidden(model)
    assert model.__dict__["_kept"] is None
    assert not any(dynquant.fused_blocks(model).values())
    assert_same(after, hidden(copy.deepcopy(model)))


class TestUnchanged:
    def test_same(self):
        value, table = object(), {}
        assert not _C.unchanged((table, "key", value), (), (), ())
        table["key"] = value
        assert _C.unchanged((table, "key", value), (), (), ())
        assert not _C.unchanged((table, "key", object()), (), (), ())

    def test_empty(self):
        table = {"key": {}}
        assert _C.unchanged((), (table, "key"), (), ())
        table["key"][1] = 1
        assert not _C.unchanged((), (table, "key"), (), ())
        table["key"] = None
        assert not _C.unchanged((), (table, "key"), (), ())
        assert not _C.unchanged((), ({}, "key"), (), ())

    def test_absent(self):
        assert _C.unchanged((), (), ({}, "key"), ())
        assert not _C.unchanged((), (), ({"key": None}, "key"), ())

    def test_types(self):
        assert _C.unchanged((), (), (), (1, int))
        assert not _C.unchanged((), (), (), (True, int))

    @pytest.mark.parametrize("at", range(4))
    def test_what_is_malformed_has_changed(self, at):
        given = [()] * 4
        given[at] = (3,)
        assert not _C.unchanged(*given)
        if at < 3:
            given[at] = (3, "key", 3) if at == 0 else (3, "key")
            assert not _C.unchanged(*given)

    def test_a_key_without_hash_is_an_error(self):
        with pytest.raises(TypeError, match="unhashable"):
            _C.unchanged(({}, [], 1), (), (), ())
