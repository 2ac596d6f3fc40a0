"""T5 and what runs its code: attentions whose bias of positions goes from layer to layer."""

import copy
import re

import pytest
import torch
from compare import assert_same
from fused import IDS, MASK, T5, decibels, fused, ops_of, randomized, seen_one_by_one, small

import dynquant
from dynquant.fused import Adapter, Attention

SIZES = {**T5, "num_layers": 3}
MODELS = [("T5", "relu"), ("T5", "gated-gelu"), ("MT5", "gated-gelu")]
WHOLE = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS, "use_cache": False}
TOKEN = {"decoder_start_token_id": 0, "max_new_tokens": 6, "min_new_tokens": 6}


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    name, activation = request.param
    return fused(small(name, SIZES, feed_forward_proj=activation))


def generating():
    """(quantized, fused) of a model that generates."""
    import transformers

    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES))
    return fused(model)


def output(model, **arguments):
    with torch.no_grad():
        return model(**WHOLE | arguments).last_hidden_state


def test_whole_sequences(made):
    quantized, model = made
    assert not any(dynquant.fused_blocks(model).values())
    found = output(model)
    assert decibels(found, output(quantized)) > 18
    assert_same(output(seen_one_by_one(copy.deepcopy(model))), found)
    assert ops_of(model, **WHOLE)["attention"] == 6  # self-attention of all layers


@pytest.mark.parametrize(("name", "activation"), MODELS)
def test_in_floats(name, activation):
    quantized, model = fused(small(name, SIZES, feed_forward_proj=activation), attention="float")
    assert decibels(output(model), output(quantized)) > 40


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generate(options):
    quantized, model = generating()
    states = model.encoder(input_ids=IDS, attention_mask=MASK)
    found, expected = (
        one.generate(encoder_outputs=copy.copy(states), attention_mask=MASK, **TOKEN, **options)
        for one in (model, quantized)
    )
    assert torch.equal(found, expected)


def test_rows_that_see_nothing():
    """With a bias, the model hides by the least number: such a row sees all alike."""
    quantized, model = fused(small("T5", SIZES), attention="float")
    nothing = MASK.clone()
    nothing[1] = 0
    for seen in ({"attention_mask": nothing}, {"decoder_attention_mask": MASK.flip(1)}):
        assert decibels(output(model, **seen), output(quantized, **seen)) > 30
    quantized, model = generating()
    with torch.no_grad():
        states = model.encoder(input_ids=IDS, attention_mask=MASK)
    found, expected = (
        one.generate(
            encoder_outputs=copy.copy(states),
            attention_mask=nothing,
            output_logits=True,
            return_dict_in_generate=True,
            **TOKEN,
        )
        for one in (model, quantized)
    )
    for pair in zip(found.logits, expected.logits, strict=True):
        assert decibels(*pair) > 30


class Plain:
    """A cache that has no more than an attention asks for."""

    def __init__(self, keys):
        self._kept = [keys, keys]

    def get_seq_length(self, index=0):
        return self._kept[0].shape[2]

    def update(self, *new, **kwargs):
        kept = zip(self._kept, new[:2], strict=True)
        self._kept = [torch.cat(pair, 2) for pair in kept]
        return self._kept


def test_a_cache_of_its_own_and_another_bias():
    quantized, model = fused(small("T5", SIZES))
    attentions = [one.decoder.block[0].layer[0].SelfAttention for one in (model, quantized)]
    x, keys = torch.randn(2, 1, 48), torch.randn(2, 4, 7, 12)
    with torch.no_grad():
        for bias in (None, torch.rand(1, 4, 1, 8) < 0.5, torch.randn(1, 1, 1, 8).double()):
            try:
                expected = attentions[1](x, position_bias=bias, cache=Plain(keys))
            except RuntimeError as error:
                with pytest.raises(RuntimeError, match=re.escape(str(error)[:30])):
                    attentions[0](x, position_bias=bias, cache=Plain(keys))
                continue
            found = attentions[0](x, position_bias=bias, cache=Plain(keys))
            assert decibels(found[0], expected[0]) > 40
            assert_same(found[1], expected[1])


def test_a_bias_to_the_second_sequence():
    """No model of transformers has it; the attention's code does."""
    import transformers
    from transformers.models.t5.modeling_t5 import T5Attention

    model = small("T5", SIZES)
    layer = model.decoder.block[0].layer[1]
    layer.EncDecAttention = T5Attention(model.decoder.config, True, layer_idx=0)
    states, results = torch.randn(2, 9, 48), []
    for one in fused(model):
        caches = transformers.DynamicCache(), transformers.DynamicCache()
        given = {
            "encoder_hidden_states": states,
            "cache": transformers.EncoderDecoderCache(*caches),
        }
        with torch.no_grad():
            for tokens in (IDS[:, :4], IDS[:, 4:5], IDS[:, 5:6]):
                results.append(one.decoder(input_ids=tokens, use_cache=True, **given)[0])
    for found, expected in zip(results[3:], results[:3], strict=True):
        assert decibels(found, expected) > 40


def test_a_bias_that_is_given():
    """It is returned as it is, and the one that is made is that of the model."""
    quantized, model = fused(small("T5", SIZES))
    attentions = [one.decoder.block[0].layer[0].SelfAttention for one in (model, quantized)]
    x, given = torch.randn(2, 5, 48), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        found, bias, weights = attentions[0](x, position_bias=given)
        assert bias is given and weights is None
        assert decibels(found, attentions[1](x, position_bias=given)[0]) > 25
        assert_same(attentions[0](x)[1], attentions[1](x)[1])


def test_the_eager_attention_is_left_alone():
    """Its weights are always returned."""
    quantized = dynquant.quantize_dynamic(
        randomized(small("T5", SIZES, attn_implementation="eager"))
    )
    with pytest.warns(UserWarning, match="SelfAttention: its attention is 'eager'"):
        model = dynquant.fuse(quantized)
    attentions = model(**WHOLE, output_attentions=True).encoder_attentions
    expected = quantized(**WHOLE, output_attentions=True).encoder_attentions
    assert all(decibels(*pair) > 60 for pair in zip(attentions, expected, strict=True))


@pytest.mark.parametrize("of_input", [False, True])
def test_gradients(of_input):
    """They are the unfused model's, those of the biases too."""
    gradients = []
    for model in fused(small("T5", SIZES)):
        embedded = model.shared(IDS).detach().requires_grad_(of_input)
        table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        model.requires_grad_(False)
        table.requires_grad_()
        model(inputs_embeds=embedded, decoder_input_ids=IDS).last_hidden_state.sum().backward()
        gradients.append((table.grad, embedded.grad if of_input else table.grad))
    for found, expected in zip(*gradients, strict=True):
        assert decibels(found, expected) > 60


def test_wrong_adapters():
    with pytest.raises(ValueError, match="result is 'bias'"):
        Adapter(arguments=("x",), attention=Attention("q", "k", "v", "size"), result="bias")
