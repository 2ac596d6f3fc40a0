"""The reference against values worked by hand and against what the specification promises."""

import numpy as np
import pytest
import reference as ref

F = np.float32
LARGEST = np.finfo(F).max


def row(*values):
    return np.array([values], dtype=F)


def test_weight_by_hand():
    w = np.array([[127, -127, 0.5, 1.5, 2.5], [0, -254, 3, 254, 1], [0, 0, 0, 0, 0]], dtype=F)
    q, scale = ref.quantize_weight(w)
    assert scale.tolist() == [1, 2, 1] and scale.dtype == F
    assert q.tolist() == [[127, -127, 0, 2, 2], [0, -127, 2, 127, 0], [0] * 5]
    q, scale = ref.quantize_weight(w, per_channel=False)
    assert scale.tolist() == [2]
    assert q.tolist() == [[64, -64, 0, 1, 1], [0, -127, 2, 127, 0], [0] * 5]


def test_weight_below_the_smallest_normal_scale_vanishes():
    kept, vanishing = F(127 * 2.0**-126), F(126 * 2.0**-126)
    q, scale = ref.quantize_weight(np.array([[kept, -kept], [vanishing, 0]], dtype=F))
    assert q.tolist() == [[127, -127], [0, 0]]
    assert scale.tolist() == [2.0**-126, 1]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_weight(shape):
    q, scale = ref.quantize_weight(np.zeros(shape, dtype=F))
    assert q.shape == shape and scale.tolist() == [1] * shape[0]
    assert ref.quantize_weight(np.zeros(shape, dtype=F), per_channel=False)[1].tolist() == [1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weight_refuses_what_is_not_finite(bad):
    with pytest.raises(ValueError):
        ref.quantize_weight(row(1, bad))


def test_asymmetric_by_hand():
    # The range is 255, so scale and inv are 1 and every tie is seen as it is.
    q, scale, zero_point = ref.quantize_activation(row(-100, 155, 0.5, 1.5, -0.5, -0.0, 154.5))
    assert (scale.tolist(), zero_point.tolist()) == ([1], [100])
    assert q.tolist() == [[0, 255, 100, 102, 100, 100, 254]] and q.dtype == np.uint8


def test_the_range_always_holds_zero():
    q, scale, zero_point = ref.quantize_activation(np.array([[255, 200], [-255, -200]], dtype=F))
    assert scale.tolist() == [1, 1] and zero_point.tolist() == [0, 255]
    assert q.tolist() == [[255, 200], [0, 55]]


def test_symmetric_by_hand():
    q, scale, zero_point = ref.quantize_activation(row(-127, 0.5, 1.5, 126), symmetric=True)
    assert (scale.tolist(), zero_point.tolist()) == ([1], [0])
    assert q.tolist() == [[-127, 0, 2, 126]] and q.dtype == np.int8


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("values", [(0, 0), (-0.0, 0), (1e-45, 0), (-3e-37, 3e-37)])
def test_flat_rows(values, symmetric):
    q, scale, zero_point = ref.quantize_activation(row(*values), symmetric=symmetric)
    tiny_is_flat = not symmetric or max(values) < 127 / LARGEST
    assert tiny_is_flat == (scale[0] == 1)
    if tiny_is_flat:
        assert not q.any() and not zero_point.any()


def test_subnormal_scale_is_kept():
    q, scale, _ = ref.quantize_activation(row(0, 1e-36))
    assert 0 < scale[0] < 2.0**-126 and q.tolist() == [[0, 255]]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_row_touches_no_other(bad, symmetric):
    x = np.array([[1, 2, -3], [1, bad, 0], [4, 5, 6]], dtype=F)
    q, scale, zero_point = ref.quantize_activation(x, symmetric=symmetric)
    assert np.isnan(scale[1]) and zero_point[1] == 0 and not q[1].any()
    for alone in (0, 2):
        one_q, one_scale, one_zero = ref.quantize_activation(x[alone], symmetric=symmetric)
        assert (one_q == q[alone]).all()
        assert (one_scale, one_zero) == (scale[alone], zero_point[alone])
    q, scale, zero_point = ref.quantize_activation(x, per_token=False, symmetric=symmetric)
    assert np.isnan(scale).all() and not q.any() and not zero_point.any()


def test_range_overflow_is_of_the_asymmetric_scheme_alone():
    x = row(-LARGEST, LARGEST)
    assert np.isnan(ref.choose_qparams(x)[0]).all()
    q, scale, _ = ref.quantize_activation(x, symmetric=True)
    assert np.isfinite(scale).all() and q.tolist() == [[-127, 127]]


@pytest.mark.parametrize("per_token, shape", [(True, (3, 2)), (False, (1,))])
def test_shapes_and_empty_tensors(per_token, shape):
    for k in (0, 5):
        x = np.zeros((3, 2, k), dtype=F)
        q, scale, zero_point = ref.quantize_activation(x, per_token)
        assert q.shape == x.shape and scale.shape == zero_point.shape == shape
        assert (scale == 1).all() and scale.dtype == F and zero_point.dtype == np.int32


def test_given_parameters_by_hand():
    x = row(-np.inf, -3, 0.5, 3, 1e38, np.inf, np.nan)
    scale, zero_point = np.array([2], dtype=F), np.array([10], dtype=np.int32)
    assert ref.quantize_with(x, scale, zero_point).tolist() == [[0, 8, 10, 12, 255, 255, 0]]
    nothing = np.array([0], dtype=np.int32)
    q = ref.quantize_with(x, scale, nothing, symmetric=True)
    assert q.tolist() == [[-127, -2, 0, 2, 127, 127, 0]]


def test_product_and_result_by_hand():
    q = np.array([[1, 2], [255, 0]], dtype=np.uint8)
    w = np.array([[1, -1], [127, 127], [0, 0]], dtype=np.int8)
    acc = ref.int_mm(q, np.array([1, 255], dtype=np.int32), w)
    assert acc.tolist() == [[-1, 127, 0], [255, -32385, 0]] and acc.dtype == np.int32
    scale, weight_scale = np.array([0.5, 2], dtype=F), np.array([1, 2, 4], dtype=F)
    y = ref.rescale(acc, scale, weight_scale, np.array([0, 1, 2], dtype=F), "float32")
    assert y.tolist() == [[-0.5, 128, 2], [510, -129539, 2]]


def test_the_extreme_product_fits():
    k = 65536
    q, w = np.full((1, k), 255, dtype=np.uint8), np.full((1, k), 127, dtype=np.int8)
    zero = np.zeros(1, dtype=np.int32)
    assert ref.int_mm(q, zero, w) == 65536 * 255 * 127
    assert ref.int_mm(q * 0, zero + 255, w) == -65536 * 255 * 127


@pytest.mark.parametrize(
    "bits, expected",
    [
        (0x3F808000, 0x3F800000),  # a tie goes to the even neighbour below
        (0x3F818000, 0x3F820000),  # and above
        (0x3F808001, 0x3F810000),
        (0x7F7FFFFF, 0x7F800000),  # the largest float32 overflows
        (0x80000001, 0x80000000),  # the sign of zero stays
        (0x00018000, 0x00020000),  # subnormals are rounded, not flushed
        (0xFF800000, 0xFF800000),
    ],
)
def test_bfloat16_rounding(bits, expected):
    y = np.array([bits], dtype=np.uint32).view(F)
    assert ref.round_to(y, "bfloat16").view(np.uint32)[0] == expected


def test_narrow_results():
    y = np.array([1 + 2**-11, 65520, 2.0**-25, 3 * 2.0**-25, np.nan], dtype=F)
    half = ref.round_to(y, "float16")
    assert half[:4].tolist() == [1, np.inf, 0, 2.0**-23] and np.isnan(half[4])
    assert np.isnan(ref.round_to(np.array([0x7FFFFFFF], dtype=np.uint32).view(F), "bfloat16"))


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_whole_is_close_to_floats(symmetric):
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((9, 64)).astype(F), rng.standard_normal((7, 64)).astype(F)
    q, scale = ref.quantize_weight(w)
    y = ref.linear_dynamic(x, q, scale, None, symmetric=symmetric)
    assert np.abs(y - x @ w.T).max() < 0.03 * np.abs(x @ w.T).max()
    assert y.dtype == F
