"""Prompts and whole texts of decoders: many tokens at once, with a cache or without one."""

import copy

import pytest
import torch
from compare import assert_same
from fused import Counting, assert_alike, decibels, fused, seen_one_by_one, small
from test_fused_token import CONFIG, GEMMA3, MODELS, runs_as_ops

import dynquant

LONG = 60  # rows enough for each of the ways in which a core multiplies floats
SIZES = {"max_position_embeddings": 80, "n_positions": 80}
LENGTHS = (LONG, 23, 7)
IDS = torch.randint(3, 99, (len(LENGTHS), LONG), generator=torch.Generator().manual_seed(1))
RIGHT = (torch.arange(LONG) < torch.tensor(LENGTHS)[:, None]).long()


def made_of(name, **options):
    config = {**MODELS[name], **{k: v for k, v in SIZES.items() if k in MODELS[name]}}
    return fused(small(name, config, **options))


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    return made_of(request.param)


@pytest.fixture(scope="module")
def llama():
    return made_of("Llama")


@torch.no_grad()
def outputs(model, ids=IDS, use_cache=True, **arguments):
    """The output, the cache and which ops ran."""
    with Counting() as counting:
        found = model(input_ids=ids, use_cache=use_cache, **arguments)
    return found[0], found.get("cache"), counting.found


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompt_runs_as_ops(made, use_cache):
    quantized, model = made
    found, cache, ops = outputs(model, use_cache=use_cache)
    assert runs_as_ops(ops)
    expected, other, _ = outputs(quantized, use_cache=use_cache)
    # Among so many bytes, one or another rounds otherwise.
    assert decibels(found, expected) > 45
    if use_cache:
        assert_alike(cache, other, 45)
    assert_same(found, outputs(model, use_cache=not use_cache)[0])


def test_tokens_behind_it_and_alone_have_the_same_bits(made):
    """No sum depends on the others of a prompt."""
    _, model = made
    together = outputs(model, IDS[:1])[0]
    before, cache, _ = outputs(model, IDS[:1, :50])
    behind = outputs(model, IDS[:1, 50:], cache=cache)[0]
    assert_same(torch.cat([before, behind], 1), together)


@pytest.mark.parametrize("use_cache", [True, False])
def test_padding_and_batch_change_no_bit(made, use_cache):
    _, model = made
    together = outputs(model, attention_mask=RIGHT, use_cache=use_cache)
    assert runs_as_ops(together[2])
    for row, length in enumerate(LENGTHS):
        alone = outputs(model, IDS[row : row + 1, :length])[0]
        assert_same(together[0][row, :length], alone[0])


def test_padding_before_texts(made):
    quantized, model = made
    left = RIGHT.flip(1)
    found, cache, ops = outputs(model, attention_mask=left)
    assert runs_as_ops(ops)
    expected, other, _ = outputs(quantized, attention_mask=left)
    assert decibels(found[left.bool()], expected[left.bool()]) > 45
    for row, length in enumerate(LENGTHS):
        layers = zip(cache.layers, other.layers, strict=True)
        for one, twin in layers:
            seen = slice(-min(length, one.keys.shape[2]), None)
            assert decibels(one.keys[row, :, seen], twin.keys[row, :, seen]) > 45


def test_hooks_change_no_bit(made):
    _, model = made
    hooked = seen_one_by_one(copy.deepcopy(model))
    for given in ({}, {"attention_mask": RIGHT}, {"use_cache": False}):
        found, _, ops = outputs(hooked, **given)
        assert ops["query_key_value"] == 0
        assert_same(found, outputs(model, **given)[0])


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_eager_attention(use_cache):
    quantized, model = made_of("Qwen3", attn_implementation="eager")
    found, _, ops = outputs(model, use_cache=use_cache, attention_mask=RIGHT)
    assert runs_as_ops(ops)
    expected = outputs(quantized, use_cache=use_cache, attention_mask=RIGHT)[0]
    assert decibels(found[RIGHT.bool()], expected[RIGHT.bool()]) > 45


def test_an_attention_to_later_tokens_too():
    options = {"use_bidirectional_attention": True, "sliding_window": 16}
    quantized, model = fused(small("Gemma3Text", GEMMA3 | SIZES, **options))
    found, _, ops = outputs(model)
    assert runs_as_ops(ops)
    assert decibels(found, outputs(quantized)[0]) > 45
    changed = IDS.clone()
    changed[:, 12] += 1
    assert (outputs(model, changed)[0][:, 8] - found[:, 8]).abs().max() > 0
    padded = outputs(model, attention_mask=RIGHT)[0]
    assert decibels(padded[0], found[0]) > 100


def test_a_window():
    quantized, model = fused(small("Mistral", CONFIG | SIZES, sliding_window=9))
    found, _, ops = outputs(model)
    assert runs_as_ops(ops) and decibels(found, outputs(quantized)[0]) > 45


def test_a_static_cache(llama):
    from transformers import StaticCache

    _, model = llama
    for given in ({}, {"attention_mask": RIGHT}):
        cache = StaticCache(config=model.config, max_cache_len=70)
        found, _, ops = outputs(model, cache=cache, **given)
        assert runs_as_ops(ops)
        assert_same(found, outputs(model, **given)[0])


def test_what_a_static_cache_has_not_taken_in_is_not_read(llama):
    from transformers import StaticCache

    _, model = llama
    cache = StaticCache(config=model.config, max_cache_len=70)
    outputs(model, cache=cache)
    for layer in cache.layers:
        layer.keys.fill_(torch.nan), layer.values.fill_(torch.nan)
        layer.cumulative_length.zero_()
    assert_same(outputs(model, cache=cache)[0], outputs(model)[0])


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(name, dtype):
    quantized, model = made_of(name)
    quantized, model = (copy.deepcopy(one).to(dtype) for one in (quantized, model))
    found, _, ops = outputs(model)
    assert runs_as_ops(ops) and found.dtype == dtype
    assert decibels(found, outputs(quantized)[0]) > 25
    assert_same(outputs(seen_one_by_one(copy.deepcopy(model)))[0], found)


def test_a_prompt_that_wants_a_gradient_is_computed_as_before(llama):
    quantized, model = llama
    with Counting() as counting:
        found = model(input_ids=IDS)[0]
    assert counting.found["query_key_value"] == 0
    assert decibels(found, quantized(input_ids=IDS)[0]) > 45


def test_threads(llama):
    _, model = llama
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(outputs(model, attention_mask=RIGHT)[0])
    finally:
        torch.set_num_threads(before)
    assert_same(*results)


def test_generate(llama):
    quantized, model = llama
    given = {"attention_mask": RIGHT.flip(1), "max_new_tokens": 5, "do_sample": False}
    causal = [small_causal(one) for one in (quantized, model)]
    found, expected = (one.generate(IDS, **given) for one in reversed(causal))
    assert torch.equal(found, expected)


def small_causal(model):
    """A language model of these layers, whose head is the same for all."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    whole = LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    whole.model = model
    return whole


def test_a_compiled_prompt(llama):
    _, model = llama
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    expected = outputs(model, use_cache=False)[0]
    assert_same(outputs(compiled, use_cache=False)[0], expected)
    assert dynquant.fused_blocks(model)
