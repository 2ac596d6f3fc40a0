"""Norms of values, and layers that take keys and values from one before them: Gemma 3n and 4."""

import copy
import pickle

import pytest
import torch
from compare import assert_same
from fused import Counting, Wrapped, assert_alike, decibels, fused, hidden, randomized, small
from test_fused_token import CONFIG, NEXT, PROMPT, after_prompt, assert_close

import dynquant

pytest.importorskip("transformers", reason="transformers is not installed")

TYPES = ["sliding_attention", "full_attention"]
# Of six layers the last two have no keys of their own. Full attention has longer heads.
SHARING = {
    **{**CONFIG, "num_hidden_layers": 6, "layer_types": 3 * TYPES, "sliding_window": 8},
    **{"num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16},
    **{"vocab_size_per_layer_input": 99, "global_head_dim": 16},
}
# In the second, the keys of full attention are its values as well, before their norms.
MODELS = {
    "Gemma4Text": SHARING,
    "Gemma4Text of keys": {
        **SHARING,
        **{"attention_k_eq_v": True, "num_kv_shared_layers": 0, "num_global_key_value_heads": 1},
    },
    "Gemma4UnifiedText": SHARING,
    "Gemma3nText": {
        **SHARING,
        **{"laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": None},
    },
}
TWO_TYPES = {**SHARING, "embedding_dim": 32}


def made_of(name, **options):
    return fused(small(name.split()[0], MODELS[name], **options))


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    return made_of(request.param)


@pytest.fixture(scope="module")
def gemma4():
    return made_of("Gemma4Text")


def runs_as_ops(found, model):
    """Whether all attentions do: those that have keys of their own, and the others."""
    own = sum(not layer.self_attn.is_kv_shared_layer for layer in model.layers)
    return found["query_key_value"] == own and found["attend"] == len(model.layers)


@pytest.mark.parametrize("tokens", [NEXT, PROMPT[:, :3], PROMPT.repeat(1, 3)])
def test_tokens_run_as_ops(made, tokens):
    quantized, model = made
    blocks = dynquant.fused_blocks(model)
    assert blocks and not any(blocks.values())
    assert runs_as_ops(after_prompt(model, tokens)[2], model)
    assert_close(model, quantized, 90 if tokens is NEXT else 35, tokens=tokens)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompt(made, use_cache):
    quantized, model = made
    ids = PROMPT.repeat(1, 3)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for given in ({}, {"attention_mask": mask}):
        given = {"input_ids": ids, "use_cache": use_cache, **given}
        with torch.no_grad(), Counting() as counting:
            found = model(**given)[0]
        assert runs_as_ops(counting.found, model)
        with torch.no_grad():
            expected = quantized(**given)[0]
        seen = given.get("attention_mask", torch.ones_like(ids)).bool()
        assert decibels(found[seen], expected[seen]) > 35


def test_several_tokens_are_those_that_come_one_by_one(made):
    _, model = made
    given = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(3))
    found = after_prompt(model, given)[0][0]
    with torch.no_grad():
        cache = model(input_ids=PROMPT, use_cache=True).cache
        each = [model(input_ids=token, cache=cache)[0] for token in given.split(1, 1)]
    assert decibels(found, torch.cat(each, 1)) > 90


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_the_eager_attention(attention, dtype):
    model = randomized(small("Gemma4Text", SHARING, attn_implementation=attention)).to(dtype)
    quantized = dynquant.quantize_dynamic(model)
    model = dynquant.fuse(quantized)
    assert runs_as_ops(after_prompt(model)[2], model)
    assert_close(model, quantized, 90 if dtype == torch.float32 else 20)


def test_a_static_cache(gemma4):
    from transformers import StaticCache

    quantized, model = gemma4
    caches = [StaticCache(config=model.config, max_cache_len=12) for _ in gemma4]
    results = [
        after_prompt(one, cache=cache)
        for one, cache in zip((model, quantized), caches, strict=True)
    ]
    assert runs_as_ops(results[0][2], model)
    assert decibels(results[0][0][0], results[1][0][0]) > 90


def test_keys_that_are_handed_on(gemma4):
    """An assistant reads them: they are those of all tokens, whatever the cache still has."""
    quantized, model = gemma4
    ids = PROMPT.repeat(1, 3)
    with torch.no_grad():
        found, expected = (
            one(input_ids=ids, return_shared_kv_states=True).shared_kv_states
            for one in (model, quantized)
        )
    assert set(found) == set(expected) == set(TYPES)
    for kind in TYPES:
        for one, other in zip(found[kind], expected[kind], strict=True):
            assert one.shape == other.shape and decibels(one, other) > 45


def test_the_last_token_of_a_prompt_alone(gemma4):
    """Layers without keys of their own compute the rows that are kept, as generate asks for."""
    import transformers

    model = transformers.Gemma4ForCausalLM(transformers.Gemma4TextConfig(**SHARING))
    quantized, model = fused(model)
    ids = PROMPT.repeat(1, 3)
    for keep in (1, 3, 0):
        with torch.no_grad(), Counting() as counting:
            found = model(input_ids=ids, logits_to_keep=keep).logits
        assert counting.found["attend"] == 6
        with torch.no_grad():
            assert decibels(found, quantized(input_ids=ids, logits_to_keep=keep).logits) > 30
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(PROMPT)
    mask[0, :2] = 0
    found = model.generate(PROMPT, attention_mask=mask, **options)
    assert_same(found, quantized.generate(PROMPT, attention_mask=mask, **options))


