"""nn.TransformerEncoder and nn.MultiheadAttention: every form of their masks and layouts."""

import copy
import itertools
import warnings

import pytest
import torch
from compare import assert_same
from fused import decibels, fused, seen_one_by_one
from torch import nn
from torch.nn import functional as F

import dynquant

LENGTH = 7
PADDING = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [4]])
PAIRS = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def layer(**options):
    return nn.TransformerEncoderLayer(24, 4, 40, **{"batch_first": True, **options})


def inputs(module, batched=True):
    """For a module with the attribute batch_first."""
    x = torch.randn(2, LENGTH, 24, generator=torch.Generator().manual_seed(1))
    if not batched:
        return x[0]
    return x if module.batch_first else x.transpose(0, 1)


def added(mask):
    return torch.zeros(mask.shape).masked_fill(mask, -torch.inf)


MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": PADDING},
    "padding added": {"src_key_padding_mask": added(PADDING)},
    "a text of padding": {"src_key_padding_mask": PADDING | torch.tensor([[False], [True]])},
    "pairs": {"src_mask": PAIRS},
    "a row of no pairs": {"src_mask": PAIRS | (torch.arange(LENGTH) == 2)[:, None]},
    "pairs added": {"src_mask": added(PAIRS)},
    "causal": {"src_mask": added(PAIRS), "is_causal": True},
    "pairs of each head": {"src_mask": PAIRS.expand(8, -1, -1)},
    "both": {"src_mask": PAIRS, "src_key_padding_mask": PADDING},
    "both added": {"src_mask": added(PAIRS), "src_key_padding_mask": added(PADDING)},
}
FORMS = {
    "batch_first": {},
    "batch second": {"batch_first": False},
    "norm_first": {"norm_first": True},
    "gelu": {"activation": F.gelu},
    "a module": {"activation": nn.GELU("tanh")},
    "no bias": {"bias": False},
}


@pytest.fixture(scope="module", params=FORMS)
def pair(request):
    return fused(layer(**FORMS[request.param]))


def run(model, **masks):
    with torch.no_grad():
        return model(inputs(model.self_attn), **masks)


class TestLayer:
    @pytest.mark.parametrize("masks", MASKS)
    def test_masks(self, pair, masks):
        quantized, model = pair
        assert dynquant.fused_blocks(model) == {"": ""}
        result = run(model, **MASKS[masks])
        assert decibels(result, run(quantized, **MASKS[masks])) > 25
        assert_same(run(seen_one_by_one(copy.deepcopy(model)), **MASKS[masks]), result)

    def test_unbatched(self, pair):
        quantized, model = pair
        x = inputs(model.self_attn, batched=False)
        with torch.no_grad():
            result = model(x, src_key_padding_mask=PADDING[1])
            assert decibels(result, quantized(x, src_key_padding_mask=PADDING[1])) > 25
            batch = model(x[None] if model.self_attn.batch_first else x[:, None])
            assert_same(model(x), batch.reshape(x.shape))

    def test_nested(self, pair):
        quantized, model = pair
        if not model.self_attn.batch_first or model.norm1.bias is None:
            pytest.skip("nested tensors are batch_first, and torch's norms of them have a bias")
        rows = [torch.randn(n, 24, generator=torch.Generator().manual_seed(n)) for n in (5, 3)]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls nested tensors a prototype
            found, expected = (one(torch.nested.nested_tensor(rows)) for one in (model, quantized))
        for one, other in zip(found.unbind(), expected.unbind(), strict=True):
            assert decibels(one, other) > 25

    def test_wrong_masks_are_errors_as_before(self, pair):
        quantized, model = pair
        wrong = {"src_mask": PAIRS[:3]}, {"src_key_padding_mask": PADDING[:, :3]}
        for one, masks in itertools.product((quantized, model), wrong):
            with pytest.raises((RuntimeError, ValueError, AssertionError)):
                run(one, **masks)

    def test_the_activation_stays_what_it_is(self):
        quantized, model = fused(layer(activation=F.gelu))
        copied = copy.deepcopy(model)
        run(copied)
        assert copied.__dict__["activation"] is F.gelu
        copied.activation = F.relu
        quantized.activation = F.relu
        expected = dynquant.fuse(quantized)
        assert_same(run(copied), run(expected))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", ["none", "padding", "pairs", "both"])
def test_encoder(norm_first, masks):
    encoder = nn.TransformerEncoder(layer(norm_first=norm_first), 2, enable_nested_tensor=False)
    quantized, model = fused(encoder)
    assert dynquant.fused_blocks(model) == {"layers.0": "", "layers.1": ""}
    names = {"src_mask": "mask"}
    given = {names.get(name, name): mask for name, mask in MASKS[masks].items()}
    x = inputs(model.layers[0].self_attn)
    kept = ~PADDING if "src_key_padding_mask" in given else torch.ones_like(PADDING)
    with torch.no_grad():
        found, expected = model(x, **given), quantized(x, **given)
        assert decibels(found[kept], expected[kept]) > 25
        assert_same(seen_one_by_one(model)(x, **given), found)


def test_nested_by_the_encoder():
    """A float first layer makes nn.TransformerEncoder pass nested tensors on."""
    encoder = nn.TransformerEncoder(layer(), 2).eval()
    quantized = dynquant.quantize_dynamic(encoder, {"layers.1"})
    with pytest.warns(UserWarning, match=r"layers\.0: self_attn.q_proj is missing"):
        model = dynquant.fuse(quantized)
    assert dynquant.fused_blocks(model)["layers.1"] == ""
    x = inputs(model.layers[0].self_attn)
    with torch.no_grad():
        found, expected = (one(x, src_key_padding_mask=PADDING) for one in (model, quantized))
    assert decibels(found, expected) > 25


class TestAttention:
    @pytest.mark.parametrize("batch_first", [True, False])
    def test_alone(self, batch_first):
        quantized, model = fused(nn.MultiheadAttention(24, 3, batch_first=batch_first))
        assert dynquant.fused_blocks(model) == {"": ""}
        x = inputs(model)
        with torch.no_grad():
            given = {"key_padding_mask": PADDING, "attn_mask": PAIRS}
            found, nothing = model(x, x, x, need_weights=False, **given)
            expected, weights = quantized(x, x, x, **given)
            assert nothing is None and decibels(found, expected) > 25
            asked_for, same_weights = model(x, x, x, **given)
            assert_same(asked_for, found)
            assert_same(same_weights, weights)

    def test_of_another_sequence(self):
        quantized, model = fused(nn.MultiheadAttention(24, 3, batch_first=True))
        x, y = inputs(model), torch.randn(2, 4, 24, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            assert_same(model(x, y, y)[0], quantized(x, y, y)[0])

    @pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
    def test_keys_of_its_own(self, option):
        quantized = dynquant.quantize_dynamic(nn.MultiheadAttention(24, 3, **{option: True}))
        with pytest.warns(UserWarning, match="left as it is: the model: the block has"):
            dynquant.fuse(quantized)

    def test_inside_a_decoder(self):
        decoder = nn.TransformerDecoderLayer(24, 3, 40, batch_first=True)
        quantized, model = fused(decoder)
        assert dynquant.fused_blocks(model) == {"self_attn": "", "multihead_attn": ""}
        x = inputs(model.self_attn)
        with torch.no_grad():
            found, expected = (one(x, x.flip(1), tgt_mask=PAIRS) for one in (model, quantized))
        assert decibels(found, expected) > 25
