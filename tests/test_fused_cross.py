"""Tokens of a decoder that also attends to a second sequence, whose keys a cache has."""

import copy
import pickle
from collections import Counter
from functools import partial

import pytest
import torch
from compare import assert_same
from fused import (
    MOONSHINE,
    SEQUENCES,
    T5,
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
from dynquant.fused import Adapter, Attention, FeedForward

SIZES = {**SEQUENCES, "encoder_layers": 1}
# Norms in front (Whisper, mBART, M2M100) and behind (BART, Marian); key without bias in Whisper.
MODELS = {
    "Whisper": {**SIZES, "max_source_positions": 20, "num_mel_bins": 8, "max_target_positions": 40},
    **dict.fromkeys(("Bart", "MBart", "Marian", "M2M100"), SIZES),
    "T5": T5,
    "Moonshine": MOONSHINE,
}
# Both layers, each with two attentions.
OPS = {"query_key_value": 2, "attend": 4, "feed_forward": 2}
PROMPT = torch.randint(3, 99, (2, 4), generator=torch.Generator().manual_seed(1))
NEXT = torch.randint(3, 99, (2, 1), generator=torch.Generator().manual_seed(2))
STATES = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(3))


# What some call the parts of a layer.
T5_NAMES = {
    "encoder_attn_layer_norm": "layer.1.layer_norm",
    "self_attn.k_proj": "layer.0.SelfAttention.k",
    "encoder_attn.q_proj": "layer.1.EncDecAttention.q",
    "fc1": "layer.2.DenseReluDense.wi",
}
MOONSHINE_NAMES = {"encoder_attn_layer_norm": "post_attention_layernorm", "fc1": "mlp.fc1"}


def part_of(model, layer, name):
    """A part of a layer of the decoder."""
    if hasattr(model.decoder, "block"):
        return model.decoder.block[layer].get_submodule(T5_NAMES[name])
    is_moonshine = type(model).__name__.startswith("Moonshine")
    names = MOONSHINE_NAMES if is_moonshine else {}
    return model.decoder.layers[layer].get_submodule(names.get(name, name))


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    return fused(small(request.param, MODELS[request.param]))


@pytest.fixture(scope="module")
def bart():
    return fused(small("Bart", SIZES))


def new_cache():
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


@torch.no_grad()
def after_prompt(model, tokens=NEXT, prompt=PROMPT, **arguments):
    """The output for tokens behind `prompt`, the cache, and which ops ran for these tokens."""
    cache, given = new_cache(), {"encoder_hidden_states": STATES, "use_cache": True}
    if "encoder_attention_mask" in arguments:
        given["encoder_attention_mask"] = arguments.pop("encoder_attention_mask")
    if prompt is not None:
        model.decoder(input_ids=prompt, cache=cache, **given)
    with Counting() as counting:
        output = model.decoder(input_ids=tokens, cache=cache, **given, **arguments)
    return output, cache, counting.found


def runs_as_ops(found):
    """Whether the attentions and feed-forward blocks of all layers do."""
    return Counter({**found, **OPS}) == Counter(found) and not found["linear_dynamic"]


def assert_close(model, quantized, least=90, **arguments):
    """Both give the same for one token, and their caches hold the same then."""
    (found, cache, _), (expected, other, _) = (
        after_prompt(one, **arguments) for one in (model, quantized)
    )
    assert decibels(found[0], expected[0]) > least
    assert cache.is_updated == other.is_updated
    for name in ("self_attention_cache", "cross_attention_cache"):
        assert_alike(getattr(cache, name), getattr(other, name), least)


def test_a_token_runs_as_ops(made):
    quantized, model = made
    assert not any(dynquant.fused_blocks(model).values())
    _, cache, ops = after_prompt(model)
    assert runs_as_ops(ops) and cache.get_seq_length() == 5
    assert_close(model, quantized)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_prompt(made, tokens):
    """Its keys and values of the second sequence are made first: that attention is no op."""
    quantized, model = made
    given = {"tokens": PROMPT[:, :tokens], "prompt": None}
    found, _, ops = after_prompt(model, **given)
    is_op = tokens == 1 or not hasattr(model.decoder, "block")  # T5's own has a bias
    assert ops["feed_forward"] == 2 and ops["query_key_value"] == (2 if is_op else 0)
    assert decibels(found[0], after_prompt(quantized, **given)[0][0]) > 90


