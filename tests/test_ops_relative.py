"""relative_attention: the reference, its parts, sequences and padding on their own, errors."""

import numpy as np
import pytest
import reference_float
import torch
from compare import assert_same, widened
from drawn import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_attention import added_rows, drawn_mask, heads
from test_ops_blocks import name_of, threads  # noqa: F401

ops = torch.ops.dynquant
# Around the ends of bands, panels and blocks of four.
SIZES = (1, 2, 3, 4, 5, 15, 31, 33, 63, 64, 65, 70, 127, 128, 129)


def vectors(rng, count, heads_, dim, dtype):
    return heads(rng, 1, count, heads_, dim, dtype)[0]


def drawn(rng, least_terms=0):
    """The arguments of a call."""
    batch, count = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3]))
    rows, keys = (int(rng.choice(SIZES)) for _ in range(2))
    dim, dtype = int(rng.choice([1, 4, 8, 30, 64, 65])), DTYPES[rng.integers(3)]
    query, key, value = (heads(rng, batch, size, count, dim, dtype) for size in (rows, keys, keys))
    kinds = [(True, True), (True, False), (False, True), (False, False)]
    given_terms = kinds[rng.integers(4 if least_terms == 0 else 3)]
    terms = [
        vectors(rng, rows + keys - 1, count, dim, dtype) if one else None for one in given_terms
    ]
    mask = drawn_mask(rng, (batch, count, rows, keys))
    scale = None if rng.random() < 0.5 else float(rng.choice([0.3, 1.0, 0.0, -2.0]))
    return query, key, value, *terms, mask, scale, bool(rng.random() < 0.6)


