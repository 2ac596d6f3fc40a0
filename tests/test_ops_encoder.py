"""encoder: attention and feed_forward of layer after layer, in one call."""

import numpy as np
import pytest
import torch
from compare import assert_same
from drawn import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from op_arguments import valid_call
from test_ops_attention import attention_weights, drawn_mask
from test_ops_blocks import drawn_scheme, norm_of, threads, weights  # noqa: F401

from dynquant.ops.blocks import ACTIVATIONS, NORMS
from dynquant.ops.encoder import TENSORS

ops = torch.ops.dynquant


def drawn_layer(rng, heads, kv_heads, dim, k):
    """The tensors of a layer, in the op's order."""
    merged = bool(rng.random() < 0.2)
    hidden = int(rng.choice([3, 64, 130]))
    norms = (norm_of(rng, k, NORMS["layer"])[1:3] for _ in range(2))
    norms = [(None, None) if rng.random() < 0.1 else norm for norm in norms]
    return [
        *attention_weights(rng, heads, kv_heads, dim, k, k, merged),
        *weights(rng, hidden, k, rng.random() < 0.5),
        *weights(rng, k, hidden, rng.random() < 0.5),
        *(tensor for norm in norms for tensor in norm),
    ]


def in_parts(x, layers, heads, kv_heads, function, eps, norm_first, mask, integers, scheme):
    """The same by a call of each block."""
    nothing = 0, None, None, 0.0
    for layer in layers:
        norms = (1, *layer[18:20], eps), (1, *layer[20:], eps)
        first, second = ((norm, nothing) if norm_first else (nothing, norm) for norm in norms)
        added = mask, None, False, None, None, None, integers, x
        x = ops.attention(*(x, *layer[:12], heads, kv_heads, *added, *first[0], *first[1], *scheme))
        x = ops.feed_forward(
            *(x, *layer[12:15], None, None, None, *layer[15:18], function, 0, x),
            *(*second[0], *second[1], *scheme),
        )
    return x


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32 - 1))
def test_is_its_parts(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    batch, rows, count = (int(rng.choice(one)) for one in ([0, 1, 3], [1, 5, 40], [1, 2, 3]))
    kv_heads, dim, k = int(rng.choice([1, 2])), int(rng.choice([4, 10])), int(rng.choice([9, 64]))
    heads, dtype = kv_heads * int(rng.choice([1, 3])), DTYPES[rng.integers(3)]
    layers = [drawn_layer(rng, heads, kv_heads, dim, k) for _ in range(count)]
    x = torch.from_numpy(rng.standard_normal((batch, rows, k)).astype(np.float32)).to(dtype)
    rest = (
        *(heads, kv_heads, int(rng.integers(len(ACTIVATIONS))), 1e-5, bool(rng.random() < 0.5)),
        *(drawn_mask(rng, (batch, heads, rows, rows)), bool(rng.random() < 0.7)),
    )
    scheme = drawn_scheme(rng)
    y = ops.encoder(x, [tensor for layer in layers for tensor in layer], *rest, *scheme)
    assert y.dtype == x.dtype
    assert_same(y, in_parts(x, layers, *rest, scheme))


def encoded(**changes):
    values = valid_call("encoder") | changes
    given = (values[name] for name in ("x", "weights", "heads", "kv_heads", "activation", "eps"))
    return ops.encoder(*given)


@pytest.mark.parametrize("count", [0, 1, TENSORS - 1, TENSORS + 1])
def test_another_number_of_tensors(count):
    weights = (3 * valid_call("encoder")["weights"])[:count]
    with pytest.raises(RuntimeError, match=f"weights must hold 22 tensors .* got {count}"):
        encoded(weights=weights)
    with pytest.raises(RuntimeError, match=f"weights must hold 22 tensors .* got {count}"):
        encoded(
            x=valid_call("encoder")["x"].to("meta"),
            weights=[None if one is None else one.to("meta") for one in weights],
        )


def test_errors_name_the_layer():
    weights = valid_call("encoder")["weights"]
    for at, message in ((0, "tensor 0 must be given"), (16, "tensor 16 must be given")):
        with pytest.raises(RuntimeError, match=f"layer 1: {message}"):
            encoded(weights=[*weights[: TENSORS + at], None, *weights[TENSORS + at + 1 :]])
    wrong = list(weights)
    wrong[TENSORS + 18] = torch.ones(3)
    with pytest.raises(RuntimeError, match="layer 1: norm_after_weight"):
        encoded(weights=wrong)


def test_does_not_change_what_it_is_given():
    values = valid_call("encoder")
    before = [values["x"].clone(), *(one.clone() for one in values["weights"])]
    encoded(**values)
    for one, other in zip([values["x"], *values["weights"]], before, strict=True):
        assert_same(one, other)
