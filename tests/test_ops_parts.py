"""Each part of linear_dynamic gives the bits of the reference, and the parts make the whole."""

import numpy as np
import pytest
import reference as ref
import torch
from compare import assert_all_same, assert_same, widened
from drawn import DTYPES, cases
from hypothesis import given, settings
from hypothesis import strategies as st

ops = torch.ops.dynquant


def drawn_integers(case):
    """q over its whole type, zero points over theirs, [1] or one for each row."""
    rng = case.rng
    dtype = np.int8 if case.symmetric else {8: np.uint8, 16: np.uint16}[case.bits]
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    q = rng.integers(low, high + 1, (*case.lead_shape, case.k), dtype=dtype)
    if rng.random() < 0.2:
        q[...] = rng.choice([low, high])
    sides = case.lead_shape if case.per_token else (1,)
    zero_point = rng.integers(low, high + 1, sides, dtype=np.int32)
    if rng.random() < 0.3:
        zero_point = np.full(sides, rng.choice([low, 0, high]), dtype=np.int32)
    return torch.from_numpy(q), torch.from_numpy(zero_point)


def drawn_scale(case):
    sides = case.lead_shape if case.per_token else (1,)
    scale = np.asarray(case.rng.uniform(0.5, 2, sides) * case.rng.choice([1, 1e-38, 1e-30, 1e20]))
    scale = np.where(case.rng.random(sides) < 0.1, np.nan, scale)
    return torch.from_numpy(np.asarray(scale, dtype=np.float32))


def reference_bias(bias):
    return None if bias is None else widened(bias)


@settings(max_examples=350)
@given(case=cases())
def test_activation(isa, case):
    x = case.activation()
    arguments = case.scheme
    expected = ref.quantize_activation(widened(x), *arguments)
    assert_all_same(ops.quantize_activation(x, *arguments), expected)
    assert_all_same(ops.choose_qparams(x, *arguments), expected[1:])


@settings(max_examples=250)
@given(case=cases(), zeros=st.booleans())
def test_given_parameters(isa, case, zeros):
    x, scale = case.activation(), drawn_scale(case)
    zero_point = torch.from_numpy(case.rng.integers(0, 2**case.bits, scale.shape, dtype=np.int32))
    if case.symmetric:
        zero_point.zero_()
    if zeros:
        scale = scale * 0  # quotients are NaN or infinite
    q = ops.quantize_with(x, scale, zero_point, case.symmetric, case.bits)
    arguments = scale.numpy(), zero_point.numpy(), case.symmetric, case.bits
    assert_same(q, ref.quantize_with(widened(x), *arguments))


@pytest.mark.parametrize("symmetric", [False, True])
def test_given_parameters_divide(isa, symmetric):
    """Values within a rounding of a tie: to multiply by 1 / scale would show."""
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.1, 10, 50).astype(np.float32)
    x = (rng.integers(-120, 120, (50, 333)) + 0.5).astype(np.float32) * scale[:, None]
    x[:, ::3] = np.nextafter(x[:, ::3], np.float32(np.inf))
    x[:, 1::3] = np.nextafter(x[:, 1::3], np.float32(-np.inf))
    zero_point = np.full(50, 0 if symmetric else 120, dtype=np.int32)
    q = ops.quantize_with(*map(torch.from_numpy, (x, scale, zero_point)), symmetric)
    assert_same(q, ref.quantize_with(x, scale, zero_point, symmetric))


@settings(max_examples=200)
@given(case=cases())
def test_weight(isa, case):
    weight = case.float_weight()
    expected = ref.quantize_weight(widened(weight), case.per_channel)
    quantized = ops.quantize_weight(weight, case.per_channel)
    assert_all_same(quantized, expected)
    unpacked = ops.unpack_weight(ops.pack_weight(quantized[0]), case.n, case.k)
    assert_same(unpacked, quantized[0])


@settings(max_examples=350)
@given(case=cases(bits=(8,)))
def test_product(isa, case):
    (q, zero_point), (weight, _) = drawn_integers(case), case.weight()
    acc = ops.int_mm(q, zero_point, ops.pack_weight(weight), weight.shape[0])
    assert_same(acc, ref.int_mm(q.numpy(), zero_point.numpy(), weight.numpy()))


@settings(max_examples=200)
@given(case=cases(), dtype=st.sampled_from(DTYPES))
def test_rescale(isa, case, dtype):
    (_, weight_scale), bias, scale = case.weight(), case.bias(), drawn_scale(case)
    shape = (*case.lead_shape, case.n)
    largest = case.rng.choice([2**7, 2**24 + 7, 2**31])
    acc = torch.from_numpy(case.rng.integers(-largest, largest, shape, dtype=np.int32))
    y = ops.rescale(acc, scale, weight_scale, bias, dtype)
    arguments = scale.numpy(), weight_scale.numpy(), reference_bias(bias)
    assert y.dtype == dtype
    assert_same(y, ref.rescale(acc.numpy(), *arguments, str(dtype).removeprefix("torch.")))


