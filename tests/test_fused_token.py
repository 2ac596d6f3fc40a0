"""Tokens behind a cache: the attention of decoders, in parts of ops."""

import copy
import pickle
import warnings
from collections import Counter
from functools import partial

import pytest
import torch
from compare import assert_same
from fused import (
    TEXT,
    Counting,
    assert_alike,
    decibels,
    fused,
    gradients_of_kept,
    randomized,
    seen_one_by_one,
    small,
)
from torch import nn

import dynquant
from dynquant.fused import Adapter, Attention, SharedKeys, Stretch, register

CONFIG = {**TEXT, "num_key_value_heads": 2, "head_dim": 12}
GEMMA3 = {**CONFIG, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 40}
# A quarter of 32 features of a head is turned in StableLM; StarCoder 2 has layer norms as it has.
TURNED = {
    **TEXT,
    "hidden_size": 128,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Qwen 3 has norms of heads, Gemma adds 1 to the weights of norms, Gemma 3 has both, and norms of
# what its attention and its feed-forward block give. OLMo and Exaone 4 have these without norms
# before them; a norm of OLMo's is of all heads together. Phi-3 and GPT-2 have one linear layer for
# query, key and value. The second layer of SmolLM3 has no rotary embedding. GLM, Helium and ERNIE
# 4.5 turn pairs of neighbors, GLM half of a head's features, and GLM 4 has norms before and behind.
# Gemma 2 caps its scores, Ministral 3 multiplies queries by a number that grows from the third
# position on.
MODELS = {
    **dict.fromkeys(("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3"), CONFIG),
    "Gemma3Text": GEMMA3,
    "Gemma2": {**GEMMA3, "attn_logit_softcapping": 1.0},
    "Olmo2": CONFIG,
    "Olmo3": GEMMA3,
    "Exaone4": {**CONFIG, "sliding_window": None, "layer_types": 2 * ["full_attention"]},
    "GPT2": GPT2,
    "SmolLM3": {**CONFIG, "no_rope_layers": [1, 0]},
    **dict.fromkeys(("Starcoder2", "StableLm"), TURNED),
    "Arcee": CONFIG,
    "Ministral3": {
        **CONFIG,
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.5},
            "original_max_position_embeddings": 3,
        },
    },
    **dict.fromkeys(("Glm", "Glm4", "Helium", "Ernie4_5"), {**CONFIG, "pad_token_id": 0}),
}
OPS = {"query_key_value": 2, "attend": 2, "feed_forward": 2}
PROMPT = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))
NEXT = torch.randint(3, 99, (2, 1), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    return fused(small(request.param, MODELS[request.param]))


@pytest.fixture(scope="module")
def llama():
    return fused(small("Llama", CONFIG))


@torch.no_grad()
def after_prompt(model, tokens=NEXT, cache=None, **arguments):
    """The output for tokens behind PROMPT, the cache, and which ops ran for these tokens."""
    cache = model(input_ids=PROMPT, cache=cache, use_cache=True).cache
    with Counting() as counting:
        output = model(input_ids=tokens, cache=cache, use_cache=True, **arguments)
    return output, output.cache, counting.found


def runs_as_ops(found):
    """Whether all layers do: their norms are in their ops, and the model's last one is left."""
    norms = found["rms_norm"] + found["layer_norm"]
    return Counter({**found, **OPS}) == Counter(found) and norms <= 1


def first_layer(model):
    """The layer, and the names of its attention and of a part of its feed-forward block."""
    if hasattr(model, "h"):
        return model.h[0], "attn", "mlp.c_fc"
    layer = model.layers[0]
    return layer, "self_attn", "mlp.c_fc" if hasattr(layer.mlp, "c_fc") else "mlp.down_proj"


def assert_close(model, quantized, least=90, **arguments):
    """Both give the same for one token, and their caches hold the same then."""
    (found, cache, _), (expected, other, _) = (
        after_prompt(one, **arguments) for one in (model, quantized)
    )
    assert decibels(found[0], expected[0]) > least
    assert_alike(cache, other, least)


def test_a_token_runs_as_ops(made):
    quantized, model = made
    blocks = dynquant.fused_blocks(model)
    assert len(blocks) == 2 and not any(blocks.values())
    _, cache, ops = after_prompt(model)
    assert runs_as_ops(ops) and cache.get_seq_length() == 8
    assert_close(model, quantized)


def test_a_prompt(made):
    quantized, model = made
    with torch.no_grad(), Counting() as counting:
        found = model(input_ids=PROMPT, use_cache=True)[0]
    assert runs_as_ops(counting.found)
    with torch.no_grad():
        assert decibels(found, quantized(input_ids=PROMPT, use_cache=True)[0]) > 90


@pytest.mark.parametrize("tokens", [2, 5, 16, 17])
def test_several_tokens_behind_a_cache(made, tokens):
    quantized, model = made
    given = torch.randint(3, 99, (2, tokens), generator=torch.Generator().manual_seed(3))
    found, cache, ops = after_prompt(model, given)
    assert runs_as_ops(ops)
    expected, other, _ = after_prompt(quantized, given)
    # Among so many bytes, one or another rounds otherwise.
    assert decibels(found[0], expected[0]) > 45
    assert_alike(cache, other, 45)


def test_several_tokens_are_those_that_come_one_by_one(made):
    _, model = made
    given = torch.randint(3, 99, (2, 4), generator=torch.Generator().manual_seed(3))
    found = after_prompt(model, given)[0][0]
    with torch.no_grad():
        cache = model(input_ids=PROMPT, use_cache=True).cache
        each = [model(input_ids=token, cache=cache)[0] for token in given.split(1, 1)]
    assert decibels(found, torch.cat(each, 1)) > 90


def test_a_mask_of_several_tokens(llama):
    """Each of them may see others of those before: it need not be causal."""
    quantized, model = llama
    seen = torch.rand(2, 1, 3, 10, generator=torch.Generator().manual_seed(3)) < 0.7
    seen[..., 0] = True
    given = {"tokens": PROMPT[:, :3], "attention_mask": seen}
    assert runs_as_ops(after_prompt(model, **given)[2])
    assert_close(model, quantized, **given)


def test_padding(made):
    quantized, model = made
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    assert runs_as_ops(after_prompt(model, attention_mask=mask)[2])
    assert_close(model, quantized, attention_mask=mask)


def test_the_eager_attention():
    quantized, model = fused(small("Llama", CONFIG, attn_implementation="eager"))
    assert runs_as_ops(after_prompt(model)[2])
    assert_close(model, quantized)
    # Its probabilities are asked for: they are its own, and the token is in the cache once.
    before = after_prompt(model)[0][0]
    found, cache, _ = after_prompt(model, output_attentions=True)
    expected = after_prompt(quantized, output_attentions=True)[0]
    assert cache.get_seq_length() == 8
    assert_same(found[0], before)
    assert found.attentions[0].shape == (2, 4, 1, 8)
    assert decibels(found.attentions[1], expected.attentions[1]) > 90
    # It adds even bool masks.
    seen = torch.rand(2, 1, 1, 8, generator=torch.Generator().manual_seed(3)) < 0.5
    assert after_prompt(model, attention_mask=seen)[2]["query_key_value"] == 0
    found, expected = (after_prompt(one, attention_mask=seen)[0][0] for one in (model, quantized))
    assert decibels(found, expected) > 90


def test_a_window():
    quantized, model = fused(small("Mistral", CONFIG, sliding_window=4))
    found, cache, ops = after_prompt(model)
    assert runs_as_ops(ops) and cache.layers[0].keys.shape[2] < 8
    assert_close(model, quantized)


def test_a_static_cache(llama):
    from transformers import StaticCache

    quantized, model = llama
    caches = [StaticCache(config=model.config, max_cache_len=12) for _ in llama]
    (found, _, ops), (expected, _, _) = (
        after_prompt(one, cache=cache)
        for one, cache in zip((model, quantized), caches, strict=True)
    )
    assert runs_as_ops(ops) and decibels(found[0], expected[0]) > 90
    assert decibels(caches[0].layers[1].keys, caches[1].layers[1].keys) > 90


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}])
def test_generate(options):
    import transformers

    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**CONFIG))
    quantized, model = fused(model)
    prompt, mask = PROMPT, torch.ones_like(PROMPT)
    mask[0, :2] = 0
    if "prompt_lookup_num_tokens" in options:  # several tokens at once, and caches that are cropped
        prompt, mask = PROMPT[1:, [0, 1, 2, 3, 0, 1, 2]], None
    options |= {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with Counting() as counting:
        found = model.generate(prompt, attention_mask=mask, **options)
    assert counting.found["query_key_value"] > 0
    assert found.shape == (len(prompt), 15)
    assert_same(found, quantized.generate(prompt, attention_mask=mask, **options))


def test_generate_behind_a_window():
    import transformers

    model = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GEMMA3))
    quantized, model = fused(model)
    mask = torch.ones_like(PROMPT)
    mask[0, :2] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    found = model.generate(PROMPT, attention_mask=mask, **options)
    assert_same(found, quantized.generate(PROMPT, attention_mask=mask, **options))


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text"])
def test_16_bits(name):
    model = randomized(small(name, MODELS[name])).bfloat16()
    quantized = dynquant.quantize_dynamic(model)
    model = dynquant.fuse(quantized)
    found, cache, ops = after_prompt(model)
    assert runs_as_ops(ops)
    assert found[0].dtype == cache.layers[0].keys.dtype == torch.bfloat16
    assert_close(model, quantized, least=20)


