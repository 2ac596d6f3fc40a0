"""rotary, scaled_dot_product and attention: the reference, torch's own, the parts, and masks."""

import re

import numpy as np
import pytest
import reference_float
import torch
from compare import assert_same, widened
from drawn import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_blocks import (  # noqa: F401
    drawn_norm,
    drawn_scheme,
    ended,
    name_of,
    normalized,
    threads,
    weights,
)

from dynquant.ops.blocks import ACTIVATIONS

ops = torch.ops.dynquant


def heads(rng, batch, rows, count, dim, dtype):
    """[B, rows, heads, D] in one of the layouts that models have."""
    values = torch.from_numpy(rng.standard_normal((batch, rows, count, dim)).astype(np.float32))
    values = values.to(dtype)
    layout = rng.integers(4)
    if layout == 1:  # [B, H, rows, D] in memory
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == 2:  # every second value
        return torch.stack([values, values], -1).flatten(-2)[..., ::2]
    if layout == 3:  # a part of wider rows
        return torch.nn.functional.pad(values.flatten(2), (3, 5))[..., 3:-5].unflatten(
            2, (count, dim)
        )
    return values


def quantized_heads(rng, *sizes):
    """int8 [B, rows, heads, D] and fp32 [B, rows, heads], in layouts of their own."""
    values = heads(rng, *sizes, torch.float32)
    q, scale, _ = ops.quantize_activation(values, True, True)
    laid_out = heads(rng, *sizes, torch.int8)
    return laid_out.copy_(q), heads(rng, *sizes[:-1], 1, torch.float32)[..., 0].copy_(scale)


def kept_heads(rng, dtype, *sizes):
    """Keys or values in that dtype, and their scales, which floats have not."""
    if dtype == torch.int8:
        return quantized_heads(rng, *sizes)
    return heads(rng, *sizes, dtype), None


def drawn_mask(rng, shape, may_be_bool=True):
    """None, or something that spreads to [B, H, L, S] and may leave no key to a query."""
    if rng.random() < 0.3:
        return None
    shape = [size if rng.random() < 0.6 else 1 for size in shape]
    if may_be_bool and rng.random() < 0.3:
        return torch.from_numpy(rng.random(shape) < 0.7)
    if may_be_bool and rng.random() < 0.4:  # the first keys of each row, as of a padded text
        seen = rng.integers(shape[3] + 1, size=(*shape[:3], 1))
        return torch.from_numpy(np.arange(shape[3]) < np.maximum(seen, rng.integers(2)))
    mask = rng.standard_normal(shape).astype(np.float32)
    if rng.random() < 0.5:
        mask[rng.random(shape) < 0.3] = -np.inf
    return torch.from_numpy(mask).to(DTYPES[rng.integers(3)])


def added_rows(mask, batch, head):
    """What a mask adds to the scores of one head, [L or 1, S or 1]."""
    if mask is None:
        return []
    part = mask[batch if mask.shape[0] > 1 else 0, head if mask.shape[1] > 1 else 0]
    if part.dtype == torch.bool:
        return [np.where(part.numpy(), np.float32(0), np.float32(-np.inf))]
    return [widened(part)]


def drawn_softmax(rng, count):
    """What changes the softmax: softcap, and sinks of the heads."""
    softcap = float(rng.choice([0.1, 3.0, 50.0])) if rng.random() < 0.3 else None
    if rng.random() < 0.7:
        return softcap, None
    values = rng.standard_normal(2 * count) * rng.choice([1, 30])
    if rng.random() < 0.1:
        values[0] = rng.choice([np.nan, np.inf, -np.inf])
    sinks = torch.from_numpy(values.astype(np.float32)).to(DTYPES[rng.integers(3)])
    return softcap, sinks[::2]


