"""conv1d_dynamic: the bits of the reference, and of linear_dynamic on its windows."""

import numpy as np
import pytest
import reference as ref
import torch
from compare import assert_same, widened
from drawn import DTYPES, LAYOUTS, ROWS, WEIGHT_SCALES, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from op_arguments import CONVOLUTIONS, call, valid_convolution_arguments
from test_ops_blocks import drawn_scheme, threads  # noqa: F401
from torch import nn

OPS = torch.ops.dynquant
# Around the ends of groups of four, of vectors, and of the channels that are turned together.
CHANNELS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 64, 65)
# Some are longer than a block of rows.
LENGTHS = (1, 2, 3, 4, 5, 16, 17, 63, 65, 191, 193, 400)
KINDS = (("normal",), tuple(ROWS), ("normal", "small", "zero", "NaN"))
MOST_PRODUCTS = 1_000_000


def some(rng, values):
    return values[int(rng.integers(len(values)))]


def drawn_sizes(rng):
    """kernel_size, stride, padding_left, padding_right, dilation."""
    left, right = (some(rng, [0, 0, 1, 2, 7, 40]) for _ in range(2))
    return (
        some(rng, [1, 2, 3, 4, 7, 11]),
        some(rng, [1, 1, 2, 3, 5]),
        left,
        right,
        some(rng, [1, 1, 2, 3, 9, 50]),
    )


def packed_groups(weight, groups):
    """A row for each group that begins with its packed weight, and has more behind it."""
    rows = [OPS.pack_weight(one) for one in weight.chunk(groups)]
    longest = max(map(len, rows))
    return torch.stack([nn.functional.pad(one, (0, longest + 5 - len(one))) for one in rows])


def drawn(rng):
    """The arguments of a call, as the op takes them."""
    while True:
        sizes = kernel_size, stride, left, right, dilation = drawn_sizes(rng)
        batch, channels = some(rng, [0, 1, 2, 3]), some(rng, CHANNELS)
        length, n = some(rng, LENGTHS), some(rng, [0, 1, 15, 16, 17, 63, 64, 65, 130])
        if rng.random() < 0.2:  # short sequences, several of which are in a block
            batch, length = 13, dilation * kernel_size + int(rng.integers(-2, 3))
            length = max(1, length)
        rows = (length + left + right - dilation * (kernel_size - 1) - 1) // stride + 1
        if rows > 0 and batch * rows * n * channels * kernel_size <= MOST_PRODUCTS:
            break
    dtype = some(rng, DTYPES)
    x = rows_of(rng, batch * channels, length, some(rng, KINDS)).reshape(batch, channels, length)
    x = LAYOUTS[some(rng, list(LAYOUTS))](x.to(dtype))
    weight = torch.from_numpy(rng.integers(-127, 128, (n, kernel_size * channels), dtype=np.int8))
    scale = rng.uniform(0.5, 2, some(rng, [n, 1])) * some(rng, WEIGHT_SCALES)
    bias = rows_of(rng, 1, n, ("normal",))[0].to(some(rng, DTYPES))
    bias = None if rng.random() < 0.3 else bias
    return x, weight, torch.from_numpy(scale.astype(np.float32)), bias, sizes