def test_threads(llama):
    _, model = llama
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(after_prompt(model)[0][0])
    finally:
        torch.set_num_threads(before)
    assert_same(*results)


@pytest.mark.parametrize("of_attention", [True, False])
def test_a_hook_is_called_and_changes_no_bit(made, of_attention):
    _, model = made
    expected = after_prompt(model)[0][0]
    model, seen = copy.deepcopy(model), []
    layer, attention, part = first_layer(model)
    if of_attention:
        part = next(
            f"{attention}.{name}"
            for name, one in layer.get_submodule(attention).named_children()
            if isinstance(one, dynquant.nn.Linear | dynquant.nn.Conv1D)
        )
    handle = layer.get_submodule(part).register_forward_hook(lambda *given: seen.append(1))
    found, _, ops = after_prompt(model)
    assert len(seen) == 2
    assert ops["query_key_value"] == (1 if of_attention else 2)
    assert_same(found[0], expected)
    assert "has hooks" in next(iter(dynquant.fused_blocks(model).values()))
    handle.remove()
    assert runs_as_ops(after_prompt(model)[2])


def test_hooks_everywhere_change_no_bit(made):
    _, model = made
    expected = after_prompt(model)[0][0]
    found, _, ops = after_prompt(seen_one_by_one(copy.deepcopy(model)))
    assert ops["query_key_value"] == 0
    assert_same(found[0], expected)


