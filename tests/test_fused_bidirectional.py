"""Decoders all of whose tokens see each other: the masks that transformers makes slowly."""

import copy
import pickle

import pytest
import torch
from compare import assert_same
from fused import IDS, LENGTHS, MASK, TEXT, fused, small

import dynquant
from dynquant.fused.bidirectional import FusedBidirectional

pytest.importorskip("transformers", reason="transformers is not installed")

GEMMA3 = {
    **TEXT,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "layer_types": ["sliding_attention", "full_attention"],
    "use_bidirectional_attention": True,
}
LEFT = MASK.flip(1)
# A window that is longer than the texts, and one that is not: of 8, 4 on either side.
WINDOWS = (512, 8)


def made(window=8, **options):
    return fused(small("Gemma3Text", {**GEMMA3, "sliding_window": window, **options}))


@pytest.fixture(scope="module", params=WINDOWS)
def models(request):
    """The unfused model, and the fused one with and without what is tested."""
    quantized, model = made(request.param)
    plain = copy.deepcopy(model)
    plain.__class__ = type(plain)._base
    return quantized, model, plain


def calls_vmap(model, monkeypatch, **given):
    from transformers import masking_utils

    called = []
    whole = masking_utils._vmap_expansion_sdpa
    with monkeypatch.context() as patched:
        patched.setattr(
            masking_utils,
            "_vmap_expansion_sdpa",
            lambda *a, **k: called.append(a) or whole(*a, **k),
        )
        with torch.no_grad():
            model(**given)
    return bool(called)


@pytest.mark.parametrize("mask", [None, torch.ones_like(MASK), MASK, LEFT, MASK.bool()])
@pytest.mark.parametrize("use_cache", [False, True])
def test_equal_to_the_masks_of_transformers(models, mask, use_cache):
    quantized, model, plain = models
    assert isinstance(model, FusedBidirectional)
    given = {"input_ids": IDS, "attention_mask": mask, "use_cache": use_cache}
    with torch.no_grad():
        found, expected, other = (one(**given)[0] for one in (model, plain, quantized))
    assert_same(found, expected)
    torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-3)


def test_embeddings_and_positional_arguments(models):
    _, model, plain = models
    embeddings = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for args, kwargs in (
            ((IDS, MASK), {}),
            ((), {"inputs_embeds": embeddings, "attention_mask": MASK[:, :9]}),
        ):
            assert_same(model(*args, **kwargs)[0], plain(*args, **kwargs)[0])


def test_no_function_of_positions_is_evaluated(models, monkeypatch):
    _, model, plain = models
    assert calls_vmap(plain, monkeypatch, input_ids=IDS, attention_mask=MASK)
    assert not calls_vmap(model, monkeypatch, input_ids=IDS, attention_mask=MASK)


def test_what_runs_as_it_does(monkeypatch):
    """Caches with tokens, positions, other masks, other implementations and settings."""
    quantized, model = made()
    plain = copy.deepcopy(model)
    plain.__class__ = type(plain)._base
    with torch.no_grad():
        caches = [one(input_ids=IDS, use_cache=True).cache for one in (model, plain)]
        later = [
            one(input_ids=IDS[:, :1], cache=cache, use_cache=True)[0]
            for one, cache in zip((model, plain), caches, strict=True)
        ]
    assert_same(*later)
    mapping = dict.fromkeys(("full_attention", "sliding_attention"))
    for given in (
        {"position_ids": torch.arange(IDS.shape[1])[None]},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])},
        {"attention_mask": mapping},
    ):
        given = {"input_ids": IDS, **given}
        with torch.no_grad():
            assert_same(model(**given)[0], plain(**given)[0])
    for name, value in (("use_bidirectional_attention", False), ("is_causal", False)):
        for one in (model, plain):
            setattr(one.config, name, value)
        given = {"input_ids": IDS, "attention_mask": MASK}
        with torch.no_grad():
            assert_same(model(**given)[0], plain(**given)[0])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_layer_that_is_causal(implementation, monkeypatch):
    """What such a layer makes of no mask is not that all is seen."""
    _, model = made(attn_implementation=implementation)
    if implementation == "sdpa":
        model.layers[0].self_attn.is_causal = True
    assert calls_vmap(model, monkeypatch, input_ids=IDS)


def test_a_decoder_that_is_causal_is_left():
    _, model = made(use_bidirectional_attention=False)
    assert not isinstance(model, FusedBidirectional)


def test_copies_pickles_and_compilers(models):
    _, model, _ = models
    given = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        expected = model(**given)[0]
        for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same(one(**given)[0], expected)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**given)[0], expected, rtol=1e-3, atol=1e-3)
    assert dynquant.fused_blocks(model) and LENGTHS[1] < IDS.shape[1]
