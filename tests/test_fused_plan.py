"""Fused models keep what they are called with: every change of their modules is noticed."""

import copy

import pytest
import torch
from compare import assert_same
from fused import IDS, fused, hidden, small
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
    assert model.__dict__["_layers"] is not None
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


CHANGES = (
    *(other_weight, other_scale, other_bias, bias_in_place, other_norm_weight, other_epsilon),
    *(other_linear, other_layer, one_more_layer, one_layer_less, float_linear, bf16),
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_noticed(model, change):
    before = hidden(model)
    change(model)
    after = hidden(model)
    assert not torch.equal(after, before)
    assert_same(after, hidden(copy.deepcopy(model)))  # a copy keeps no plan
    assert_same(after, hidden(model))


def hook_on(module, called):
    module.register_forward_hook(lambda *_: called.append("hook"))


def pre_hook_on(module, called):
    module.register_forward_pre_hook(lambda *_: called.append("pre"))


def forward_of(module, called):
    original = module.forward
    module.forward = lambda *args, **kwargs: called.append("forward") or original(*args, **kwargs)


@pytest.mark.parametrize("watch", [hook_on, pre_hook_on, forward_of])
@pytest.mark.parametrize("name", ["encoder", "encoder.layer.1", "encoder.layer.1.output.dense"])
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