def bias_of(query, key, by_query, by_key, scale, integers):
    """[B, H, L, S] in fp32, by the reference, or None."""
    if by_query is None and by_key is None:
        return None
    batch, rows, count, _ = query.shape
    bias = np.zeros((batch, count, rows, key.shape[1]), np.float32)
    for b in range(batch):
        for h in range(count):
            terms = (one if one is None else widened(one[:, h]) for one in (by_query, by_key))
            pair = widened(query[b, :, h]), widened(key[b, :, h])
            bias[b, h] = reference_float.distance_bias(*pair, *terms, scale, integers)
    return torch.from_numpy(bias)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_is_the_specification(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    query, key, value, by_query, by_key, mask, scale, integers = drawn(rng)
    if rng.random() < 0.1:
        key[0, -1, 0, 0] = rng.choice([np.nan, np.inf])
    result = ops.relative_attention(query, key, value, by_query, by_key, mask, scale, integers)
    assert result.is_contiguous() and result.dtype == query.dtype
    used = np.float32(1 / np.sqrt(query.shape[3])) if scale is None else scale
    expected = np.zeros(query.shape, np.float32)
    with np.errstate(all="ignore"):
        bias = bias_of(query, key, by_query, by_key, used, integers)
        for b, _, h in np.ndindex(query.shape[0], 1, query.shape[2]):
            added = added_rows(bias, b, h) + added_rows(mask, b, h)
            parts = (widened(one[b, :, h]) for one in (query, key, value))
            expected[b, :, h] = reference_float.attention_head(
                *parts, used, added, False, integers, name_of(query.dtype)
            )
    assert_same(result, expected)


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_is_its_parts(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    query, key, value, *terms, mask, scale, integers = drawn(rng, least_terms=1)
    used = np.float32(1 / np.sqrt(query.shape[3])) if scale is None else scale
    with np.errstate(all="ignore"):
        bias = bias_of(query, key, *terms, used, integers)
    expected = ops.scaled_dot_product(query, key, value, mask, bias, False, scale, integers)
    result = ops.relative_attention(query, key, value, *terms, mask, scale, integers)
    assert torch.equal(result.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("integers", [True, False])
def test_is_deberta(integers):
    """The formula of the paper, in fp64, by gathering from products with all vectors."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    batch, length, count, dim, span = 2, 40, 3, 32, 8
    query, key, value = (normal(batch, length, count, dim) for _ in range(3))
    position_key, position_query = (normal(2 * span, count, dim) for _ in range(2))
    numbers = torch.arange(length)
    distance = numbers[:, None] - numbers
    index = (distance + span).clamp(0, 2 * span - 1)
    by_heads = [one.double().transpose(-3, -2) for one in (query, key, value)]
    wide_key, wide_query = (one.double().transpose(0, 1) for one in (position_key, position_query))
    q, k, v = by_heads
    expanded = index.expand(batch, count, length, length)
    c2p = (q @ wide_key.mT).gather(-1, expanded)
    opposite = (span - distance).clamp(0, 2 * span - 1).expand(batch, count, length, length)
    p2c = (k @ wide_query.mT).gather(-1, opposite).mT
    scores = (q @ k.mT + c2p + p2c) / (3 * dim) ** 0.5
    expected = (scores.softmax(-1) @ v).transpose(1, 2)

    # From the farthest key in front of the last query on.
    order = torch.arange(length - 1, -length, -1)
    by_query = position_key[(order + span).clamp(0, 2 * span - 1)]
    by_key = position_query[(span - order.flip(0)).clamp(0, 2 * span - 1)]
    scale = 1 / (3 * dim) ** 0.5
    result = ops.relative_attention(query, key, value, by_query, by_key, None, scale, integers)
    error = (result - expected).square().sum() / expected.square().sum()
    assert error < (1e-3 if integers else 1e-11)


@pytest.mark.parametrize("integers", [True, False])
def test_sequences_alone(integers):
    rng = np.random.default_rng(0)
    query, key, value = (heads(rng, 3, 70, 2, 16, torch.float32) for _ in range(3))
    terms = [vectors(rng, 139, 2, 16, torch.float32) for _ in range(2)]
    seen = (torch.arange(70) < torch.tensor([[70], [33], [64]]))[:, None, None]
    whole = ops.relative_attention(query, key, value, *terms, seen, None, integers)
    for b, length in enumerate((70, 33, 64)):
        parts = (one[b : b + 1, :length] for one in (query, key, value))
        shorter = [one[70 - length : 69 + length] for one in terms]
        alone = ops.relative_attention(*parts, *shorter, None, None, integers)
        assert torch.equal(whole[b : b + 1, :length], alone)


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4)])
def test_nothing(shape):
    batch, rows, count, dim = shape
    query, key = torch.randn(shape), torch.randn(batch, 5, count, dim)
    if count == 0:
        with pytest.raises(RuntimeError, match="the heads of the query must be a multiple"):
            ops.relative_attention(query, key, key)
        return
    terms = [torch.randn(rows + 4, count, dim)] * 2
    assert ops.relative_attention(query, key, key, *terms).shape == shape


ERRORS = {
    "another dtype of the query": (
        {"query": torch.randn(3, 4, 2, 12).double()},
        "query must have dtype",
    ),
    "another dtype of the key": ({"key": torch.randn(3, 4, 2, 12).half()}, "key must have dtype"),
    "another number of heads": (
        {"key": torch.randn(3, 4, 1, 12), "value": torch.randn(3, 4, 1, 12)},
        "key must have as many heads as query, 2",
    ),
    "too few vectors": ({"position_key": torch.randn(6, 2, 12)}, r"position_key must .*\[7, 2, 12"),
    "too many vectors": (
        {"position_query": torch.randn(8, 2, 12)},
        r"position_query must .*\[7, 2, 12",
    ),
    "vectors of one head": ({"position_key": torch.randn(7, 1, 12)}, "position_key must"),
    "vectors of another dtype": (
        {"position_key": torch.randn(7, 2, 12).half()},
        "position_key must",
    ),
    "a mask of other sequences": (
        {"mask": torch.ones(2, 1, 4, 4, dtype=torch.bool)},
        "mask must spread to",
    ),
    "more scores than there can be": (
        {
            "key": torch.randn(3, 1, 2, 12).expand(3, 1 << 50, 2, 12),
            "value": torch.randn(3, 1, 2, 12).expand(3, 1 << 50, 2, 12),
            "integers": False,
        },
        "too many rows",
    ),
    "a scale that is not finite": ({"scale": float("inf")}, "scale must be finite"),
}


@pytest.mark.parametrize("change", ERRORS)
def test_errors(change):
    changed, text = ERRORS[change]
    given = dict(zip(("query", "key", "value"), torch.randn(3, 3, 4, 2, 12), strict=True))
    given |= {"position_key": torch.randn(7, 2, 12), "position_query": torch.randn(7, 2, 12)}
    with pytest.raises(RuntimeError, match=text):
        ops.relative_attention(**{**given, **changed})