@settings(max_examples=200)
@given(seed=st.integers(0, 2**32 - 1))
def test_is_the_specification(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    x, weight, scale, bias, sizes = drawn(rng)
    groups = some(rng, [None, None, None, 1, 2, 3, 5])
    if groups is None:
        packed = OPS.pack_weight(weight)
    else:  # whose ranges differ
        x = torch.cat([x * (1 + group) for group in range(groups)], 1)
        weight, scale = weight.repeat(groups, 1), scale.expand(len(weight)).repeat(groups)
        bias = None if bias is None else bias.repeat(groups)
        packed = packed_groups(weight, groups)
    per_token, symmetric, bits = drawn_scheme(rng)
    y = OPS.conv1d_dynamic(x, packed, scale, bias, *sizes, per_token, symmetric, bits)
    assert y.dtype == x.dtype and y.is_contiguous()
    added = None if bias is None else widened(bias)
    of_weight = weight.numpy(), scale.numpy(), added
    scheme = per_token, symmetric, str(x.dtype).removeprefix("torch."), bits
    assert_same(y, ref.conv1d_dynamic(widened(x), *of_weight, sizes, *scheme, groups or 1))


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_is_linear_dynamic_on_its_windows(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    x, weight, scale, bias, sizes = drawn(rng)
    _, *scheme = drawn_scheme(rng)
    packed = OPS.pack_weight(weight)
    rows = torch.from_numpy(ref.windows(widened(x), *sizes)).to(x.dtype)
    expected = OPS.linear_dynamic(rows, packed, scale, bias, True, *scheme).transpose(1, 2)
    assert_same(OPS.conv1d_dynamic(x, packed, scale, bias, *sizes, True, *scheme), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("channels", "n", "kernel_size", "stride", "padding", "dilation"),
    [(80, 64, 3, 1, 1, 1), (64, 80, 3, 2, 0, 1), (1, 32, 10, 5, 0, 1), (32, 32, 7, 1, 9, 3)],
)
def test_is_close_to_torch(
    channels, n, kernel_size, stride, padding, dilation, channels_last, dtype
):
    torch.manual_seed(0)
    conv = nn.Conv1d(channels, n, kernel_size, stride, padding, dilation)
    x = torch.randn(3, channels, 300).to(dtype)
    if channels_last:
        x = x.mT.contiguous().mT
    q, scale = OPS.quantize_weight(conv.weight.detach().transpose(1, 2).flatten(1))
    sizes = kernel_size, stride, padding, padding, dilation
    y = OPS.conv1d_dynamic(x, OPS.pack_weight(q), scale, conv.bias, *sizes)
    exact = conv.double()(x.double())
    error = (y - exact).square().sum() / exact.square().sum()
    assert y.shape == exact.shape and error < 1e-3


@pytest.mark.parametrize("beside", [-1, 0, 1])
def test_as_many_windows_as_positions_between_taps(beside, isa, threads):  # noqa: F811
    """A block takes in several such sequences, the last of them in part."""
    dilation, kernel_size = 70, 4
    windows = dilation + beside
    x = torch.randn(5, 8, windows + dilation * (kernel_size - 1))
    weight = torch.randint(-127, 128, (3, 8 * kernel_size), dtype=torch.int8)
    y = OPS.conv1d_dynamic(
        x, OPS.pack_weight(weight), torch.ones(1), None, kernel_size, 1, 0, 0, dilation
    )
    of_weight = weight.numpy(), np.ones(1, np.float32), None
    assert_same(y, ref.conv1d_dynamic(widened(x), *of_weight, (kernel_size, 1, 0, 0, dilation)))


def test_neither_padding_nor_the_batch_changes_a_bit():
    torch.manual_seed(0)
    packed = OPS.pack_weight(torch.randint(-127, 128, (20, 3 * 16), dtype=torch.int8))
    x = torch.randn(4, 16, 250)
    y = OPS.conv1d_dynamic(x, packed, torch.ones(1), None, 3, 1, 1, 1)
    for sequence, result in zip(x, y, strict=True):
        alone = OPS.conv1d_dynamic(sequence[None], packed, torch.ones(1), None, 3, 1, 1, 1)
        assert_same(alone[0], result)
    shorter = OPS.conv1d_dynamic(x[..., :100], packed, torch.ones(1), None, 3, 1, 1, 1)
    assert_same(shorter[..., :99], y[..., :99])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(3, 1, 1, 1, 1), (4, 3, 0, 2, 1), (2, 2, 5, 0, 3), (1, 1, 0, 0, 1)]
)
def test_gradient_of_the_input(sizes, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (6, sizes[0] * 5), generator=generator, dtype=torch.int8)
    scale = torch.rand(6, generator=generator) / 100
    x = torch.randn(2, 5, 17, generator=generator).to(dtype).requires_grad_()
    y = OPS.conv1d_dynamic(x, OPS.pack_weight(weight), scale, None, *sizes)
    grad_y = torch.randn(y.shape, generator=generator).to(dtype)
    (grad,) = torch.autograd.grad(y, x, grad_y)
    kernel_size, stride, left, right, dilation = sizes
    values = (weight * scale[:, None]).unflatten(1, (kernel_size, 5)).transpose(1, 2).double()
    wide = x.detach().double().requires_grad_()
    padded = nn.functional.pad(wide, (left, right))
    exact = nn.functional.conv1d(padded, values, None, stride, 0, dilation)
    (expected,) = torch.autograd.grad(exact, wide, grad_y.double())
    assert grad.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), expected, rtol=tolerance, atol=tolerance)