def test_several_tokens_behind_a_cache(made):
    """As ops, but for T5's own attention with its bias of positions."""
    quantized, model = made
    _, _, ops = after_prompt(model, PROMPT[:, :3])
    assert runs_as_ops(ops) != hasattr(model.decoder, "block")
    assert_close(model, quantized, tokens=PROMPT[:, :3])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding(implementation):
    quantized, model = fused(small("Bart", SIZES, attn_implementation=implementation))
    own, second = torch.ones(2, 5, dtype=torch.long), torch.ones(2, 9, dtype=torch.long)
    own[1, :2] = 0
    second[0, 4:] = 0
    second[1] = 0  # nothing to attend to
    given = {"attention_mask": own, "encoder_attention_mask": second}
    assert runs_as_ops(after_prompt(model, **given)[2])
    assert_close(model, quantized, **given)


def test_probabilities_that_are_asked_for():
    """They are the eager attention's own, and the token is in the cache once."""
    quantized, model = fused(small("Whisper", MODELS["Whisper"], attn_implementation="eager"))
    before = after_prompt(model)[0][0]
    found, cache, _ = after_prompt(model, output_attentions=True)
    expected = after_prompt(quantized, output_attentions=True)[0]
    assert cache.get_seq_length() == 5
    assert_same(found[0], before)
    for name, keys in (("attentions", 5), ("cross_attentions", 9)):
        assert getattr(found, name)[1].shape == (2, 4, 1, keys)
        assert decibels(getattr(found, name)[1], getattr(expected, name)[1]) > 90


def test_an_attention_whose_layer_is_hooked(made):
    """A hook on a norm is called; the attentions beside it still run as ops."""
    _, model = made
    expected = after_prompt(model)[0][0]
    model, seen = copy.deepcopy(model), []
    norm = part_of(model, 0, "encoder_attn_layer_norm")
    norm.register_forward_hook(lambda *given: seen.append(1))
    found, _, ops = after_prompt(model)
    assert len(seen) == 2 and ops["query_key_value"] == 2
    assert_same(found[0], expected)


@pytest.mark.parametrize("name", ["self_attn.k_proj", "encoder_attn.q_proj", "fc1"])
def test_a_hook_is_called_and_changes_no_bit(made, name):
    _, model = made
    expected = after_prompt(model)[0][0]
    model, seen = copy.deepcopy(model), []
    part = part_of(model, 1, name)
    handle = part.register_forward_hook(lambda *given: seen.append(1))
    found = after_prompt(model)[0]
    assert len(seen) == 2
    assert_same(found[0], expected)
    handle.remove()
    assert runs_as_ops(after_prompt(model)[2])


def test_hooks_everywhere_change_no_bit(made):
    _, model = made
    expected = after_prompt(model)[0][0]
    found, _, ops = after_prompt(seen_one_by_one(copy.deepcopy(model)))
    assert ops["query_key_value"] == 0
    assert_same(found[0], expected)


def test_a_cache_gets_its_gradient(bart):
    gradients = []
    for model in bart:
        model = copy.deepcopy(model).requires_grad_(False)
        _, cache, _ = after_prompt(model)
        run = partial(model.decoder, NEXT, encoder_hidden_states=STATES, cache=cache)
        gradients.append(gradients_of_kept(cache.cross_attention_cache.layers[0], run))
    for found, expected in zip(*gradients, strict=True):
        assert decibels(found, expected) > 90


@pytest.mark.parametrize("name", ["scaling", "layer_idx"])
@pytest.mark.parametrize("kind", ["self_attn", "encoder_attn"])
def test_another_number_is_noticed(bart, name, kind):
    quantized, model = (copy.deepcopy(one) for one in bart)
    after_prompt(model)
    for one in (model, quantized):
        first, second = (getattr(layer, kind) for layer in one.decoder.layers)
        if name == "scaling":
            first.scaling = 0.1
        else:
            first.layer_idx, second.layer_idx = 1, 0
    assert runs_as_ops(after_prompt(model)[2])
    assert_close(model, quantized)


