"""linear_dynamic gives the bits of the reference, on every instruction set."""

import numpy as np
import pytest
import reference as ref
import torch
from compare import assert_same, widened
from drawn import COLUMN_COUNTS, DEPTHS, DTYPES, ROW_COUNTS, ROWS, cases, rows_of
from hypothesis import given, settings

ops = torch.ops.dynquant


def expected_linear(x, weight, scale, bias=None, per_token=True, symmetric=False, bits=8):
    bias = None if bias is None else widened(bias)
    dtype = str(x.dtype).removeprefix("torch.")
    return ref.linear_dynamic(
        widened(x), weight.numpy(), scale.numpy(), bias, per_token, symmetric, dtype, bits
    )


def drawn_weight(n, k, seed=0):
    rng = np.random.default_rng(seed)
    weight = torch.from_numpy(rng.integers(-127, 128, (n, k), dtype=np.int8))
    return weight, torch.from_numpy(rng.uniform(1e-3, 1e-2, n).astype(np.float32))


@settings(max_examples=1200)
@given(case=cases())
def test_drawn(isa, case):
    x, (weight, scale), bias = case.activation(), case.weight(), case.bias()
    expected = expected_linear(x, weight, scale, bias, *case.scheme)
    packed = ops.pack_weight(weight)
    y = ops.linear_dynamic(x, packed, scale, bias, *case.scheme)
    assert y.dtype == x.dtype and y.is_contiguous()
    assert_same(y, expected)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("k", DEPTHS)
def test_every_tile_edge(isa, k, bits):
    """Rows and columns do not depend on each other: one reference serves every M and N."""
    rng = np.random.default_rng(k)
    x = rows_of(rng, max(ROW_COUNTS), k, tuple(ROWS))
    columns = [n for n in COLUMN_COUNTS if n <= 129]
    weight, scale = drawn_weight(max(columns), k)
    bias = torch.from_numpy(rng.standard_normal(max(columns)).astype(np.float32))
    expected = expected_linear(x, weight, scale, bias, bits=bits)
    for n in columns:
        packed = ops.pack_weight(weight[:n])
        for m in ROW_COUNTS:
            y = ops.linear_dynamic(x[:m], packed, scale[:n], bias[:n], activation_bits=bits)
            assert_same(y, expected[:m, :n], f"{m}x{n}x{k}")


SCHEMES = [(False, 8), (True, 8), (False, 16)]  # symmetric, bits
LARGE = [(300, 520, 260), (1, 5000, 700), (2, 1000, 1000), (1000, 64, 40), (64, 1025, 513)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_shapes_that_threads_split(isa, shape, dtype):
    m, n, k = shape
    x = rows_of(np.random.default_rng(0), m, k, ("normal", "ties", "NaN")).to(dtype)
    finite = rows_of(np.random.default_rng(1), m, k, ("normal", "positive")).to(dtype)
    weight, scale = drawn_weight(n, k)
    packed, bias = ops.pack_weight(weight), torch.linspace(-1, 1, n).to(dtype)
    for scheme in SCHEMES:
        y = ops.linear_dynamic(x, packed, scale, bias, True, *scheme)
        assert_same(y, expected_linear(x, weight, scale, bias, True, *scheme))
        y = ops.linear_dynamic(finite, packed, scale, bias, False, *scheme)
        assert_same(y, expected_linear(finite, weight, scale, bias, False, *scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("m", [1, 7])
def test_no_overflow_at_the_greatest_depth(isa, m, scheme):
    k = 65536
    weight = torch.full((3, k), 127, dtype=torch.int8)
    weight[1] = -128
    weight[2, ::2] = -127
    x = torch.full((m, k), 255.0)
    x[-1] *= -1  # zero_point 255 and q 0
    x[m // 2, : k // 2] = 1
    scale = torch.tensor([1.0, 0.5, 3.0])
    y = ops.linear_dynamic(x, ops.pack_weight(weight), scale, None, True, *scheme)
    assert_same(y, expected_linear(x, weight, scale, None, True, *scheme))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("n", [1, 65])
def test_drawn_at_the_greatest_depth(isa, n, bits):
    k = 65536
    x = rows_of(np.random.default_rng(3), 5, k, ("normal", "any magnitude", "ties"))
    weight, scale = drawn_weight(n, k)
    y = ops.linear_dynamic(x, ops.pack_weight(weight), scale, activation_bits=bits)
    assert_same(y, expected_linear(x, weight, scale, bits=bits))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind != "normal"])
def test_an_awkward_row_between_normal_ones(isa, kind, per_token, bits):
    rng = np.random.default_rng(5)
    x = rows_of(rng, 9, 70, ("normal",))
    x[4] = rows_of(rng, 1, 70, (kind,))[0]
    weight, scale = drawn_weight(33, 70)
    packed = ops.pack_weight(weight)

    def product(x, per_token=True):
        return ops.linear_dynamic(x, packed, scale, None, per_token, False, bits)

    y = product(x, per_token)
    assert_same(y, expected_linear(x, weight, scale, None, per_token, bits=bits))
    if per_token:
        alone = torch.cat([product(row)[None] for row in x])
        assert_same(y, alone, "a row alone and in a batch")
        others = torch.arange(9) != 4
        assert_same(y[others], product(x[others]))


def test_no_depth_gives_the_bias(isa):
    bias = torch.tensor([1.5, -2.0, 0.0])
    packed = ops.pack_weight(torch.zeros(3, 0, dtype=torch.int8))
    y = ops.linear_dynamic(torch.zeros(4, 0), packed, torch.ones(3), bias)
    assert_same(y, bias.expand(4, 3))


def test_outliers_cost_16_bits_little(isa):
    """One channel at 400 times the others takes the steps of 8 bits, and leaves 16 enough."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((64, 384)).astype(np.float32))
    x[:, 7] *= 400
    weight, scale = drawn_weight(384, 384)
    exact = x.double() @ (weight * scale[:, None]).double().T
    packed = ops.pack_weight(weight)

    def noise(bits):
        y = ops.linear_dynamic(x, packed, scale, activation_bits=bits)
        return (y - exact).square().mean().log10() * 10

    assert noise(8) - noise(16) > 40


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_around_every_rounding(isa, dtype):
    """Sweeps the result from below the subnormals of its dtype to above its largest value."""
    x = torch.eye(6).to(dtype) * 255
    weight, _ = drawn_weight(40, 6)
    packed = ops.pack_weight(weight)
    for exponent in range(-150, 128, 3):
        scale = torch.full((1,), 1.37) * 2.0**exponent
        y = ops.linear_dynamic(x, packed, scale)
        assert_same(y, expected_linear(x, weight, scale), f"2^{exponent}")
