"""Layers of decoders as ops, for tokens behind a cache, with their norms and sums."""

import copy
import pickle
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from compare import assert_same
from fused import (
    ELSEWHERE,
    SEQUENCES,
    TEXT,
    WHISPER,
    Counting,
    decibels,
    fused,
    randomized,
    small,
)
from torch import nn

import dynquant
from dynquant.fused import Adapter, FeedForward, Sublayers
from dynquant.fused.classes import base_of, swap_class
from dynquant.fused.decoder import FusedDecoder
from dynquant.fused.inline import FusedInline

OPT = {**TEXT, "ffn_dim": 80, "word_embed_proj_dim": 48}
TWO = {"Whisper": WHISPER, **dict.fromkeys(("Bart", "MBart", "Marian", "M2M100"), SEQUENCES)}
# OPT with norms in front and behind.
ONE = {"OPT": OPT, "OPT-350m": {**OPT, "do_layer_norm_before": False}}
PROMPT = torch.randint(3, 99, (2, 4), generator=torch.Generator().manual_seed(1))
NEXT = torch.randint(3, 99, (2, 1), generator=torch.Generator().manual_seed(2))
STATES = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(3))


def built(name):
    return fused(small(name.partition("-")[0], {**TWO, **ONE}[name]))


@pytest.fixture(scope="module", params=[*TWO, *ONE])
def made(request):
    return (request.param, *built(request.param))


@pytest.fixture(scope="module")
def bart():
    return built("Bart")


def stack(model):
    return getattr(model, "decoder", model)


def layers_of(model):
    return stack(model).layers


def new_cache(model):
    from transformers import DynamicCache, EncoderDecoderCache

    own = DynamicCache()
    return EncoderDecoderCache(own, DynamicCache()) if hasattr(model, "encoder") else own


@torch.no_grad()
def after_prompt(model, tokens=(NEXT,), **arguments):
    """The last output for tokens, one after another behind PROMPT, and which ops ran for it."""
    given = {"use_cache": True, "cache": new_cache(model)}
    if hasattr(model, "encoder"):
        given["encoder_hidden_states"] = STATES
    given |= {k: v for k, v in arguments.items() if k.startswith("encoder_")}
    stack(model)(input_ids=PROMPT, **given)
    for ids in tokens:
        with Counting() as counting:
            output = stack(model)(input_ids=ids, **{**given, **arguments})
    return output[0], counting.found


@contextmanager
def in_parts(model):
    """Within the block, the layers of a model run their own forward."""
    layers = [layer for layer in layers_of(model) if isinstance(layer, FusedDecoder)]
    assert layers
    try:
        for layer in layers:
            swap_class(layer, FusedInline, *layer._settings)
        yield
    finally:
        for layer in layers:
            swap_class(layer, FusedDecoder, *layer._settings)


def expected_ops(name):
    return {"query_key_value": 2, "attend": 4 if name in TWO else 2, "feed_forward": 2}


def test_a_token_is_ops_alone(made):
    name, quantized, model = made
    found, ops = after_prompt(model, (NEXT, NEXT))
    assert {key: ops[key] for key in expected_ops(name)} == expected_ops(name)
    assert ops["layer_norm"] <= 1  # the model's own, behind the last layer
    assert decibels(found, after_prompt(quantized, (NEXT, NEXT))[0]) > 90


def test_the_same_bits_as_in_parts(made):
    _, _, model = made
    with in_parts(model):
        expected, ops = after_prompt(model, (NEXT, NEXT))
    assert ops["layer_norm"] >= 4
    assert_same(after_prompt(model, (NEXT, NEXT))[0], expected)


@pytest.mark.parametrize("count", [3, 17])
def test_several_tokens(made, count):
    name, quantized, model = made
    ids = torch.randint(3, 99, (2, count), generator=torch.Generator().manual_seed(4))
    found, ops = after_prompt(model, (ids,))
    assert ops["query_key_value"] == ops["feed_forward"] == 2 and ops["layer_norm"] <= 1
    assert decibels(found, after_prompt(quantized, (ids,))[0]) > 90
    with in_parts(model):
        assert_same(after_prompt(model, (ids,))[0], found)


def test_padding(made):
    name, quantized, model = made
    given = {"attention_mask": torch.ones(2, 5, dtype=torch.long)}
    given["attention_mask"][1, :2] = 0
    if name in TWO and name != "Whisper":
        given["encoder_attention_mask"] = torch.ones(2, 9, dtype=torch.long)
        given["encoder_attention_mask"][0, 4:] = 0
    found, ops = after_prompt(model, **given)
    assert ops["layer_norm"] <= 1
    assert decibels(found, after_prompt(quantized, **given)[0]) > 90


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies(made, copied):
    _, _, model = made
    other = copied(model)
    assert all(isinstance(layer, FusedDecoder) for layer in layers_of(other))
    found, ops = after_prompt(other)
    assert ops["layer_norm"] <= 1
    assert_same(found, after_prompt(model)[0])