def test_gradient_of_the_input_of_groups():
    torch.manual_seed(0)
    conv = nn.Conv1d(6, 8, 3, 2, 1, groups=2)
    q, scale = OPS.quantize_weight(conv.weight.detach().transpose(1, 2).flatten(1))
    x = torch.randn(2, 6, 17, requires_grad=True)
    y = OPS.conv1d_dynamic(x, packed_groups(q, 2), scale, conv.bias, 3, 2, 1, 1)
    grad_y = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, grad_y)
    values = (q * scale[:, None]).unflatten(1, (3, 3)).transpose(1, 2)
    exact = nn.functional.conv1d(x, values, None, 2, 1, groups=2)
    torch.testing.assert_close(grad, torch.autograd.grad(exact, x, grad_y)[0])


def test_no_graph_where_none_is_asked_for():
    values = valid_convolution_arguments()
    arguments = [values[name] for name in CONVOLUTIONS["conv1d_dynamic"]]
    arguments[0] = arguments[0].requires_grad_()
    assert OPS.conv1d_dynamic(*arguments).requires_grad
    assert not OPS.conv1d_dynamic.inference(*arguments).requires_grad
    with torch.no_grad():
        assert not OPS.conv1d_dynamic(*arguments).requires_grad


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert call("conv1d_dynamic", valid_convolution_arguments()).dtype == torch.bfloat16


NUMBERS = ("kernel_size", "stride", "padding_left", "padding_right", "dilation")
WRONG = [
    ("x", torch.zeros(7, 9), r"x must have the shape \[B, C, L\], got \[7, 9\]"),
    ("x", torch.zeros(1, 2, 7, 9), r"x must have the shape \[B, C, L\]"),
    ("x", torch.zeros(2, 8, 9), r"x must have K / kernel_size channels, K = 21"),
    ("x", torch.zeros(2, 0, 9), r"x must have K / kernel_size channels"),
    ("x", torch.zeros(2, 7, 1), r"not be shorter, with its padding, than the kernel, 5 positions"),
    ("x", torch.zeros(2, 7, 9, dtype=torch.float64), "x must have dtype"),
    ("kernel_size", 4, "x must have K / kernel_size channels"),
    ("packed", torch.zeros(10, dtype=torch.int8), "packed"),
    ("weight_scale", torch.ones(4), "weight_scale"),
    ("bias", torch.ones(4), "bias"),
    ("activation_bits", 4, "activation_bits must be 8 or 16, got 4"),
    *(
        (name, value, f"{name} must lie in")
        for name in NUMBERS
        for value in (-1, -(1 << 63), 1 << 31, (1 << 63) - 1)
    ),
    *((name, 0, f"{name} must lie in") for name in ("kernel_size", "stride", "dilation")),
]


