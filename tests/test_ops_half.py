"""linear_half equals the reference bit for bit, at any shape, layout, dtype and thread count."""

import numpy as np
import pytest
import reference as ref
import torch
from compare import assert_same, widened
from drawn import BIASES, DTYPES, LAYOUTS, ROWS, rows_of
from hypothesis import given
from hypothesis import strategies as st
from test_ops_environment import flushed_subnormals, rounding, threads

linear = torch.ops.dynquant.linear_half
HALVES = (torch.bfloat16, torch.float16)
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
FINITE = ("normal", "small", "any magnitude", "zero", "negative zero", "subnormal")
MOST_PRODUCTS = 300_000  # the reference holds every product


def drawn(m, n, k, dtype=torch.float32, half=torch.float16, bias=True, kinds=("normal",), seed=0):
    rng = np.random.default_rng(seed)
    x = rows_of(rng, m, k, kinds).to(dtype)
    weight = rows_of(rng, n, k, kinds).to(half)
    return x, weight, rows_of(rng, 1, n, kinds)[0] if bias else None


def expected(x, weight, bias):
    given_bias = None if bias is None else widened(bias)
    return ref.linear_half(widened(x), widened(weight), given_bias, NAMES[x.dtype])


def assert_is_the_reference(x, weight, bias, note=""):
    assert_same(linear(x, weight, bias), expected(x, weight, bias), note)


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("m", [0, 1, 2, 3, 4, 5, 6, 7, 12, 13])
def test_every_tile_edge(isa, half, m):
    for n in (0, 1, 2, 3, 4, 7, 8, 9, 63, 64, 65):
        for k in (0, 1, 15, 16, 17, 31, 33):
            assert_is_the_reference(*drawn(m, n, k, half=half, seed=n * k), f"{m}x{n}x{k}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_rows(isa, dtype):
    """More rows than one block holds, and several strips of columns."""
    x, weight, bias = drawn(61, 130, 4096, dtype)
    actual = linear(x, weight, bias)
    for rows in (slice(0, 2), slice(29, 34), slice(59, 61)):
        columns = slice(62, 67)
        assert_same(
            actual[rows, columns], expected(x[rows], weight[columns], bias[columns]), str(rows)
        )
    for row in range(61):
        assert_same(actual[row], linear(x[row], weight, bias))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("k", [2047, 2048, 2053])
def test_many_rows_are_those_of_few(isa, k, half, count):
    """More rows than a weight is laid out for at once, which some sets do for long rows."""
    x, weight, bias = drawn(600, 70, k, half=half)
    for dtype, added in ((torch.float32, bias), (half, None)):
        rows = x.to(dtype)
        few = [linear(rows[first : first + 50], weight, added) for first in range(0, 600, 50)]
        with threads(count):
            assert_same(linear(rows, weight, added), torch.cat(few), str(dtype))
    columns = slice(30, 34)
    actual = linear(x[:64], weight, bias)[:, columns]
    assert_same(actual, expected(x[:64], weight[columns], bias[columns]))


@given(
    m=st.integers(0, 20),
    n=st.integers(0, 150),
    k=st.integers(0, 100) | st.sampled_from([256, 1000]),
    dtype=st.sampled_from(DTYPES),
    half=st.sampled_from(HALVES),
    bias_dtype=st.sampled_from(BIASES),
    layout=st.sampled_from(list(LAYOUTS)),
    kinds=st.sampled_from([("normal",), FINITE, tuple(ROWS), *((kind,) for kind in ROWS)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_is_the_specification(isa, m, n, k, dtype, half, bias_dtype, layout, kinds, seed):
    if m * n * k > MOST_PRODUCTS:
        m = max(1, MOST_PRODUCTS // (n * k))
    x, weight, bias = drawn(m, n, k, dtype, half, True, kinds, seed)
    bias = None if bias_dtype is None else bias.to(bias_dtype)
    assert_is_the_reference(LAYOUTS[layout](x), LAYOUTS[layout](weight), bias)


def test_leading_shapes():
    _, weight, bias = drawn(1, 9, 20)
    for lead in ((), (1,), (0,), (2, 3), (2, 0, 3), (1, 4, 1, 2)):
        x = torch.randn(*lead, 20)
        y = linear(x, weight, bias)
        assert y.shape == (*lead, 9) and y.is_contiguous()
        assert_is_the_reference(x, weight, bias, str(lead))


def test_is_close_to_float():
    """How far fp32 sums in this order are from exact ones, and what the 16 bits cost."""
    x, weight, _ = drawn(16, 64, 4096)
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    # A sum of K terms in 16 parts rounds K / 16 + 4 times, each time by half a unit at most.
    bound = (4096 / 16 + 5) * 2.0**-24 * magnitude
    assert (linear(x, weight).double() - exact).abs().le(bound).all()


@pytest.mark.parametrize("m", [1, 5, 64])
def test_thread_counts(isa, m):
    x, weight, bias = drawn(m, 700, 300)
    with threads(1):
        alone = linear(x, weight, bias)
    for count in (2, 3, 7):
        with threads(count):
            assert_same(linear(x, weight, bias), alone, f"{count} threads")


def test_state_of_the_caller(isa):
    x, weight, bias = drawn(7, 65, 70, kinds=FINITE)
    alone = linear(x, weight, bias)
    with flushed_subnormals():
        assert_same(linear(x, weight, bias), alone)
    for mode in (0x400, 0x800, 0xC00):
        with rounding(mode):
            actual = linear(x, weight, bias)
        assert_same(actual, alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", HALVES, ids=str)
def test_gradient_of_the_input(dtype, half):
    x, weight, bias = drawn(5, 33, 70, dtype, half)
    y = linear(x.requires_grad_(), weight, bias)
    grad_y = torch.randn(y.shape).to(dtype)
    (grad,) = torch.autograd.grad(y, x, grad_y)
    torch.testing.assert_close(grad, (grad_y.float() @ weight.float()).to(dtype))
    with torch.no_grad():
        assert not linear(x, weight, bias).requires_grad
    assert not linear.inference(x, weight, bias).requires_grad


def test_gradient_under_compile():
    x, weight, bias = drawn(5, 33, 70)
    x.requires_grad_()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    grads = [
        torch.autograd.grad(function(x, weight, bias).square().sum(), x)[0]
        for function in (linear, compiled)
    ]
    assert_same(*grads)


def test_opcheck_with_a_gradient():
    x, weight, bias = drawn(3, 5, 7)
    torch.library.opcheck(linear.default, (x.requires_grad_(), weight, bias))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_casts_the_input_alone(dtype):
    x, weight, bias = drawn(5, 33, 70)
    with torch.autocast("cpu", dtype=dtype):
        for op in (linear, linear.inference):
            y = op(x, weight, bias)
            assert_same(y, linear(x.to(dtype), weight, bias))
        with pytest.raises(RuntimeError, match="x must have dtype"):
            linear(x.double(), weight, bias)