def test_a_cache_gets_its_gradient(llama):
    gradients = []
    for model in llama:
        model = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            cache = model(input_ids=PROMPT, use_cache=True).cache
        run = partial(model, input_ids=NEXT, cache=cache)
        gradients.append(gradients_of_kept(cache.layers[0], run))
    for found, expected in zip(*gradients, strict=True):
        assert decibels(found, expected) > 90


def test_a_norm_that_learns_is_called(llama):
    _, model = llama
    cache = model(input_ids=PROMPT, use_cache=True).cache
    with Counting() as counting:
        output = model(input_ids=NEXT, cache=cache)[0]
    assert counting.found["query_key_value"] == 0 and output.requires_grad


@pytest.mark.parametrize("name", ["scaling", "layer_idx"])
def test_another_number_is_noticed(llama, name):
    quantized, model = (copy.deepcopy(one) for one in llama)
    after_prompt(model)
    for one in (model, quantized):
        first, second = (layer.self_attn for layer in one.layers)
        if name == "scaling":
            first.scaling = 0.1
        else:
            first.layer_idx, second.layer_idx = 1, 0
    assert runs_as_ops(after_prompt(model)[2])
    assert_close(model, quantized)


def test_a_rotary_embedding_that_is_switched_is_noticed():
    quantized, model = fused(small("SmolLM3", MODELS["SmolLM3"]))
    before = after_prompt(model)[0][0]
    for one in (model, quantized):
        for layer, rotates in zip(one.layers, (0, 1), strict=True):
            layer.self_attn.use_rope = rotates
    found, _, ops = after_prompt(model)
    assert runs_as_ops(ops) and decibels(found[0], before) < 60
    assert_close(model, quantized)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies(made, copied):
    _, model = made
    other = copied(model)
    found, _, ops = after_prompt(other)
    assert runs_as_ops(ops)
    assert_same(found[0], after_prompt(model)[0][0])


