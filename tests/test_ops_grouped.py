"""linear_grouped: the bits of the reference for each group of rows."""

import numpy as np
import pytest
import reference as ref
import torch
from compare import assert_same, widened
from drawn import DTYPES, LAYOUTS, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from op_arguments import GROUPED, call, valid_grouped_arguments
from test_ops_blocks import threads  # noqa: F401

OPS = torch.ops.dynquant
HALVES = (torch.bfloat16, torch.float16)
FORMS = ("per_channel", "per_tensor", "half")
KINDS = (("normal",), ("normal", "small", "zero", "any magnitude", "NaN"))


def some(rng, values):
    return values[int(rng.integers(len(values)))]


def weights(rng, form, groups, n, k):
    """What the op takes as weight and weight_scale, and the same as the reference takes it."""
    if form == "half":
        values = rows_of(rng, groups * n, k, ("normal", "small")).reshape(groups, n, k)
        weight = values.to(some(rng, HALVES))
        return weight, None, widened(weight), None
    weight = torch.from_numpy(rng.integers(-128, 128, (groups, n, k), dtype=np.int8))
    columns = n if form == "per_channel" else 1
    scale = torch.from_numpy(rng.uniform(1e-3, 1e-2, (groups, columns)).astype(np.float32))
    size = OPS.pack_weight(torch.zeros(n, k, dtype=torch.int8)).numel()
    beyond = int(rng.integers(3)) * 13  # what lies there is not looked at
    packed = torch.full((groups, size + beyond), 77, dtype=torch.int8)
    for row, one in zip(packed, weight, strict=True):
        row[:size] = OPS.pack_weight(one)
    return packed, scale, weight.numpy(), scale.numpy()


def expected(x, counts, weight, scale, bias, schemes):
    dtype, rows = str(x.dtype).removeprefix("torch."), widened(x)
    y, first = np.zeros((len(x), weight.shape[1]), np.float32), 0
    for group, count in enumerate(counts.tolist()):
        own, to = rows[first : first + count], y[first : first + count]
        added = None if bias is None else widened(bias[group])
        if scale is None:
            to[:] = ref.linear_half(own, weight[group], added, dtype)
        else:
            per_token, symmetric, bits = schemes
            given = own, weight[group], scale[group], added, per_token, symmetric
            to[:] = ref.linear_dynamic(*given, dtype, bits)
        first += count
    return y


