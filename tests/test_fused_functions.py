"""Which norms are recognized, whatever their class is, and which are not."""

import pytest
import torch
from fused import Counting
from torch import nn
from torch.testing import assert_close

from dynquant.fused.classes import swap_class
from dynquant.fused.functions import FusedNorm, norm_of


class OwnNorm(nn.Module):
    """A norm written out, as models have them."""

    def __init__(self, size, center, bias, plus=0.0):
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(size) / 4)
        self.bias = nn.Parameter(torch.randn(size)) if bias else None
        self.variance_epsilon, self._center, self._plus = 1e-6, center, plus

    def forward(self, x):
        wide = x.float()
        if self._center:
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide / (wide.square().mean(-1, keepdim=True) + self.variance_epsilon).sqrt()
        y = wide.to(x.dtype) * (self._plus + self.weight)
        return y if self.bias is None else y + self.bias


class Wide(nn.LayerNorm):
    """The same in fp32."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


@pytest.mark.parametrize("size", [2, 4, 8, 48, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [0.1, 1.0, 30.0])
def test_by_what_they_compute(size, dtype, factor):
    def name(**kind):
        module = OwnNorm(size, **kind).to(dtype)
        module.weight.data *= factor
        return norm_of(module)

    assert name(center=True, bias=True) == "layer"
    assert name(center=True, bias=False) == "layer"
    assert name(center=False, bias=False) == "rms"
    assert name(center=False, bias=True) is None
    assert name(center=False, bias=False, plus=1.0) == "rms_plus_one"
    assert name(center=True, bias=True, plus=1.0) is None
    if factor <= 1 or dtype == torch.float32:
        assert name(center=False, bias=False, plus=0.2) is None


def test_by_type():
    assert (
        norm_of(nn.LayerNorm(1)) == norm_of(Wide(8)) == norm_of(nn.LayerNorm(8).half()) == "layer"
    )
    assert norm_of(nn.RMSNorm(8)) == norm_of(nn.RMSNorm(1)) == "rms"
    assert norm_of(nn.Identity()) == ""


class Unweighted(nn.Module):
    """An RMS norm of groups of values, or of all, without a weight."""

    def __init__(self, eps=1e-6, group=None, factor=1.0):
        super().__init__()
        self.eps, self._group, self._factor = eps, group, factor

    def forward(self, x):
        groups = x.unflatten(-1, (-1, self._group or x.shape[-1]))
        y = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return self._factor * y.flatten(-2)


class Widening(Unweighted):
    """The same whose result is in fp32 in any case."""

    def forward(self, x):
        return super().forward(x.float())


def test_without_a_weight():
    assert norm_of(Unweighted()) == norm_of(Unweighted(0.5)) == "rms"
    others = Unweighted(group=8), Unweighted(factor=1.1), Widening(), nn.CosineSimilarity()
    for module in (*others, nn.InstanceNorm1d(4), nn.GroupNorm(2, 4, affine=False)):
        assert norm_of(module) is None
    x = torch.randn(2, 3, 5)
    module = Unweighted(0.01).eval()
    expected = module(x)
    swap_class(module, FusedNorm, "rms")
    with Counting() as counting:
        assert_close(module(x), expected)
    assert counting.found["rms_norm"] == 1


@pytest.mark.parametrize("center", [True, False])
def test_weights_that_show_nothing(center):
    """Of zeros, every norm makes the same; and one weight may be for any number of values."""
    nothing = OwnNorm(8, center, bias=center)
    nothing.weight.data.zero_()
    assert norm_of(nothing) is None
    assert norm_of(OwnNorm(1, center, bias=False)) is None


def test_hooks_do_not_see_it():
    module, seen = OwnNorm(8, center=True, bias=True), []
    module.register_forward_hook(lambda *given: seen.append(given))
    assert norm_of(module) == "layer" and not seen


@pytest.mark.parametrize("size", [4, 5, 8])
def test_norms_of_channels_are_others(size):
    """In two dimensions, that of a single group is a layer norm."""
    for module in (
        nn.GroupNorm(1, size),
        nn.BatchNorm1d(size),
        nn.BatchNorm1d(size, track_running_stats=False),
        nn.InstanceNorm1d(size, affine=True),
    ):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        assert norm_of(module) is None
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name])


def test_what_is_no_norm():
    for module in (nn.Linear(8, 8), nn.PReLU(8), nn.LayerNorm((2, 8)), nn.Embedding(8, 8)):
        assert norm_of(module) is None