def test_fewer_heads_of_key_and_value_in_one_layer():
    """num_key_value_heads tells them; one that does not fit is an obstacle."""
    _, model = fused(small("Phi3", CONFIG))
    parts = model.layers[0]._current_parts()
    assert (parts.heads, parts.kv_heads) == (4, 2)
    attention = dynquant.quantize_dynamic(randomized(small("Phi3", CONFIG))).layers[0].self_attn
    attention.num_key_value_heads = 3
    with pytest.warns(UserWarning, match="96 features of queries for heads of 12"):
        dynquant.fuse(nn.Sequential(attention))


def test_a_second_sequence():
    """With a cache of an encoder and a decoder, the model's own attention runs."""
    from transformers import DynamicCache, EncoderDecoderCache

    model = small("GPT2", GPT2, add_cross_attention=True)
    quantized = dynquant.quantize_dynamic(randomized(model))
    with pytest.warns(UserWarning, match="crossattention"):
        model = dynquant.fuse(quantized)
    states = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    outputs = []
    for one in (model, quantized):
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        given = {"encoder_hidden_states": states, "use_cache": True}
        with torch.no_grad():
            one(input_ids=PROMPT, cache=cache, **given)
            outputs.append(one(input_ids=NEXT, cache=cache, **given)[0])
    assert decibels(*outputs) > 90