@settings(max_examples=120)
@given(seed=st.integers(0, 2**32 - 1))
def test_is_the_specification(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    groups, n = int(rng.integers(6)), some(rng, [0, 1, 7, 16, 63, 64, 65, 130])
    k, dtype = some(rng, [0, 1, 4, 15, 64, 65, 257]), some(rng, DTYPES)
    counts = torch.from_numpy(rng.integers(0, some(rng, [2, 9, 60]), groups))
    beyond = int(rng.integers(3))  # rows that belong to no group
    layout = LAYOUTS[some(rng, list(LAYOUTS))]
    x = layout(rows_of(rng, int(counts.sum()) + beyond, k, some(rng, KINDS)).to(dtype))
    weight, scale, *of_reference = weights(rng, some(rng, FORMS), groups, n, k)
    bias = None
    if rng.random() < 0.7:
        bias = rows_of(rng, groups, n, ("normal",)).to(some(rng, DTYPES))
    symmetric = bool(rng.integers(2))
    schemes = bool(rng.integers(2)), symmetric, 8 if symmetric else some(rng, [8, 16])
    y = OPS.linear_grouped(x, counts, weight, scale, bias, n, *schemes)
    assert y.dtype == dtype and y.is_contiguous()
    assert_same(y, expected(x, counts, *of_reference, bias, schemes))


@pytest.mark.parametrize("form", FORMS)
def test_layouts_of_the_other_arguments(form):
    rng = np.random.default_rng(0)
    x, counts = torch.randn(11, 12), torch.tensor([3, 0, 5, 1])
    weight, scale, *_ = weights(rng, form, len(counts), 7, 12)
    bias = torch.randn(len(counts), 7)
    y = OPS.linear_grouped(x, counts, weight, scale, bias, 7)
    for layout in ("offset", "transposed", "every third value", "every second row", "padded rows"):
        spread = LAYOUTS[layout]
        others = [None if one is None else spread(one) for one in (weight, scale, bias)]
        assert_same(OPS.linear_grouped(x, spread(counts), *others, 7), y, layout)


def test_one_weight_for_every_group():
    x, counts = torch.randn(9, 12), torch.tensor([4, 5])
    q, scale = OPS.quantize_weight(torch.randn(7, 12))
    packed = OPS.pack_weight(q)
    y = OPS.linear_grouped(x, counts, packed.expand(2, -1), scale.expand(2, -1), None, 7)
    assert_same(y, OPS.linear_dynamic(x, packed, scale))


def test_opcheck_of_weights_in_16_bits():
    values = valid_grouped_arguments(half=True)
    given = tuple(values[argument] for argument in GROUPED["linear_grouped"])
    torch.library.opcheck(OPS.linear_grouped.default, given)


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert call("linear_grouped", valid_grouped_arguments()).dtype == torch.bfloat16


def wrong_arguments(half):
    """(argument, a value that it must not have, text)."""
    valid = valid_grouped_arguments(half=half)
    x, counts, weight, scale, bias = (
        valid[name] for name in ("x", "counts", "weight", "weight_scale", "bias")
    )
    yield "x", x.double(), "x must have dtype"
    yield "x", x[0], "x must have two dimensions"
    yield "x", x[None], "x must have two dimensions"
    yield "x", x[:, 1:], "weight" if half else "weight of group|weight must"
    yield "counts", counts.int(), "counts must have dtype"
    yield "counts", counts[None], "counts must have one dimension"
    yield "counts", counts + 5, "counts must add up to at most M"
    yield "counts", counts - 2, "counts must not be negative"
    yield "counts", torch.tensor([1 << 62, 1 << 62, 1 << 62]), "counts must add up"
    yield "counts", counts[:2], "weight must have the shape"
    yield "weight", weight.float(), "weight must have dtype"
    yield "weight", weight[:2], "weight must have the shape"
    yield "weight", weight[0], "weight must have the shape"
    yield "weight", weight[..., 1:], "weight must have the shape"
    yield "bias", bias.double(), "bias must have dtype"
    yield "bias", bias[:2], "bias must have the shape"
    yield "bias", bias[:, 1:], "bias must have the shape"
    for n in (-1, 4, 6, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63)):
        yield "n", n, r"\bn\b|weight"
    yield "activation_bits", 4, "activation_bits must be 8 or 16"
    for name in ("x", "counts", "weight", "bias"):
        yield name, valid[name].to_sparse(), "(?i)sparse"
        yield name, valid[name].to("meta"), "device|meta|Meta|cpu|CPU"
    if half:
        yield "weight", weight[..., None], "weight must have the shape"
        return
    yield "weight_scale", scale.double(), "weight_scale must have dtype"
    yield "weight_scale", scale[:2], "weight_scale must have the shape"
    yield "weight_scale", scale[:, 1:], "weight_scale must have the shape"
    yield "weight_scale", scale[0], "weight_scale must have the shape"
    yield "weight_scale", None, "weight must have dtype bfloat16, float16"


@pytest.mark.parametrize("half", [False, True])
def test_wrong_arguments(half):
    valid = valid_grouped_arguments(half=half)
    for argument, value, message in wrong_arguments(half):
        with pytest.raises((RuntimeError, NotImplementedError), match=message):
            call("linear_grouped", valid | {argument: value})


def test_packed_weights_that_lie():
    """The header of one group's weight speaks of another shape, layout or kind."""
    valid = valid_grouped_arguments()
    header = {0: "not a weight packed", 4: "layout version", 8: "does not fit its header"}
    for position, message in header.items():
        weight = valid["weight"].clone()
        weight[2, position] += 1
        with pytest.raises(RuntimeError, match=f"weight .*{message}"):
            call("linear_grouped", valid | {"weight": weight})
    weight = valid["weight"].clone()
    weight[2] = OPS.pack_weight(torch.zeros(5, 8, dtype=torch.int8))  # as many bytes as for K = 7
    with pytest.raises(RuntimeError, match="weight of group 2 has N = 5 and K = 8, but"):
        call("linear_grouped", valid | {"weight": weight})
