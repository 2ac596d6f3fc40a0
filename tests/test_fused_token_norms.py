"""Norms in layers that run as ops for tokens behind a cache: every change of them is noticed."""

import pytest
from compare import assert_same
from fused import decibels, fused, small
from test_fused_token import CONFIG, GEMMA3, MODELS, after_prompt, assert_close, runs_as_ops
from torch import nn


@pytest.mark.parametrize("names", [["k_norm"], ["q_norm", "k_norm"]])
def test_another_epsilon_of_the_heads_is_noticed(names):
    quantized, model = fused(small("Qwen3", CONFIG))
    after_prompt(model)
    for one in (model, quantized):
        for name in names:
            getattr(one.layers[0].self_attn, name).variance_epsilon = 0.5
    assert runs_as_ops(after_prompt(model)[2])
    assert_close(model, quantized)


GEMMA3_NORMS = (
    *("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)


@pytest.mark.parametrize("name", GEMMA3_NORMS)
def test_a_change_of_a_norm_is_noticed(name):
    quantized, model = fused(small("Gemma3Text", GEMMA3))
    before = after_prompt(model)[0][0]
    for one in (model, quantized):
        norm = one.layers[0].get_submodule(name)
        norm.eps = 0.5
    assert_close(model, quantized)
    for one in (model, quantized):
        norm = one.layers[0].get_submodule(name)
        norm.weight = nn.Parameter(norm.weight.flip(0), requires_grad=False)
    found, _, ops = after_prompt(model)
    assert runs_as_ops(ops) and decibels(found[0], before) < 60
    assert_close(model, quantized)
    handle = (
        model.layers[0].get_submodule(name).register_forward_hook(lambda *seen: seen[2].flip(-1))
    )
    assert decibels(after_prompt(model)[0][0], found[0]) < 60
    handle.remove()
    assert_same(after_prompt(model)[0][0], found[0])


@pytest.mark.parametrize("name", ["Gemma", "Gemma3Text"])
def test_a_write_to_the_weight_of_a_norm(name):
    """What a layer is called with is kept, and a norm's weight is read at each call."""
    quantized, model = fused(small(name, MODELS[name]))
    before = after_prompt(model)[0][0]
    assert model.layers[0]._parts.plan is not None
    for one in (model, quantized):
        for norm in one.layers[0].modules():
            if "Norm" in type(norm).__name__:
                norm.weight.data.add_(0.5)
    assert decibels(after_prompt(model)[0][0], before) < 40
    assert_close(model, quantized)