@pytest.mark.parametrize("names", [["v_norm"], ["q_norm", "k_norm"], ["q_norm"]])
def test_a_change_of_a_norm_is_noticed(names):
    """In a layer with keys of its own, and for the query in one without."""
    quantized, model = made_of("Gemma4Text")
    before = after_prompt(model)[0][0]
    for layer in (0, 5) if names == ["q_norm"] else (0,):
        for one in (model, quantized):
            for name in names:
                getattr(one.layers[layer].self_attn, name).eps = 0.5
        found, _, ops = after_prompt(model)
        assert runs_as_ops(ops, model) and decibels(found[0], before) < 60
        assert_close(model, quantized, least=30)
        before = found[0]
        attention = model.layers[layer].self_attn
        handle = getattr(attention, names[0]).register_forward_hook(lambda *a: a[2].flip(-1))
        assert decibels(after_prompt(model)[0][0], before) < 60
        handle.remove()
        assert_same(after_prompt(model)[0][0], before)


def test_called_by_the_linear_layers(made):
    """As with an adapter on one of them: to the bits of the op."""
    _, model = made
    model = copy.deepcopy(model)
    expected, cache, _ = after_prompt(model, PROMPT)
    for layer in model.layers:
        layer.self_attn.q_proj = Wrapped(layer.self_attn.q_proj)
    found, other, ops = after_prompt(model, PROMPT)
    assert ops["scaled_dot_product"] == len(model.layers) and not ops["query_key_value"]
    assert_same(found[0], expected[0])
    assert_alike(cache, other, 200)


def test_a_key_that_is_the_value_too_is_computed_once():
    quantized, model = made_of("Gemma4Text of keys")
    counts = []
    for one in (quantized, model):
        attention = one.layers[1].self_attn
        assert attention.v_proj is None
        seen = []
        attention.k_proj.register_forward_hook(
            lambda *given, seen=seen: seen.append(given) and None
        )
        with torch.no_grad():
            one(input_ids=PROMPT)
        counts.append(len(seen))
    assert counts == [1, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies(made, copied):
    _, model = made
    found, _, ops = after_prompt(copied(model))
    assert runs_as_ops(ops, model)
    assert_same(found[0], after_prompt(model)[0][0])


def test_keys_that_are_not_there_or_do_not_fit(gemma4):
    """The layer's own forward runs, and says what it says."""
    quantized, model = gemma4
    attention, twin = (one.layers[5].self_attn for one in (model, quantized))
    assert attention.is_kv_shared_layer
    angles = torch.randn(1, 3, 16)
    given = {
        "hidden_states": torch.randn(2, 3, 48),
        "position_embeddings": (angles.cos(), angles.sin()),
        "attention_mask": None,
    }
    with torch.no_grad():
        for states in (None, {}, {"sliding_attention": ()}):
            errors = []
            for one in (attention, twin):
                with pytest.raises((TypeError, KeyError)) as raised:
                    one(**given, shared_kv_states=states)
                errors.append((type(raised.value), str(raised.value)))
            assert errors[0] == errors[1]
        # Of one sequence, which is spread over both.
        pair = torch.randn(1, 2, 7, 16), torch.randn(1, 2, 7, 16)
        given["shared_kv_states"] = {"full_attention": pair}
        assert decibels(attention(**given)[0], twin(**given)[0]) > 45


def test_gradients(gemma4):
    quantized, model = gemma4
    embeddings = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    inputs = torch.randn(2, 5, 6, 16, generator=torch.Generator().manual_seed(2))
    results = []
    for one in (model, quantized):
        x = embeddings.clone().requires_grad_()
        output = one(inputs_embeds=x, per_layer_inputs=inputs)[0]
        results.append(torch.autograd.grad(output.square().sum(), x)[0])
    assert decibels(*results) > 60


@pytest.fixture(scope="module")
def texts():
    """EmbeddingGemma 2: norms of values, and no cache."""
    return fused(small("EmbeddingGemma2Text", TWO_TYPES))


def test_texts_run_as_ops(texts):
    quantized, model = texts
    blocks = dynquant.fused_blocks(model)
    assert len(blocks) == 12 and not any(blocks.values())
    with Counting() as counting:
        found = hidden(model)
    assert counting.found["query_key_value"] == counting.found["attend"] == 6
    assert decibels(found, hidden(quantized)) > 45


def test_a_text_without_a_mask(texts):
    quantized, model = texts
    with torch.no_grad(), Counting() as counting:
        found = model(input_ids=PROMPT)[0]
    assert counting.found["attend"] == 6
    with torch.no_grad():
        assert decibels(found, quantized(input_ids=PROMPT)[0]) > 45
        changed = PROMPT.clone()
        changed[:, -1] += 1
        assert (model(input_ids=changed)[0][:, 0] - found[:, 0]).abs().max() > 0


def test_padding_of_texts_and_batch_change_no_bit(texts):
    _, model = texts
    mask = torch.ones_like(PROMPT)
    mask[1, 4:] = 0
    with torch.no_grad():
        together = model(input_ids=PROMPT, attention_mask=mask)[0]
        alone = model(input_ids=PROMPT[1:, :4])[0]
    assert_same(together[1, :4], alone[0])