class Toy(nn.Module):
    """An attention with a cache; `style` says how it uses it."""

    def __init__(self, style="kwargs", norm=None, configured=True):
        super().__init__()
        for name in ("q", "k", "v", "o"):
            self.add_module(name, nn.Linear(48, 48))
        self.q_norm, self.k_norm = (norm or nn.Identity)(12), (norm or nn.Identity)(12)
        self.size, self.number, self.style = 12, 3, style
        if configured:
            self.config = small("Llama", CONFIG).config

    def forward(self, x, mask=None, cache=None, **kwargs):
        q, k, v = (
            each(x).unflatten(-1, (-1, 12)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if cache is None:
            pass
        elif self.style == "plain":
            k, v = cache.update(k, v, self.number)
        elif self.style == "twice":
            cache.update(k, v, self.number, kwargs=kwargs)
            k, v = cache.update(k, v, self.number, kwargs=kwargs)
        elif self.style == "shifted":
            k, v = cache.update(k + 1, v, self.number, kwargs=kwargs)
        else:
            k, v = cache.update(k, v, self.number, kwargs=kwargs)
        causal = hasattr(self, "config") and mask is None and x.shape[1] > 1
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.o(y.transpose(1, 2).flatten(2))


NAMED = {"query": "q", "key": "k", "value": "v", "head_dim": "size", "output": "o"}
ALL_ROWS = {**NAMED, "key": None, "value": None}
NORMS = {"query_norm": "n", "key_norm": "n"}
SHARED, STRETCH = SharedKeys(*"abcde"), Stretch(*"abcd")


def toy(style="kwargs", norm=None, configured=True, **names):
    """What stands against fusing a Toy."""
    attention = Attention(**NAMED, index="number", **names)
    adapter = Adapter(("x",), attention=attention, mask="mask", cache="cache")
    register(Toy, adapter, replace=True)
    model = dynquant.quantize_dynamic(randomized(nn.Sequential(Toy(style, norm, configured))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dynquant.fused_blocks(dynquant.fuse(model))["0"]


@pytest.mark.parametrize(
    ("style", "why"),
    [
        ("kwargs", ""),
        ("plain", "its cache is updated in another way"),
        ("twice", "its cache is updated in another way"),
        ("shifted", "differs"),
    ],
)
def test_how_a_cache_is_used(style, why):
    assert why in toy(style) if why else toy(style) == ""


def test_norms_of_heads():
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    names = {"query_norm": "q_norm", "key_norm": "k_norm"}
    assert toy(norm=nn.RMSNorm, **names) == ""
    assert "not an RMS norm of 12" in toy(norm=nn.LayerNorm, **names)
    assert "not an RMS norm of 12" in toy(**names)
    assert "not an RMS norm of 12" in toy(norm=lambda size: nn.RMSNorm(1), **names)
    assert toy(norm=Gemma3RMSNorm, **names) == ""
    kinds = iter([nn.RMSNorm, Gemma3RMSNorm])
    assert "two kinds" in toy(norm=lambda size: next(kinds)(size), **names)
    assert toy(configured=False) == ""
    assert "differs" in toy(norm=nn.RMSNorm)  # they are not named
    assert "scale" in toy(scale="scale")  # there is none


@pytest.mark.parametrize(
    ("attention", "options", "message"),
    [
        (NAMED, {"cache": "cache"}, "with index and output"),
        ({**NAMED, "index": "n", "output": None}, {"cache": "cache"}, "with index and output"),
        ({**NAMED, "kv_heads": "n"}, {}, "where key and value are named"),
        ({**NAMED, "index": "n"}, {"cache": "cache", "family": "torch_layer"}, "of transformers"),
        ({**NAMED, "index": "n"}, {}, "they go with a cache"),
        ({**NAMED, **NORMS, "index": "n", "shared": SHARED}, {}, "they go with a cache"),
        ({**NAMED, "rotates": "n"}, {}, "for the rotary embedding"),
        ({**NAMED, "index": "n", "rotates": "n"}, {"cache": "cache"}, "for the rotary embedding"),
        ({**NAMED, "interleaved": "first_half"}, {}, "for the rotary embedding"),
        ({**NAMED, "unturned": True}, {}, "for the rotary embedding"),
        ({**NAMED, "once": True}, {}, "for the rotary embedding"),
        ({**NAMED, "once": True, "interleaved": "first_half"}, {}, "name one of them"),
        ({**NAMED, "interleaved": "halves"}, {}, "allowed: None, first_half, each_twice"),
        ({**NAMED, "gated": True}, {"family": "torch_layer"}, "of transformers with output"),
        ({**NAMED, "head_gate": "n", "output": None}, {}, "of transformers with output"),
        ({**NAMED, "stretch": STRETCH}, {"family": "torch_layer"}, "of transformers with output"),
        ({**NAMED, "softcap": "n"}, {"family": "torch_layer"}, "of transformers with output"),
        ({**NAMED, "sinks": "n", "output": None}, {}, "of transformers with output"),
        ({**NAMED, "gated": True, "output": None}, {}, "names for key, value and output"),
        ({**NAMED, "gated": True, "head_gate": "n"}, {}, "name one of them"),
        ({**NAMED, "query_norm": "n"}, {}, "name both, or neither"),
        ({**NAMED, "result_norm": "n"}, {}, "it goes with norm_first=True"),
        ({**NAMED, **NORMS, "output": None}, {}, "of transformers with output"),
        ({**NAMED, "value_norm": "n"}, {}, "they go with query_norm and key_norm"),
        ({**NAMED, "shared": SHARED}, {}, "they go with query_norm and key_norm"),
        ({**ALL_ROWS, "value_is_key": "n"}, {}, "they go with a name for key"),
        ({**NAMED, **NORMS, "shared": SHARED, "gated": True}, {}, "it goes without gated"),
    ],
)
def test_wrong_adapters(attention, options, message):
    with pytest.raises(ValueError, match=message):
        Adapter(("x",), attention=Attention(**attention), **options)