def expected_heads(
    query, key, value, mask, bias, causal, scale, integers, kept_scales=None, form=(None, None)
):
    softcap, sinks = form
    batch, rows, count, dim = query.shape
    out = np.zeros(query.shape, np.float32)
    for b in range(batch):
        for h in range(count):
            kv = h // (count // key.shape[2])
            added = added_rows(bias, b, h) + added_rows(mask, b, h)
            parts = (widened(part) for part in (query[b, :, h], key[b, :, kv], value[b, :, kv]))
            scales = kept_scales and [one[b, :, kv].numpy() for one in kept_scales]
            out[b, :, h] = reference_float.attention_head(
                *(*parts, scale, added, causal, integers, name_of(query.dtype), scales),
                softcap=softcap,
                sink=None if sinks is None else sinks[h].item(),
            )
    return out


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_scaled_dot_product(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    batch, rows, keys = (
        int(rng.integers(1, 3)),
        *(int(rng.choice([1, 2, 15, 16, 17, 33, 49, 70])) for _ in range(2)),
    )
    kv = int(rng.choice([1, 2]))
    count, dim, dtype = (
        kv * int(rng.choice([1, 2])),
        int(rng.choice([1, 8, 30, 65])),
        DTYPES[rng.integers(3)],
    )
    query = heads(rng, batch, rows, count, dim, dtype)
    kept = DTYPES[rng.integers(3)] if dtype == torch.float32 else dtype
    key, value = (heads(rng, batch, keys, kv, dim, kept) for _ in range(2))
    if rng.random() < 0.2:
        value[0, rng.integers(keys), 0, 0] = np.nan
    if rng.random() < 0.2:  # products beyond fp32, which a mask does not hide
        query, key = (one * rng.choice([1.0, 1e10]) for one in (query, key))
        key[0, -1] *= 1e25
    shape = batch, count, rows, keys
    mask, bias = drawn_mask(rng, shape), drawn_mask(rng, shape, may_be_bool=False)
    causal, integers = bool(rng.random() < 0.3), bool(rng.random() < 0.6)
    scale = None if rng.random() < 0.5 else float(rng.choice([0.3, 1.0, 0.0, -2.0, 1e-9]))
    used = np.float32(1 / np.sqrt(dim)) if scale is None else scale
    form = drawn_softmax(rng, count)
    added = mask, bias, causal
    result = ops.scaled_dot_product(
        *(query, key, value, *added, scale, integers), softcap=form[0], sinks=form[1]
    )
    assert result.is_contiguous() and result.dtype == dtype
    with np.errstate(all="ignore"):
        expected = expected_heads(query, key, value, *added, used, integers, form=form)
    assert_same(result, expected)


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_keys_and_values_in_int8(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    batch, kv = (int(rng.integers(1, 3)) for _ in range(2))
    rows = int(rng.choice([1, 2, 9, 50]))  # fewer and more than are multiplied by strips
    keys, dim = int(rng.choice([1, 15, 16, 70, 130])), int(rng.choice([1, 8, 30, 64, 65]))
    count, dtype = kv * int(rng.choice([1, 2])), DTYPES[rng.integers(3)]
    query = heads(rng, batch, rows, count, dim, dtype)
    made = [quantized_heads(rng, batch, keys, kv, dim) for _ in range(2)]
    (key, value), scales = zip(*made, strict=True)
    mask = drawn_mask(rng, (batch, count, rows, keys))
    causal = bool(rng.random() < 0.3)
    if rng.random() < 0.2:
        scales[rng.integers(2)][0, rng.integers(keys), 0] = np.nan
    form, given = drawn_softmax(rng, count), (query, key, value, mask, None, causal, 0.3, False)
    result = ops.scaled_dot_product(*given, *scales, *form)
    with np.errstate(all="ignore"):
        expected = expected_heads(*given, scales, form)
    assert_same(result, expected)


def torchs(query, key, value, mask=None, causal=False):
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        *parts, mask, is_causal=causal, enable_gqa=True
    ).transpose(1, 2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("integers", [False, True])
def test_is_close_to_torch(integers, causal):
    rng = np.random.default_rng(0)
    query, key, value = (heads(rng, 2, 300, count, 32, torch.float32) for count in (4, 2, 2))
    result = ops.scaled_dot_product(query, key, value, None, None, causal, None, integers)
    exact = torchs(query, key, value, causal=causal)
    noise = (result - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert noise < (0.02 if integers else 1e-6)


@pytest.mark.parametrize("rows", [1, 5, 60])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float16])
def test_keys_and_values_in_16_bits_count_as_they_are(isa, kept, integers, rows):
    rng = np.random.default_rng(4)
    query = heads(rng, 2, rows, 4, 40, torch.float32)
    key, value = (heads(rng, 2, 90, 2, 40, kept) for _ in range(2))
    found = ops.scaled_dot_product(query, key, value, integers=integers)
    wide = ops.scaled_dot_product(query, key.float(), value.float(), integers=integers)
    assert found.dtype == torch.float32
    assert_same(found, wide)


@pytest.mark.parametrize("integers", [False, True])
def test_a_row_that_is_masked_as_a_whole_is_that_of_torch(integers):
    query, key, value = (torch.randn(2, 5, 3, 8) for _ in range(3))
    keep = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    keep[1, 0, 3] = False
    lowest = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    infinite = torch.where(keep, 0.0, -torch.inf)
    for mask in (keep, infinite):
        result = ops.scaled_dot_product(query, key, value, mask, integers=integers)
        torch.testing.assert_close(result, torchs(query, key, value, mask), rtol=0.05, atol=0.05)
        assert (result[1, 3] == 0).all()
    result = ops.scaled_dot_product(query, key, value, lowest, integers=integers)
    torch.testing.assert_close(result, torchs(query, key, value, lowest), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", [(9, 9, 64), (7, 7, 66), (6, 3, 128), (10, 2, 200)])
@pytest.mark.parametrize("kept", [torch.float32, torch.float16, torch.int8])
def test_keys_and_values_from_memory(isa, threads, rows, shape, kept):  # noqa: F811
    """Heads that are read side by side have the bits of each alone."""
    rng = np.random.default_rng(2)
    keys, (count, kv, dim) = 2000 if kept == torch.int8 else 1000, shape
    query = heads(rng, 2, rows, count, dim, torch.float32)
    made = [kept_heads(rng, kept, 2, keys, kv, dim) for _ in range(2)]
    (key, value), scales = zip(*made, strict=True)
    mask = torch.from_numpy(rng.random((2, 1, rows, keys)) < 0.7)
    rest = mask, None, False, None, False
    whole = ops.scaled_dot_product(query, key, value, *rest, *scales)
    for h in range(count):
        one = slice(h // (count // kv), h // (count // kv) + 1)
        part = (given if given is None else given[:1, :, one] for given in (key, value, *scales))
        key_of_one, value_of_one, *scales_of_one = part
        alone = ops.scaled_dot_product(
            *(query[:1, :, h : h + 1], key_of_one, value_of_one, mask[:1], *rest[1:]),
            *scales_of_one,
        )
        assert_same(whole[:1, :, h : h + 1], alone)


@pytest.mark.parametrize("rows", [1, 60])
@pytest.mark.parametrize("integers", [False, True])
def test_softcap_and_sinks_are_close_to_torch(integers, rows):
    """The formulas of Gemma 2 and gpt-oss, in fp64."""
    rng = np.random.default_rng(3)
    query, key, value = (heads(rng, 2, n, 4, 32, torch.float32) for n in (rows, 90, 90))
    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0])
    mask = torch.from_numpy(rng.random((2, 1, rows, 90)) < 0.7)
    mask[0, 0, 0] = False  # a row that sees its sink alone
    found = ops.scaled_dot_product(
        *(query, key, value, mask, None, False, 0.4, integers), softcap=2.0, sinks=sinks
    )
    q, k, v = (one.double().transpose(1, 2) for one in (query, key, value))
    scores = 2 * torch.tanh(q @ k.mT * 0.4 / 2)
    scores = scores.masked_fill(~mask, -torch.inf)
    more = sinks.double().view(1, 4, 1, 1).expand(2, 4, rows, 1)
    weights = torch.cat([scores, more], -1).softmax(-1)[..., :-1]
    exact = (weights @ v).transpose(1, 2)
    noise = (found - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt()
    assert noise < (0.02 if integers else 1e-6)
    assert (found[0, 0] == 0).all()


def test_masks_of_both_kinds_are_alike(isa):
    rng = np.random.default_rng(1)
    query, key, value = (heads(rng, 2, 20, 2, 16, torch.float32) for _ in range(3))
    keep = torch.from_numpy(rng.random((2, 1, 20, 20)) < 0.6)
    keep[..., 0] = True
    infinite = torch.where(keep, 0.0, -torch.inf)
    results = [
        ops.scaled_dot_product(query, key, value, *arguments)
        for arguments in ((keep,), (infinite,), (None, infinite), (infinite.bfloat16(),))
    ]
    for result in results[1:]:
        assert_same(result, results[0])


def attention_weights(rng, count, kv, dim, k, n, together):
    if together:
        parts = [*weights(rng, (count + 2 * kv) * dim, k, True), *[None] * 6]
    else:
        parts = [
            *weights(rng, count * dim, k, True),
            *weights(rng, kv * dim, k, False),
            *weights(rng, kv * dim, k, True),
        ]
    return [*parts, *weights(rng, n, count * dim, True)]


def projected(x, parts, count, kv, turn, head_norms, before, schemes, plus_one=False, gated=False):
    """Query, key and value, one op after the other.

    Args:
        turn: what rotary takes besides x, or (None, None, False).
        head_norms: (weight or None, eps) of two.
    """
    normed = normalized(x, *before)
    q, k, v = (
        None if parts[i] is None else ops.linear_dynamic(normed, *parts[i : i + 3], *schemes)
        for i in (0, 3, 6)
    )
    if k is None:
        dim = q.shape[-1] // (count + 2 * kv)
        q, k, v = q.split([count * dim, kv * dim, kv * dim], -1)
    q, k, v = (part.unflatten(-1, (heads, -1)) for part, heads in ((q, count), (k, kv), (v, kv)))
    q, *gate = q.chunk(2, -1) if gated else (q,)
    q, k = (
        part if weight is None else normalized_heads(part, weight, eps, plus_one)
        for part, (weight, eps) in zip((q, k), head_norms, strict=True)
    )
    if turn[0] is not None:
        q, k = ops.rotary(q, *turn), ops.rotary(k, *turn)
    return torch.cat([q, *gate], -1), k, v


def normalized_heads(heads, weight, eps, plus_one):
    """An RMS norm of each head, or of all heads together."""
    rows = heads if weight.shape[0] == heads.shape[-1] else heads.flatten(2)
    return ops.rms_norm(rows, weight, eps, plus_one).view_as(heads)


def composed(
    x, parts, count, kv, options, turn, integers, residual, before, after, schemes, last=False
):
    q, k, v = projected(x, parts, count, kv, turn, [(None, 0.0)] * 2, before, schemes)
    attended = ops.scaled_dot_product(q, k, v, *options, integers)
    y = ops.linear_dynamic(attended.flatten(2), *parts[9:], *schemes)
    return ended(y, residual, after, last)


def drawn_angles(rng, batch, rows, dim, dtype):
    """cos, sin and interleaved in one of the forms that rotary takes, or None, None and any."""
    interleaved = bool(rng.random() < 0.5)
    if rng.random() < 0.5:
        return None, None, interleaved
    lead = [(rows,), (1, rows), (batch, rows)][rng.integers(3)]
    width = dim // 2 * (1 if interleaved else 2)
    angles = torch.from_numpy(rng.standard_normal((*lead, width)).astype(np.float32))
    return angles.cos().to(dtype), angles.sin().to(dtype), interleaved


def drawn_weight_of_heads(rng, count, dim):
    """That of a norm of each head, of one of all heads, or None."""
    size = rng.choice([0, dim, count * dim], p=[0.4, 0.3, 0.3])
    return torch.from_numpy(rng.random(size).astype(np.float32)) if size else None


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_query_key_value_is_its_parts(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    batch, rows = int(rng.choice([0, 1, 2, 5])), int(rng.choice([1, 1, 3, 33]))
    kv, dim, k = int(rng.choice([1, 2])), int(rng.choice([4, 8, 34])), int(rng.choice([9, 64]))
    count, dtype = kv * int(rng.choice([1, 3])), DTYPES[rng.integers(3)]
    x = torch.from_numpy(rng.standard_normal((batch, rows, k)).astype(np.float32)).to(dtype)
    together = bool(rng.random() < 0.4)
    gated = not together and bool(rng.random() < 0.5)
    parts = attention_weights(rng, count, kv, dim, k, k, together)[:9]
    if gated:
        parts[:3] = weights(rng, count * 2 * dim, k, True)
    turn = drawn_angles(rng, batch, rows, dim, dtype)
    norms = [
        (drawn_weight_of_heads(rng, each, dim), eps)
        for each, eps in ((1 if gated else count, 1e-5), (kv, 0.5))
    ]
    before, schemes = drawn_norm(rng, k), drawn_scheme(rng)
    ends, plus_one = (*before, *schemes), bool(rng.random() < 0.5)
    found = ops.query_key_value(
        x, *parts, count, kv, *turn[:2], *norms[0], *norms[1], *ends, plus_one, turn[2], gated
    )
    expected = projected(x, parts, count, kv, turn, norms, before, schemes, plus_one, gated)
    for one, other in zip(found, expected, strict=True):
        assert one.is_contiguous()
        assert_same(one, other)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("part, size, sizes", [("q", 16, "[8] or [32]"), ("k", 32, "[8] or [16]")])
def test_a_norm_of_heads_of_another_size(device, part, size, sizes):
    rng = np.random.default_rng(0)
    parts = attention_weights(rng, 4, 2, 8, 9, 9, together=False)[:9]
    given = torch.randn(1, 2, 9), *parts, torch.ones(size)
    x, *parts, weight = (one if one is None else one.to(device) for one in given)
    wanted = f"norm_{part}_weight must have the shape {sizes}, got [{size}]"
    with pytest.raises(RuntimeError, match=re.escape(wanted)):
        ops.query_key_value(x, *parts, 4, 2, **{f"norm_{part}_weight": weight})


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_gated_errors(device):
    rng = np.random.default_rng(0)
    given = attention_weights(rng, 4, 2, 8, 9, 9, together=False)[:9]
    q = weights(rng, 64, 9, True)
    x, *parts = (one if one is None else one.to(device) for one in (torch.randn(1, 2, 9), *given))
    q = [one.to(device) for one in q]
    with pytest.raises(RuntimeError, match="packed_q must have N, a multiple of 12, got 32"):
        ops.query_key_value(x, *parts, 6, 2, gated=True)
    with pytest.raises(RuntimeError, match="gated: it goes with packed_k and packed_v"):
        ops.query_key_value(x, *q, *[None] * 6, 4, 2, gated=True)
    weight = torch.ones(32, device=device)
    with pytest.raises(RuntimeError, match=re.escape("must have the shape [8], got [32]")):
        ops.query_key_value(x, *q, *parts[3:], 4, 2, norm_q_weight=weight, gated=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_gate_of_another_form(device):
    rng = np.random.default_rng(0)
    out = [one.to(device) for one in weights(rng, 6, 24, True)]
    x, key = torch.randn(2, 5, 3, 8, device=device), torch.randn(2, 3, 4, 8, device=device)
    for gate in (x[:, :4], x[:1], x.flatten(2), x[..., :4]):
        with pytest.raises(RuntimeError, match=re.escape("gate must have the shape [2, 5, 3, 8]")):
            ops.attend(x, key, key, *out, gate=gate)
    with pytest.raises(RuntimeError, match="gate must have dtype"):
        ops.attend(x, key, key, *out, gate=x.bfloat16())


@pytest.mark.parametrize("integers", [False, True])
def test_a_query_without_heads(integers):
    key = torch.randn(2, 5, 2, 8)
    query = key.new_empty(2, 3, 0, 8)
    assert ops.scaled_dot_product(query, key, key, integers=integers).shape == (2, 3, 0, 8)
    packed, scale, bias = weights(np.random.default_rng(0), 6, 0, True)
    found = ops.attend(query, key.transpose(1, 2), key.transpose(1, 2), packed, scale, bias)
    assert_same(found, bias.expand(2, 3, 6))


@pytest.mark.parametrize("keys, seen", [(70, 70), (700, 690), (1500, 1500), (1500, 1450)])
def test_few_rows_of_floats_are_those_of_many(isa, keys, seen):
    """They read keys and values as they lie; of many keys, many rows bring theirs in order."""
    rng = np.random.default_rng(7)
    query = heads(rng, 2, 70, 4, 65, torch.float32)
    key, value = (heads(rng, 2, keys, 2, 65, torch.float32) for _ in range(2))
    mask = None if seen == keys else (torch.arange(keys) < seen)[None, None, None]
    many = ops.scaled_dot_product(query, key, value, mask, integers=False)
    for rows in (1, 2, 47):
        few = ops.scaled_dot_product(query[:, :rows], key, value, mask, integers=False)
        assert_same(few, many[:, :rows])


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_attention_is_its_parts(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    batch, rows = int(rng.choice([0, 1, 2, 3, 8])), int(rng.choice([1, 2, 16, 31, 65]))
    kv, dim, k = int(rng.choice([1, 2])), int(rng.choice([4, 8, 34])), int(rng.choice([9, 64]))
    count, dtype = kv * int(rng.choice([1, 3])), DTYPES[rng.integers(3)]
    x = torch.from_numpy(rng.standard_normal((batch, rows, k)).astype(np.float32)).to(dtype)
    n = k if rng.random() < 0.5 else 70
    shape = batch, count, rows, rows
    options = (
        drawn_mask(rng, shape),
        drawn_mask(rng, shape, may_be_bool=False),
        bool(rng.random() < 0.3),
        None if rng.random() < 0.5 else 0.25,
    )
    turn = drawn_angles(rng, batch, rows, dim, dtype)
    residual = x if n == k and rng.random() < 0.5 else None
    arguments = (
        *(x, attention_weights(rng, count, kv, dim, k, n, bool(rng.random() < 0.4)), count, kv),
        *(options, turn, bool(rng.random() < 0.7), residual),
        drawn_norm(rng, k),
        drawn_norm(rng, n),
        drawn_scheme(rng),
        bool(rng.random() < 0.3),
    )
    x, parts, count, kv, options, turn, integers, residual, *norms, schemes, last = arguments
    result = ops.attention(
        *(x, *parts, count, kv, *options, *turn[:2], integers, residual),
        *(*norms[0], *norms[1], *schemes, last, turn[2]),
    )
    assert_same(result, composed(*arguments))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_attend_is_its_parts(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    batch, rows = int(rng.choice([0, 1, 2, 5])), int(rng.choice([1, 1, 3, 50]))
    keys = int(rng.choice([1, 7, 40]))
    kv, dim, k = int(rng.choice([1, 2])), int(rng.choice([4, 8, 34])), int(rng.choice([9, 64]))
    count, dtype = kv * int(rng.choice([1, 3])), DTYPES[rng.integers(3)]
    n = k if rng.random() < 0.5 else 70
    kept_dtype = DTYPES[rng.integers(3)] if dtype == torch.float32 else dtype
    if rng.random() < 0.3:
        kept_dtype = torch.int8
    made = [kept_heads(rng, kept_dtype, batch, keys, kv, dim) for _ in range(2)]
    kept, scales = zip(*made, strict=True)
    shape = batch, count, rows, keys
    added = drawn_mask(rng, shape), drawn_mask(rng, shape, may_be_bool=False)
    scale = None if rng.random() < 0.5 else 0.25
    projection, out = weights(rng, count * dim, k, True), weights(rng, n, count * dim, True)
    before, schemes = drawn_norm(rng, k), drawn_scheme(rng)
    after, last, causal = drawn_norm(rng, n), *(bool(rng.random() < 0.3) for _ in range(2))
    if rng.random() < 0.5:
        x = heads(rng, batch, rows, 1, k, dtype)[:, :, 0]
        query = ops.linear_dynamic(normalized(x, *before), *projection, *schemes)
        query = query.unflatten(-1, (count, dim))
    else:
        x = query = heads(rng, batch, rows, count, dim, dtype)
        projection, before = (None, None, None), (0, None, None, 0.0)
    residual = None
    if rng.random() < 0.5:
        residual = torch.from_numpy(rng.standard_normal((batch, rows, n)).astype(np.float32))
        residual = residual.to(dtype)
    gate = None
    if rng.random() < 0.4:  # what lies behind each head's query
        gate = heads(rng, batch, rows, count, 2 * dim, dtype)[..., dim:]
    form = drawn_softmax(rng, count)
    found = ops.attend(
        *(x, *(one.transpose(1, 2) for one in kept), *out, *projection, *added, scale),
        *(one if one is None else one.transpose(1, 2) for one in scales),
        *(residual, *before, *after, *schemes, last, causal, gate, *form),
    )
    attended = ops.scaled_dot_product(query, *kept, *added, causal, scale, False, *scales, *form)
    if gate is not None:
        attended = attended * ops.activation(gate, ACTIVATIONS["sigmoid"])
    y = ops.linear_dynamic(attended.flatten(2), *out, *schemes)
    assert found.is_contiguous() and found.dtype == dtype
    assert_same(found, ended(y, residual, after, last))


@pytest.mark.parametrize("integers", [False, True])
def test_neither_padding_nor_the_batch_changes_anything(isa, integers):
    rng = np.random.default_rng(5)
    parts = attention_weights(rng, 4, 4, 16, 64, 64, False)
    lengths = [5, 40, 17, 33]
    x = torch.from_numpy(rng.standard_normal((4, 40, 64)).astype(np.float32))
    keep = torch.arange(40) < torch.tensor(lengths)[:, None]
    x[~keep] = 3.0
    padded = ops.attention(x, *parts, 4, 4, keep[:, None, None, :], integers=integers)
    for i, length in enumerate(lengths):
        alone = ops.attention(x[i : i + 1, :length], *parts, 4, 4, integers=integers)
        assert_same(padded[i, :length], alone[0])


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_rotary(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    dtype, dim = DTYPES[rng.integers(3)], int(rng.choice([2, 34, 64, 80]))
    turned = dim if rng.random() < 0.5 else 2 * int(rng.integers(1, dim // 2 + 1))
    x = heads(rng, 2, 7, 3, dim, dtype)
    interleaved = bool(rng.random() < 0.5)
    width = turned // 2 if interleaved else turned
    angles = torch.from_numpy(rng.standard_normal((2, 7, width)).astype(np.float32))
    cos, sin = angles.cos(), angles.sin()
    spread = (part[:, :, None].numpy() for part in (cos, sin))
    expected = reference_float.rotary(widened(x), *spread, name_of(dtype), interleaved)
    assert_same(ops.rotary(x, cos, sin, interleaved), expected)
    assert_same(ops.rotary(x, cos[:1], sin[:1], interleaved)[0], expected[0])
    assert_same(ops.rotary(x, cos[0], sin[0], interleaved)[0], expected[0])


class TestErrors:
    x = torch.randn(2, 5, 3, 8)

    @pytest.mark.parametrize(
        "changes, text",
        [
            ({"key": torch.randn(2, 5, 3, 7)}, "key must have the shape"),
            ({"key": torch.randn(3, 5, 3, 8)}, "key must have the shape"),
            ({"key": torch.randn(2, 5, 2, 8), "value": torch.randn(2, 5, 2, 8)}, "multiple"),
            ({"key": torch.randn(2, 0, 3, 8), "value": torch.randn(2, 0, 3, 8)}, "a row at least"),
            ({"value": torch.randn(2, 4, 3, 8)}, "value must have the shape of key"),
            ({"value": torch.randn(2, 5, 3, 8).half()}, "value must have dtype float32"),
            ({"key": torch.randn(2, 5, 3, 8).half()}, "value must have dtype float16"),
            ({"key": torch.randn(2, 5, 3, 8).double()}, "key must have dtype float32, bfloat16"),
            ({"query": torch.randn(2, 5, 3, 8).half()}, "key must have dtype float16"),
            ({"mask": torch.ones(5, 5)}, "mask must have four dimensions"),
            ({"mask": torch.ones(2, 2, 5, 5)}, "mask must spread to"),
            ({"mask": torch.ones(2, 1, 5, 5, dtype=torch.int32)}, "mask must have dtype bool"),
            ({"position_bias": torch.ones(1, 1, 5, 5, dtype=torch.bool)}, "position_bias must"),
            ({"scale": float("nan")}, "scale must be finite"),
            ({"key_scale": torch.ones(2, 5, 3)}, "key_scale goes with a key in int8"),
            ({"value_scale": torch.ones(2, 5, 3)}, "value_scale goes with a value in int8"),
            ({"softcap": 0.0}, "softcap must be positive and finite"),
            ({"softcap": -1.0}, "softcap must be positive and finite"),
            ({"softcap": 1e-50}, "softcap must be positive and finite"),
            ({"softcap": 1e300}, "softcap must be positive and finite"),
            ({"softcap": float("nan")}, "softcap must be positive and finite"),
            ({"sinks": torch.ones(2)}, "sinks must have the shape"),
            ({"sinks": torch.ones(3, 1)}, "sinks must have the shape"),
            ({"sinks": torch.ones(3, dtype=torch.int32)}, "sinks must have dtype float32"),
        ],
    )
    def test_scaled_dot_product(self, changes, text):
        arguments = {"query": self.x, "key": self.x, "value": self.x} | changes
        with pytest.raises(RuntimeError, match=text):
            ops.scaled_dot_product(**arguments)

    @pytest.mark.parametrize(
        "changes, text",
        [
            ({"key_scale": None}, "key_scale goes with a key in int8"),
            ({"value_scale": None}, "value_scale goes with a value in int8"),
            ({"key": x, "key_scale": None}, "value must have dtype (torch.)?float32"),
            ({"value": x, "value_scale": None}, "value must have dtype (torch.)?int8"),
            (
                {"key_scale": torch.ones(2, 5, 3).half()},
                "key_scale must have dtype (torch.)?float32",
            ),
            ({"key_scale": torch.ones(2, 3, 5)}, r"key_scale must have the shape \[2, 5, 3\]"),
            ({"value_scale": torch.ones(2, 5)}, r"value_scale must have the shape \[2, 5, 3\]"),
            ({"integers": True}, "integers must be False"),
            (
                {"key": torch.ones(2, 5, 3, 8, dtype=torch.uint8)},
                "key must have dtype (torch.)?float32,",
            ),
        ],
    )
    def test_scaled_dot_product_in_int8(self, changes, text):
        kept, scale = torch.ones(2, 5, 3, 8, dtype=torch.int8), torch.ones(2, 5, 3)
        given = {"query": self.x, "key": kept, "value": kept, "integers": False}
        given |= {"key_scale": scale, "value_scale": scale}
        assert ops.scaled_dot_product(**given).shape == self.x.shape
        for device in ("cpu", "meta"):
            moved = {
                name: one.to(device) if isinstance(one, torch.Tensor) else one
                for name, one in (given | changes).items()
            }
            with pytest.raises(RuntimeError, match=text):
                ops.scaled_dot_product(**moved)

    @pytest.mark.parametrize(
        "changes, text",
        [
            ({"x": torch.randn(2, 5, 8)}, "x must have four dimensions"),
            ({"x": torch.randn(2)}, "x must have the dimensions"),
            ({"x": torch.ones(2, 5, 3, 8, dtype=torch.int8)}, "x must have dtype float32"),
            ({"bias_q": torch.ones(6)}, "bias_q is given without packed_q"),
            ({"weight_scale_q": torch.ones(6)}, "packed_q and weight_scale_q must both"),
            ({"key": torch.randn(2, 3, 0, 8), "value": torch.randn(2, 3, 0, 8)}, "a row at least"),
            ({"key": torch.randn(2, 2, 4, 8), "value": torch.randn(2, 2, 4, 8)}, "multiple"),
            ({"key": torch.randn(2, 3, 4, 7)}, r"key must have the shape \[2, KV, S, 8\]"),
            ({"x": torch.randn(2, 5, 6, 8)}, "packed_out must have K = 48"),
            ({"key": torch.randn(2, 4, 8)}, "key must have four dimensions"),
            ({"key": torch.randn(2, 2, 4, 8)}, "value must have the shape of key"),
            ({"value": torch.randn(2, 3, 4, 8).half()}, "value must have dtype float32"),
            ({"residual": torch.randn(2, 5, 7)}, "residual must have"),
            ({"mask": torch.ones(1, 1, 5, 5)}, "mask must spread to"),
            ({"key_scale": torch.ones(2, 3, 4)}, "key_scale goes with a key in int8"),
            ({"key_scale": torch.ones(2)}, "key_scale goes with a key in int8"),
            (
                {
                    "key": torch.ones(2, 3, 4, 8, dtype=torch.int8),
                    "value": torch.ones(2, 3, 4, 8, dtype=torch.int8),
                    "key_scale": torch.ones(2, 3, 4),
                    "value_scale": torch.ones(2, 4, 3),
                },
                r"value_scale must have the shape \[2, 3, 4\], got \[2, 4, 3\]",
            ),
            ({"norm_before": 1}, "norm_before belongs to packed_q"),
            ({"norm_before_weight": torch.ones(8)}, "norm_before_weight"),
            ({"norm_after": 4}, "norm_after must be"),
            ({"activation_bits": 4}, "activation_bits must be 8 or 16"),
        ],
    )
    def test_attend(self, changes, text):
        packed, scale, bias = weights(np.random.default_rng(0), 6, 24, True)
        kept = torch.randn(2, 3, 4, 8)
        given = {"x": self.x, "key": kept, "value": kept, "packed_out": packed}
        given |= {"weight_scale_out": scale, "bias_out": bias}
        assert ops.attend(**given).shape == (2, 5, 6)
        with pytest.raises(RuntimeError, match=text):
            ops.attend(**given | changes)
        meta = {
            name: one.to("meta") if isinstance(one, torch.Tensor) else one
            for name, one in (given | changes).items()
        }
        if not text.startswith("packed_out"):  # whose K its bytes alone do not tell
            with pytest.raises(RuntimeError, match=text if "key_scale" in changes else None):
                ops.attend(**meta)

    def test_attend_with_another_projection(self):
        rng = np.random.default_rng(0)
        kept, x = torch.randn(2, 3, 4, 8), torch.randn(2, 5, 10)
        for n, width, text in (
            (20, 24, "packed_q must have N, a multiple"),
            (16, 24, "packed_out"),
        ):
            q, out = weights(rng, n, 10, True), weights(rng, 6, width, True)
            with pytest.raises(RuntimeError, match=text):
                ops.attend(x, kept, kept, *out, *q)
        with pytest.raises(RuntimeError, match="packed_q and weight_scale_q must both"):
            ops.attend(x, kept, kept, *weights(rng, 6, 24, True), q[0])

    def test_rotary(self):
        for cos in (torch.ones(5, 3), torch.ones(4, 8), torch.ones(3, 5, 8), torch.ones(5, 10)):
            with pytest.raises(RuntimeError, match="cos must"):
                ops.rotary(self.x, cos, torch.ones(5, 8))
        with pytest.raises(RuntimeError, match="cos and sin must have one shape"):
            ops.rotary(self.x, torch.ones(5, 8), torch.ones(5, 6))
        for cos in (torch.ones(5, 0), torch.ones(5, 5), torch.ones(3, 5, 4)):
            with pytest.raises(RuntimeError, match="cos must.*R / 2]"):
                ops.rotary(self.x, cos, torch.ones(5, 4), True)
