"""gated_delta_rule, selective_scan and causal_conv1d, and the first two in place."""

import numpy as np
import pytest
import reference_mixers
import torch
from compare import assert_all_same, assert_same, widened
from drawn import DTYPES, LAYOUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_blocks import name_of, threads  # noqa: F401 (a fixture)

from dynquant.ops.blocks import ACTIVATIONS

ops = torch.ops.dynquant
SIZES = (1, 3, 8, 15, 16, 17, 31, 32, 33, 64, 70)


def of(rng, *values):
    return values[int(rng.integers(len(values)))]


def floats(rng, shape, dtype=torch.float32):
    """In any layout, now and then with something that is no number or none that is usual."""
    values = rng.standard_normal(shape)
    if values.size and rng.random() < 0.1:
        at = int(rng.integers(values.size))
        values.reshape(-1)[at] = of(rng, np.nan, np.inf, -0.0, 1e30, 1e-40)
    x = torch.from_numpy(values.astype(np.float32)).to(dtype)
    return LAYOUTS[of(rng, *LAYOUTS)](x)


def drawn_rule(rng):
    """Arguments of gated_delta_rule."""
    dtype = of(rng, *DTYPES)
    batch, rows, heads = of(rng, 1, 2), of(rng, 0, 1, 2, 33), of(rng, 1, 2)
    of_values, dim, columns = heads * of(rng, 1, 3), of(rng, 1, 2, 15, 16, 33), of(rng, *SIZES)
    query, key = (floats(rng, (batch, rows, heads, dim), dtype) for _ in range(2))
    value = floats(rng, (batch, rows, of_values, columns), dtype)
    gates = batch, rows, of_values
    decay = floats(rng, gates, of(rng, torch.float32, dtype))
    decay = decay if rng.random() < 0.2 else -decay.abs() * of(rng, 0.1, 100)
    beta = floats(rng, gates, of(rng, torch.float32, dtype)).sigmoid()
    state = floats(rng, (batch, of_values, dim, columns)) if rng.random() < 0.7 else None
    return query, key, value, decay, beta, state, of(rng, None, 0.5), bool(rng.random() < 0.5)


