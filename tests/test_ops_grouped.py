"""linear_grouped: equal to linear_dynamic and linear_half for each group."""

import pytest
import torch
from compare import assert_same

import dynquant  # noqa: F401

OPS = torch.ops.dynquant
COUNTS = torch.tensor([3, 0, 5, 1])
M, N, K = 11, 7, 12  # two rows belong to no group


def arguments(form, dtype=torch.float32, with_bias=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K, generator=generator).to(dtype)
    weights = torch.randn(len(COUNTS), N, K, generator=generator)
    bias = torch.randn(len(COUNTS), N, generator=generator) if with_bias else None
    if form == "half":
        return x, COUNTS, weights.to(torch.bfloat16), None, bias, N
    pairs = [OPS.quantize_weight(one, form == "per_channel") for one in weights]
    packed = torch.stack([OPS.pack_weight(one) for one, _ in pairs])
    packed = torch.nn.functional.pad(packed, (0, 13))  # what is beyond is not looked at
    return x, COUNTS, packed, torch.stack([scale for _, scale in pairs]), bias, N


def one_by_one(x, counts, weight, scale, bias, n, *scheme):
    y, first = x.new_zeros(len(x), n), 0
    size = OPS.pack_weight(torch.zeros(N, K, dtype=torch.int8)).numel()
    for group, count in enumerate(counts.tolist()):
        rows = x[first : first + count]
        own = None if bias is None else bias[group]
        if scale is None:
            y[first : first + count] = OPS.linear_half(rows, weight[group], own)
        else:
            packed = weight[group, :size].clone()
            y[first : first + count] = OPS.linear_dynamic(rows, packed, scale[group], own, *scheme)
        first += count
    return y


@pytest.mark.parametrize("form", ["per_channel", "per_tensor", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_each_group(form, dtype, with_bias):
    given = arguments(form, dtype, with_bias)
    for scheme in ((), (False, True), (True, False, 16)):
        y = OPS.linear_grouped(*given, *scheme)
        assert y.dtype == dtype
        assert_same(y, one_by_one(*given, *scheme))


@pytest.mark.parametrize("form", ["per_channel", "half"])
def test_opcheck(form):
    x, *others = arguments(form)
    torch.library.opcheck(OPS.linear_grouped.default, (x, *others))


def test_autocast():
    given = arguments("per_channel")
    with torch.autocast("cpu", torch.bfloat16):
        assert OPS.linear_grouped(*given).dtype == torch.bfloat16


def test_wrong_arguments():
    x, counts, *others = arguments("per_channel")
    wrong = {
        "weight must have the shape": (x, counts[:3], *others),
        "x must": (x.double(), counts, *others),
        "x must have two dimensions": (x[0], counts, *others),
        "counts must have": (x, counts.int(), *others),
        "counts must add up": (x, counts + 5, *others),
        "weight_scale must have": (x, counts, others[0], others[1][:, :3], *others[2:]),
        "bias must have": (x, counts, *others[:2], others[2][:, :3], others[3]),
    }
    for message, given in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            OPS.linear_grouped(*given)
    with pytest.raises(RuntimeError, match="counts must add up"):
        OPS.linear_grouped(x, counts - 2, *others)