GROUPED = {
    "x": torch.zeros(2, 4, 9),
    "packed": packed_groups(torch.ones(8, 6, dtype=torch.int8), 2),
    "weight_scale": torch.ones(8),
    "bias": torch.ones(8),
}
WRONG_GROUPS = [
    ({"packed": torch.zeros(0, 64, dtype=torch.int8)}, "packed must have a row for each group"),
    ({"packed": torch.zeros(2, 2, 64, dtype=torch.int8)}, "packed must be the contiguous one-dim"),
    ({"packed": torch.zeros(2, 10, dtype=torch.int8)}, "packed is too small to be a packed weight"),
    ({"packed": GROUPED["packed"].mT.contiguous().mT}, "packed must have contiguous rows"),
    ({"packed": GROUPED["packed"][:, :-6]}, "packed has .* bytes, which does not fit its header"),
    (
        {"x": torch.zeros(2, 5, 9)},
        "x must have K / kernel_size channels in each of 2 groups, K = 6",
    ),
    ({"x": torch.zeros(2, 0, 9)}, "x must have K / kernel_size channels in each of 2 groups"),
    ({"x": torch.zeros(2, 8, 9)}, "x must have K / kernel_size channels in each of 2 groups"),
    ({"weight_scale": torch.ones(1)}, "weight_scale must have one value for each of the 8 columns"),
    ({"weight_scale": torch.ones(2, 4)}, "weight_scale must have one value for each of the 8"),
    ({"bias": torch.ones(7)}, "bias"),
    ({"kernel_size": 1 << 17}, "x must have K / kernel_size channels in each of 2 groups"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG_GROUPS)
def test_errors_of_groups(wrong, message):
    values = valid_convolution_arguments() | GROUPED
    assert call("conv1d_dynamic", values).shape == (2, 8, 4)
    with pytest.raises(RuntimeError, match=message):
        call("conv1d_dynamic", values | wrong)
    with pytest.raises(RuntimeError):
        on_meta = {
            name: value.to("meta") if isinstance(value, torch.Tensor) else value
            for name, value in (values | wrong).items()
        }
        call("conv1d_dynamic", on_meta)


def test_a_group_that_is_no_packed_weight():
    weight = torch.randint(-127, 128, (8, 6), dtype=torch.int8)
    packed = packed_groups(weight, 2)
    packed[1, 0] = 0
    with pytest.raises(RuntimeError, match="packed is not a weight packed by pack_weight"):
        OPS.conv1d_dynamic(torch.zeros(1, 4, 9), packed, torch.ones(8), None, 3)
    packed = packed_groups(weight, 2)
    other = OPS.pack_weight(torch.zeros(3, 4, dtype=torch.int8))
    packed[1, : len(other)] = other
    with pytest.raises(RuntimeError, match="packed must have groups of one size, got N = 3 and K"):
        OPS.conv1d_dynamic(torch.zeros(1, 4, 9), packed, torch.ones(8), None, 3)


@pytest.mark.parametrize(("argument", "value", "message"), WRONG)
def test_errors(argument, value, message):
    with pytest.raises(RuntimeError, match=message):
        call("conv1d_dynamic", valid_convolution_arguments() | {argument: value})


def test_great_numbers():
    """The greatest dilation and stride leave one window; the padding is as good as any other."""
    values = valid_convolution_arguments(k=2) | {"stride": (1 << 31) - 1, "dilation": 1}
    assert call("conv1d_dynamic", values).shape[-1] == 1
    values |= {"dilation": 1 << 20, "padding_left": 1 << 20, "padding_right": 1 << 20}
    y = call("conv1d_dynamic", values)
    # The tap in the middle sees x; those beside it see what is outside.
    assert y.shape[-1] == 1
    alone = dict(values)
    x = alone["x"]
    alone["x"] = torch.stack(
        [torch.zeros_like(x[..., 0]), x[..., 0], torch.zeros_like(x[..., 0])], -1
    )
    alone |= {"dilation": 1, "padding_left": 0, "padding_right": 0}
    assert_same(call("conv1d_dynamic", alone), y)