def expected_rule(query, key, value, decay, beta, state, scale, normalize):
    batch, rows, heads, columns = value.shape
    dim, each = key.shape[3], heads // key.shape[2]
    shape = batch, heads, dim, columns
    before = np.zeros(shape, np.float32) if state is None else widened(state)
    out, after = np.zeros(value.shape, np.float32), before.copy()
    scale = 1 / np.sqrt(np.float64(dim)) if scale is None else scale
    q, k, v, decay, beta = map(widened, (query, key, value, decay, beta))
    if normalize:
        q, k = map(reference_mixers.normalized, (q, k))
    for b, h in np.ndindex(batch, heads):
        of_key = (one[b, :, h // each] for one in (q, k))
        gates = (one[b, :, h] for one in (v, decay, beta))
        rest = before[b, h], scale, name_of(value.dtype)
        out[b, :, h], after[b, h] = reference_mixers.gated_delta_rule(*of_key, *gates, *rest)
    return out, after


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_gated_delta_rule(isa, threads, seed):  # noqa: F811
    arguments = drawn_rule(np.random.default_rng(seed))
    expected = expected_rule(*arguments)
    y, state = ops.gated_delta_rule(*arguments)
    assert y.is_contiguous() and y.dtype == arguments[2].dtype and state.is_contiguous()
    assert_all_same((y, state), expected)
    given, rest = arguments[:5], arguments[6:]
    state = torch.zeros_like(state) if arguments[5] is None else arguments[5].contiguous().clone()
    assert_all_same((ops.gated_delta_rule_(*given, state, *rest), state), expected)


def drawn_scan(rng):
    """Arguments of selective_scan: some heads have one value each, as Mamba's channels."""
    dtype, groups = of(rng, *DTYPES), of(rng, 1, 2)
    batch, rows, n = of(rng, 1, 2), of(rng, 0, 1, 2, 33), of(rng, 1, 5, 15, 16, 17, 32, 33, 130)
    heads, size = of(rng, (groups, of(rng, *SIZES)), (groups * of(rng, *SIZES), 1))
    x = floats(rng, (batch, rows, heads, size), dtype)
    dt = floats(rng, (batch, rows, heads), of(rng, torch.float32, dtype)).abs()
    rate = floats(rng, (heads, n) if rng.random() < 0.5 else (heads,))
    rate = rate if rng.random() < 0.2 else -rate.abs() * of(rng, 0.1, 30)
    kept = of(rng, *DTYPES)
    b, c = (floats(rng, (batch, rows, groups, n), kept) for _ in range(2))
    skip = floats(rng, (heads,), of(rng, *DTYPES)) if rng.random() < 0.7 else None
    state = floats(rng, (batch, heads, size, n)) if rng.random() < 0.7 else None
    return x, dt, rate, b, c, skip, state


def expected_scan(x, dt, rate, b, c, skip, state):
    batch, rows, heads, size = x.shape
    each, shape = heads // b.shape[2], (batch, heads, size, b.shape[3])
    before = np.zeros(shape, np.float32) if state is None else widened(state)
    out, after = np.zeros(x.shape, np.float32), before.copy()
    values, steps, rate, b, c = map(widened, (x, dt, rate, b, c))
    for at, h in np.ndindex(batch, heads):
        of_group = (one[at, :, h // each] for one in (b, c))
        own = None if skip is None else widened(skip)[h]
        rest = own, before[at, h], name_of(x.dtype)
        out[at, :, h], after[at, h] = reference_mixers.selective_scan(
            values[at, :, h], steps[at, :, h], rate[h], *of_group, *rest
        )
    return out, after


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_selective_scan(isa, threads, seed):  # noqa: F811
    arguments = drawn_scan(np.random.default_rng(seed))
    expected = expected_scan(*arguments)
    y, state = ops.selective_scan(*arguments)
    assert y.is_contiguous() and y.dtype == arguments[0].dtype and state.is_contiguous()
    assert_all_same((y, state), expected)
    *given, before = arguments
    state = torch.zeros_like(state) if before is None else before.contiguous().clone()
    assert_all_same((ops.selective_scan_(*given, state), state), expected)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_causal_conv1d(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    dtype, taps = of(rng, *DTYPES), of(rng, 1, 2, 3, 4, 7)
    batch, rows, channels = of(rng, 1, 2), of(rng, 0, 1, 2, 3, 9, 40), of(rng, 1, 4, 5, *SIZES)
    x = floats(rng, (batch, rows, channels), dtype)
    weight = floats(rng, (channels, taps), of(rng, *DTYPES))
    bias = floats(rng, (channels,), of(rng, *DTYPES)) if rng.random() < 0.5 else None
    kept = taps - 1 + of(rng, 0, 1, 3)
    state = floats(rng, (batch, channels, kept), dtype) if rng.random() < 0.6 else None
    name = of(rng, *ACTIVATIONS)
    y, after = ops.causal_conv1d(x, weight, bias, state, ACTIVATIONS[name])
    assert y.is_contiguous() and y.dtype == after.dtype == dtype
    before = np.zeros((batch, channels, taps - 1), np.float32)
    if state is not None:
        before = widened(state)[:, :, kept - taps + 1 :]
    parts = widened(weight), None if bias is None else widened(bias)
    for b in range(batch):
        rest = before[b].T, name, name_of(dtype)
        assert_same(y[b], reference_mixers.causal_conv1d(widened(x[b]), *parts, *rest))
    if state is None:
        assert after.shape == (batch, channels, 0)
    else:
        assert_same(after, torch.cat([state, x.mT], -1)[:, :, rows:].contiguous())


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("batch", [1, 3])
def test_convolutions_that_threads_share(isa, threads, batch, dtype):  # noqa: F811
    """A thread begins in the middle of a sequence."""
    x, weight = (torch.randn(shape).to(dtype) for shape in ((batch, 97, 200), (200, 4)))
    state = torch.randn(batch, 200, 3).to(dtype)
    y, _ = ops.causal_conv1d(x, weight, None, state)
    for b in range(batch):
        rest = None, widened(state[b]).T, "none", name_of(dtype)
        assert_same(y[b], reference_mixers.causal_conv1d(widened(x[b]), widened(weight), *rest))


def test_writing_to_a_state_counts():
    """As any change of a tensor that autograd has kept."""
    weight, state = torch.ones(1, 1, 8, 8, requires_grad=True), torch.ones(1, 1, 8, 8)
    for op, values in (
        (ops.gated_delta_rule_, (*torch.randn(3, 1, 1, 1, 8), *torch.rand(2, 1, 1, 1))),
        (ops.selective_scan_, scan_values()),
    ):
        product = (weight * state).sum()
        with torch.no_grad():
            op(*values, state)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        with pytest.raises(RuntimeError, match="state must not want a gradient"):
            op(*values, state.clone().requires_grad_())
        with torch.inference_mode():
            op(*values, state.clone())


def scan_values():
    vectors = torch.randn(2, 1, 1, 1, 8)
    return torch.randn(1, 1, 1, 8), torch.rand(1, 1, 1), -torch.rand(1), *vectors, None


def test_tokens_one_by_one_are_tokens_together(isa):
    rng = np.random.default_rng(0)
    query, key = torch.randn(2, 1, 40, 2, 16)
    value, gate = torch.randn(1, 40, 4, 24), -torch.rand(1, 40, 4)
    given = query, key, value, gate, gate.exp()
    whole = ops.gated_delta_rule(*given)
    state = torch.zeros(1, 4, 16, 24)
    rows = [ops.gated_delta_rule_(*(one[:, t : t + 1] for one in given), state) for t in range(40)]
    assert_all_same((torch.cat(rows, 1), state), whole)

    b, c = torch.randn(2, 1, 40, 1, 20)
    rate, skip = -torch.rand(4), torch.rand(4)
    whole = ops.selective_scan(value, gate.exp(), rate, b, c, skip)
    state, rows = torch.zeros(1, 4, 24, 20), []
    for t in range(40):
        x, dt, *vectors = (one[:, t : t + 1] for one in (value, gate.exp(), b, c))
        rows.append(ops.selective_scan_(x, dt, rate, *vectors, skip, state))
    assert_all_same((torch.cat(rows, 1), state), whole)

    x, weight = floats(rng, (2, 40, 24)), torch.randn(24, 4)
    whole, _ = ops.causal_conv1d(x, weight)
    state, rows = torch.zeros(2, 24, 3), []
    for t in range(40):
        row, state = ops.causal_conv1d(x[:, t : t + 1], weight, None, state)
        rows.append(row)
    assert_same(torch.cat(rows, 1), whole)


class TestErrors:
    x = torch.randn(2, 5, 4, 8)
    gate = torch.rand(2, 5, 4)
    state = torch.zeros(2, 4, 8, 8)

    @pytest.mark.parametrize(
        "changes, text",
        [
            ({"key": torch.randn(2, 5, 4, 7)}, "key must have the shape of query"),
            ({"value": torch.randn(2, 5, 4, 8).half()}, "value must have dtype float32"),
            ({"value": torch.randn(2, 6, 4, 8)}, "value must have the shape"),
            ({"value": torch.randn(2, 5, 3, 8), "decay": gate[..., :3]}, "multiple"),
            ({"decay": gate[:1]}, "decay must have the shape"),
            ({"beta": gate[..., :3]}, "beta must have the shape"),
            ({"state": state.half()}, "state must have dtype float32"),
            ({"state": torch.zeros(2, 4, 7, 8)}, "state, as value and key have it, must"),
            ({"scale": float("nan")}, "scale must be finite"),
            ({"scale": 1e300}, "scale must be finite"),
        ],
    )
    def test_gated_delta_rule(self, changes, text):
        given = dict.fromkeys(("query", "key", "value"), self.x)
        given |= {"decay": -self.gate, "beta": self.gate, "state": self.state} | changes
        if "decay" in changes and "value" in changes:
            given["beta"] = given["decay"]
        for op in (ops.gated_delta_rule, ops.gated_delta_rule_):
            with pytest.raises(RuntimeError, match=text):
                op(**given)

    @pytest.mark.parametrize(
        "changes, text",
        [
            ({"C": torch.randn(2, 5, 2, 5)}, "C must have the shape of B"),
            ({"C": torch.randn(2, 5, 2, 6).half()}, "C must have dtype float32"),
            ({"B": torch.randn(2, 4, 2, 6), "C": torch.randn(2, 4, 2, 6)}, "B must have the shape"),
            ({"B": torch.randn(2, 5, 3, 6), "C": torch.randn(2, 5, 3, 6)}, "multiple"),
            ({"dt": gate[..., :3]}, "dt must have the shape"),
            ({"A": torch.ones(3)}, "A must have the shape"),
            ({"A": torch.ones(4, 5)}, "A must have the shape"),
            ({"A": torch.ones(4, 6, 1)}, "A must have the shape"),
            ({"D": torch.ones(5)}, "D must have the shape"),
            ({"state": torch.zeros(2, 4, 6, 8)}, "state, as x and B have it, must"),
        ],
    )
    def test_selective_scan(self, changes, text):
        vectors = torch.randn(2, 5, 2, 6)
        given = {"x": self.x, "dt": self.gate, "A": torch.ones(4), "B": vectors, "C": vectors}
        given |= {"D": torch.ones(4), "state": torch.zeros(2, 4, 8, 6)} | changes
        for op in (ops.selective_scan, ops.selective_scan_):
            with pytest.raises(RuntimeError, match=text):
                op(**given)

    def test_states_that_are_written_to(self):
        gates = -self.gate, self.gate
        with pytest.raises(RuntimeError, match="state must be contiguous"):
            ops.gated_delta_rule_(self.x, self.x, self.x, *gates, self.state.mT)
        vectors = torch.randn(2, 5, 2, 8)
        parts = self.gate, torch.ones(4), vectors, vectors, None
        with pytest.raises(RuntimeError, match="state must be contiguous"):
            ops.selective_scan_(self.x, *parts, self.state.mT)

    @pytest.mark.parametrize(
        "changes, text",
        [
            ({"x": torch.randn(5, 8)}, "x must have three dimensions"),
            ({"weight": torch.randn(7, 4)}, "weight must have the shape"),
            ({"weight": torch.randn(8, 0)}, "weight must have the shape"),
            ({"bias": torch.randn(7)}, "bias must have the shape"),
            ({"state": torch.randn(2, 8, 2)}, "state must have the shape"),
            ({"state": torch.randn(2, 8, 3).half()}, "state must have dtype float32"),
            ({"activation": 9}, "activation must lie in"),
        ],
    )
    def test_causal_conv1d(self, changes, text):
        given = {"x": torch.randn(2, 5, 8), "weight": torch.randn(8, 4)} | changes
        with pytest.raises(RuntimeError, match=text):
            ops.causal_conv1d(**given)