@settings(max_examples=200)
@given(case=cases(), dtype=st.sampled_from(DTYPES))
def test_fused_product(isa, case, dtype):
    (q, zero_point), (weight, weight_scale) = drawn_integers(case), case.weight()
    scale, bias, packed = drawn_scale(case), case.bias(), ops.pack_weight(weight)
    y = ops.scaled_mm(q, scale, zero_point, packed, weight_scale, bias, dtype)
    arguments = weight.numpy(), weight_scale.numpy(), reference_bias(bias)
    name = str(dtype).removeprefix("torch.")
    expected = ref.scaled_mm(q.numpy(), scale.numpy(), zero_point.numpy(), *arguments, name)
    assert y.dtype == dtype
    assert_same(y, expected)
    if case.bits == 8:
        acc = ops.int_mm(q, zero_point, packed, weight.shape[0])
        assert_same(ops.rescale(acc, scale, weight_scale, bias, dtype), y, "int_mm and rescale")


@settings(max_examples=150)
@given(case=cases())
def test_the_parts_make_the_whole(isa, case):
    x, (weight, weight_scale), bias = case.activation(), case.weight(), case.bias()
    packed, schemes = ops.pack_weight(weight), case.scheme
    whole = ops.linear_dynamic(x, packed, weight_scale, bias, *schemes)
    quantized = ops.quantize_activation(x, *schemes)
    assert_same(ops.scaled_mm(*quantized, packed, weight_scale, bias, x.dtype), whole)


@pytest.mark.parametrize("low, high", [(0, 255), (-128, 127)], ids=["uint8", "int8"])
def test_the_extreme_products(isa, low, high):
    """Every corner of q, zero point and weight at the greatest depth fits int32."""
    k = 65536
    weight = torch.tensor([[127], [-127]], dtype=torch.int8).repeat(1, k)
    packed = ops.pack_weight(weight)
    dtype = torch.uint8 if low == 0 else torch.int8
    for value, zero in ((low, high), (high, low), (low, low), (high, high)):
        q = torch.full((2, k), value, dtype=dtype)
        acc = ops.int_mm(q, torch.tensor([zero], dtype=torch.int32), packed, 2)
        exact = (value - zero) * 127 * k
        assert acc.tolist() == [[exact, -exact]] * 2


@pytest.mark.parametrize("m", [1, 2, 7])
def test_the_extreme_products_of_16_bits(isa, m):
    """Each half's sum fits int32, -128 among the weights included."""
    k = 65536
    weight = torch.tensor([[127], [-127], [-128]], dtype=torch.int8).repeat(1, k)
    packed, ones = ops.pack_weight(weight), torch.ones(3)
    for value in (0, 255, 256, 65280, 65535):
        for zero in (0, 255, 256, 65280, 65535):
            q = torch.full((m, k), value, dtype=torch.int32).to(torch.uint16)
            zero_point = torch.tensor([zero], dtype=torch.int32)
            y = ops.scaled_mm(q, ones[:1], zero_point, packed, ones, None, torch.float32)
            arguments = (np.ones(1, np.float32), zero_point.numpy(), weight.numpy())
            expected = ref.scaled_mm(q.numpy(), *arguments, ones.numpy(), None, "float32")
            assert_same(y, expected, f"{value}, {zero}")


def test_int_mm_has_no_int32_for_16_bits():
    q = torch.zeros(3, 8, dtype=torch.uint16)
    packed = ops.pack_weight(torch.zeros(5, 8, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="q must have dtype uint8, int8, got uint16"):
        ops.int_mm(q, torch.zeros(1, dtype=torch.int32), packed, 5)


@pytest.mark.parametrize(
    "scheme, message",
    [
        ((True, True, 16), "symmetric activations have 8 bits"),
        ((True, False, 12), "must be 8 or 16, got 12"),
        ((False, False, 0), "must be 8 or 16, got 0"),
    ],
)
def test_bits_that_are_not_there(scheme, message):
    x, scale, zero = torch.zeros(3, 8), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    packed = ops.pack_weight(torch.zeros(5, 8, dtype=torch.int8))
    calls = {
        "bits": [
            lambda: ops.choose_qparams(x, *scheme),
            lambda: ops.quantize_activation(x, *scheme),
            lambda: ops.quantize_with(x, scale, zero, *scheme[1:]),
        ],
        "activation_bits": [lambda: ops.linear_dynamic(x, packed, scale, None, *scheme)],
    }
    for name, each in calls.items():
        for one in each:
            with pytest.raises(RuntimeError, match=f"^{name} .*{message}"):
                one()


def test_arguments_with_strides(isa):
    """All but `packed` may be views with steps."""
    rng = np.random.default_rng(0)
    m, n, k = 7, 33, 20
    q = torch.from_numpy(rng.integers(0, 256, (m, 2 * k), dtype=np.uint8))[:, ::2]
    scale, zero_point = torch.rand(2 * m)[::2], torch.arange(3 * m, dtype=torch.int32)[::3]
    weight = torch.from_numpy(rng.integers(-127, 128, (k, n), dtype=np.int8)).T
    weight_scale, bias = torch.rand(2 * n)[1::2], torch.rand(1).expand(n)
    packed = ops.pack_weight(weight)
    assert_same(packed, ops.pack_weight(weight.contiguous()))
    plain = [t.contiguous() for t in (q, scale, zero_point, weight_scale, bias)]
    views = ops.scaled_mm(q, scale, zero_point, packed, weight_scale, bias, torch.float32)
    copies = ops.scaled_mm(*plain[:3], packed, *plain[3:], torch.float32)
    assert_same(views, copies)
    acc = ops.int_mm(q, zero_point, packed, n)
    assert_same(acc, ops.int_mm(plain[0], plain[2], packed, n))
    columns = acc.T.contiguous().T
    assert_same(ops.rescale(columns, scale, weight_scale, bias, torch.float32), copies)