@pytest.mark.parametrize("name", ["Whisper", "Bart"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_generate(name, options):
    import transformers

    kind = getattr(transformers, f"{name}ForConditionalGeneration")
    quantized, model = fused(kind(getattr(transformers, f"{name}Config")(**MODELS[name])))
    options |= {"max_new_tokens": 8, "do_sample": False}
    given = {"input_ids": PROMPT, "attention_mask": torch.ones_like(PROMPT)}
    given["attention_mask"][0, 2:] = 0
    if name == "Whisper":
        features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(1))
        given = {"input_features": features}
    found, expected = (one.generate(**given, **options) for one in (model, quantized))
    assert_same(found, expected)


def test_a_decoder_alone():
    """Without a second sequence, and with a cache of its own."""
    import transformers

    config = transformers.BartConfig(**SIZES, is_decoder=True, is_encoder_decoder=False)
    quantized, model = fused(transformers.BartForCausalLM(config))
    outputs = []
    for one in (model, quantized):
        with torch.no_grad():
            cache = transformers.DynamicCache()
            one(input_ids=PROMPT, cache=cache, use_cache=True)
            with Counting() as counting:
                outputs.append(one(input_ids=NEXT, cache=cache, use_cache=True)[0])
        if one is model:
            assert counting.found["query_key_value"] == counting.found["attend"] == 2
    assert decibels(*outputs) > 90


def test_16_bits():
    quantized = dynquant.quantize_dynamic(randomized(small("Bart", SIZES)).bfloat16())
    model = dynquant.fuse(quantized)
    results = []
    for one in (model, quantized):
        cache, given = new_cache(), {"encoder_hidden_states": STATES.bfloat16()}
        with torch.no_grad():
            one.decoder(input_ids=PROMPT, cache=cache, **given)
            with Counting() as counting:
                results.append(one.decoder(input_ids=NEXT, cache=cache, **given)[0])
        assert one is quantized or runs_as_ops(counting.found)
    assert results[0].dtype == torch.bfloat16 and decibels(*results) > 20


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies(made, copied):
    _, model = made
    found, _, ops = after_prompt(copied(model))
    assert runs_as_ops(ops)
    assert_same(found[0], after_prompt(model)[0][0])


def test_a_single_second_sequence_for_a_batch(bart):
    """The model's own attention spreads it."""
    outputs = []
    for one in bart:
        cache, given = new_cache(), {"encoder_hidden_states": STATES[:1]}
        with torch.no_grad():
            one.decoder(input_ids=PROMPT, cache=cache, **given)
            outputs.append(one.decoder(input_ids=NEXT, cache=cache, **given)[0])
    assert decibels(*outputs) > 90


def test_the_feed_forward_block_beside_another_attention():
    """Where an attention is not known, or not quantized, the rest runs as ops nevertheless."""
    quantized = dynquant.quantize_dynamic(randomized(small("Bart", SIZES)), {nn.Linear})
    for layer in quantized.decoder.layers:
        layer.encoder_attn.q_proj = nn.Linear(48, 48)
    with pytest.warns(UserWarning, match="encoder_attn: q_proj is of type Linear"):
        model = dynquant.fuse(quantized)
    found, _, ops = after_prompt(model)
    assert ops["feed_forward"] == ops["query_key_value"] == 2
    assert decibels(found[0], after_prompt(quantized)[0][0]) > 90


def test_an_attention_of_another_class_in_a_known_layer():
    from transformers.models.bart.modeling_bart import BartAttention

    class Half(BartAttention):
        """Gives half of it."""

        def forward(self, *args, **kwargs):
            result = super().forward(*args, **kwargs)
            return result[0] * 0.5, result[1]

    model = randomized(small("Bart", SIZES))
    for layer in model.decoder.layers:
        layer.self_attn.__class__ = Half
    quantized = dynquant.quantize_dynamic(model)
    model = dynquant.fuse(quantized)
    found, _, ops = after_prompt(model)
    assert ops["query_key_value"] == 0 and ops["feed_forward"] == 2
    assert decibels(found[0], after_prompt(quantized)[0][0]) > 90


def test_a_decoder_without_a_second_sequence():
    """XGLM's has the code of Whisper's, and no second attention by default."""
    import transformers

    config = {"d_model": 48, "ffn_dim": 80, "num_layers": 2, "attention_heads": 4, "vocab_size": 99}
    config = transformers.XGLMConfig(**config, max_position_embeddings=40)
    quantized, model = fused(transformers.XGLMModel(config))
    with torch.no_grad(), Counting() as counting:
        found = model(input_ids=PROMPT)[0]
    assert counting.found["feed_forward"] == 2
    with torch.no_grad():
        assert decibels(found, quantized(input_ids=PROMPT)[0]) > 25


NAMES = {"query": "q", "key": "k", "value": "v", "head_dim": "size", "output": "o"}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache": "c", "feed_forward": FeedForward("up", "down", "act")},
    ],
)
def test_wrong_adapters(options):
    names = {**NAMES, "index": "number"} if options else NAMES
    with pytest.raises(ValueError, match="cross: it goes with a cache"):
        Adapter(("x",), attention=Attention(**names), cross="y", **options)