def every_part(model):
    """The names of the modules inside a layer."""
    return [name for name, _ in layers_of(model)[0].named_modules() if name]


@pytest.mark.parametrize("name", ["Whisper", "Bart", "OPT"])
def test_a_hook_on_any_part_is_called_and_changes_no_bit(name):
    _, model = built(name)
    expected = after_prompt(model)[0]
    for part in every_part(model):
        seen = []
        module = layers_of(model)[0].get_submodule(part)
        handle = module.register_forward_hook(lambda *given, seen=seen: seen.append(1))
        found, _ = after_prompt(model)
        handle.remove()
        assert seen, part
        assert_same(found, expected, part)
    assert after_prompt(model)[1]["layer_norm"] <= 1


def double(parameter):
    return nn.Parameter(parameter.detach() * 2, requires_grad=False)


def replace_weight(norm):
    norm.weight = double(norm.weight)


def elsewhere(change, layer):
    change(layer.final_layer_norm)


CHANGES = {
    "weight of a norm": lambda layer: replace_weight(layer.self_attn_layer_norm),
    "weight of a norm in place": lambda layer: layer.final_layer_norm.weight.data.mul_(2),
    "epsilon": lambda layer: setattr(layer.encoder_attn_layer_norm, "eps", 0.5),
    "scale": lambda layer: setattr(layer.encoder_attn, "scaling", 0.1),
    "bias": lambda layer: setattr(layer.fc2, "bias", double(layer.fc2.bias)),
    **{change.__name__: partial(elsewhere, change) for change in ELSEWHERE},
    "another norm": lambda layer: setattr(layer, "final_layer_norm", nn.Identity()),
    "another linear layer": lambda layer: setattr(layer.encoder_attn, "q_proj", nn.Linear(48, 48)),
    "another attention": lambda layer: setattr(layer, "self_attn", copy.deepcopy(layer.self_attn)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(bart, change):
    quantized, model = (copy.deepcopy(one) for one in bart)
    before = after_prompt(model)[0]
    for one in (model, quantized):
        torch.manual_seed(0)
        CHANGES[change](layers_of(one)[0])
    found = after_prompt(model)[0]
    if change != "another attention":
        assert decibels(found, before) < 60
    # Some of its bytes may round otherwise.
    assert decibels(found, after_prompt(quantized)[0]) > 45
    if change != "another linear layer":
        with in_parts(model):
            assert_same(after_prompt(model)[0], found)


@pytest.mark.parametrize("name", ["self_attn", "encoder_attn"])
def test_an_attention_that_is_no_block(name):
    """The layer runs in parts, its feed-forward block as one op."""
    quantized = dynquant.quantize_dynamic(randomized(small("Bart", SEQUENCES)))
    for layer in quantized.decoder.layers:
        getattr(layer, name).q_proj = nn.Linear(48, 48)
    with pytest.warns(UserWarning, match="q_proj is of type Linear"):
        model = dynquant.fuse(quantized)
    assert not any(isinstance(layer, FusedDecoder) for layer in layers_of(model))
    found, ops = after_prompt(model)
    assert ops["feed_forward"] == 2
    assert decibels(found, after_prompt(quantized)[0]) > 90


def test_another_forward_around_the_same_parts():
    """A layer of that class that does something else is found out, though its parts are known."""
    from transformers.models.bart.modeling_bart import BartDecoderLayer

    def forward(self, hidden_states, *args, **kwargs):
        return own(self, hidden_states * 2, *args, **kwargs) * 0.5

    own = BartDecoderLayer.forward
    quantized = dynquant.quantize_dynamic(randomized(small("Bart", SEQUENCES)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BartDecoderLayer, "forward", forward)
        with pytest.warns(UserWarning, match=r"layers\.1 around its attentions: differs"):
            model = dynquant.fuse(quantized)
        assert not any(isinstance(layer, FusedDecoder) for layer in layers_of(model))
        assert decibels(after_prompt(model)[0], after_prompt(quantized)[0]) > 90


def test_training_drops(bart):
    _, model = (copy.deepcopy(one) for one in bart)
    layers_of(model)[0].train()
    assert not torch.equal(after_prompt(model)[0], after_prompt(model)[0])
    layers_of(model)[0].eval()
    assert_same(after_prompt(model)[0], after_prompt(bart[1])[0])


def test_probabilities_that_are_asked_for(bart):
    quantized, model = bart
    before = after_prompt(model)[0]
    stack(model).set_attn_implementation("eager")
    stack(quantized).set_attn_implementation("eager")
    try:
        found, _ = after_prompt(model, output_attentions=True)
        assert decibels(found, after_prompt(quantized, output_attentions=True)[0]) > 90
    finally:
        for one in bart:
            stack(one).set_attn_implementation("sdpa")
    assert_same(after_prompt(model)[0], before)


def test_hidden_states_are_captured(bart):
    _, model = (copy.deepcopy(one) for one in bart)
    expected = after_prompt(model)[0]
    given = {"use_cache": True, "cache": new_cache(model), "encoder_hidden_states": STATES}
    with torch.no_grad():
        stack(model)(input_ids=PROMPT, **given)
        output = stack(model)(input_ids=NEXT, output_hidden_states=True, **given)
    assert len(output.hidden_states) == 3
    assert_same(output[0], expected)
    assert_same(output.hidden_states[-1], expected)
    # The hooks stay, and do nothing.
    found, ops = after_prompt(model)
    assert ops["layer_norm"] <= 1
    assert_same(found, expected)


def test_the_first_token_behind_a_new_second_sequence(bart):
    """No cache has its keys yet: the token is in the layer's own cache once, whatever runs."""
    results = []
    for model in bart:
        cache = new_cache(model)
        with torch.no_grad():
            stack(model)(input_ids=PROMPT, cache=cache, use_cache=True)
            output = stack(model)(input_ids=NEXT, cache=cache, encoder_hidden_states=STATES)
        assert cache.get_seq_length() == 5 and all(cache.is_updated.values())
        results.append(output[0])
    assert decibels(*results) > 90


@torch.no_grad()
def test_calls_of_a_layer(bart):
    _, model = bart
    layer, x = layers_of(model)[0], torch.randn(2, 1, 48)

    def started():
        cache = new_cache(model)
        stack(model)(input_ids=PROMPT, encoder_hidden_states=STATES, cache=cache)
        return cache

    expected = layer(x, None, STATES, None, started(), use_cache=True)
    named = {"attention_mask": None, "encoder_hidden_states": STATES, "cache": started()}
    assert_same(layer(hidden_states=x, **named), expected)
    assert_same(layer(x, **{**named, "cache": started()}, use_cache=True), expected)
    found = layer(x, **{**named, "cache": started()}, something=3)  # the attentions do not know it
    assert decibels(found, expected) > 90
    with pytest.raises(TypeError, match="multiple values"):
        layer(x, hidden_states=x, cache=started())
    # An argument of the attentions that the layer itself gives to one of them.
    cache = started()
    with pytest.raises(TypeError, match="multiple values"):
        layer(x, **{**named, "cache": cache}, key_value_states=STATES)
    alone = layer._base.forward(layer, x, cache=started(), key_value_states=STATES)
    assert_same(layer(x, cache=started(), key_value_states=STATES), alone)


def test_what_a_cache_is_told(bart):
    """The same as by the layer's own forward."""
    from transformers import DynamicCache

    class Told(DynamicCache):
        def update(self, key, value, index, **kwargs):
            told.append((index, kwargs))
            return super().update(key, value, index, **kwargs)

    _, model = bart
    found = []
    for way in (nullcontext, partial(in_parts, model)):
        told, cache = [], new_cache(model)
        cache.self_attention_cache = Told()
        with torch.no_grad(), way():
            stack(model)(input_ids=PROMPT, encoder_hidden_states=STATES, cache=cache)
            stack(model)(input_ids=NEXT, encoder_hidden_states=STATES, cache=cache, use_cache=True)
        found.append(told[-2:])
    assert found[0] == found[1]


def test_a_forward_that_is_patched_later(bart):
    from transformers.models.bart.modeling_bart import BartDecoderLayer

    _, model = bart
    expected, own = after_prompt(model)[0], BartDecoderLayer.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BartDecoderLayer, "forward", lambda *given, **named: own(*given, **named) * 2)
        assert decibels(after_prompt(model)[0], expected) < 20
    assert_same(after_prompt(model)[0], expected)


@torch.no_grad()
def test_the_class_of_a_layer(bart):
    layer = layers_of(bart[1])[0]
    assert base_of(type(layer)).__name__ == "BartDecoderLayer"


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"cross": "c"}, None, "name all, or none"),
        ({}, {"inline": False}, "go with inline"),
        ({}, {"mask": None}, "names for cache and mask"),
        ({}, {"rotary": "r"}, "without rotary"),
    ],
)
def test_wrong_adapters(given, options, message):
    names = FeedForward(up="fc1", activation="act", down="fc2")
    with pytest.raises(ValueError, match=message):
        sublayers = Sublayers("attention", "norm", "last", **given)
        usual = {"inline": True, "mask": "mask", "cache": "cache", "feed_forward": names}
        Adapter(("x",), sublayers=sublayers, **{**usual, **options})
