"""Blocks with a norm before and one behind what they add to their input, in whole sequences."""

import pytest
import torch
from compare import assert_same
from fused import decibels, randomized
from torch import nn

import dynquant
from dynquant.fused import Adapter, Attention, FeedForward, register

X = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))


class Attending(nn.Module):
    def __init__(self, norm):
        super().__init__()
        for name in ("q", "k", "v", "o"):
            self.add_module(name, nn.Linear(24, 24))
        self.before = nn.RMSNorm(24, 1e-6) if norm else None
        self.behind, self.size = nn.LayerNorm(24), 12

    def forward(self, x, mask=None):
        y = x if self.before is None else self.before(x)
        heads = (
            each(y).unflatten(-1, (-1, 12)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        y = nn.functional.scaled_dot_product_attention(*heads, mask)
        return x + self.behind(self.o(y.transpose(1, 2).flatten(2)))


class Feeding(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 24)
        self.before = nn.LayerNorm(24) if norm else None
        self.behind = nn.RMSNorm(24, 1e-6)

    def forward(self, x):
        y = x if self.before is None else self.before(x)
        return x + self.behind(self.down(self.act(self.up(y))))


def adapter(kind, norm):
    norms = {"norm": "before" if norm else None, "result_norm": "behind"}
    if kind is Feeding:
        parts = {"feed_forward": FeedForward("up", "down", "act", **norms)}
    else:
        parts = {"attention": Attention("q", "k", "v", "size", "o", **norms), "mask": "mask"}
    arguments = ("x", "mask") if kind is Attending else ("x",)
    return Adapter(arguments, residual=True, norm_first=True, **parts)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", [Attending, Feeding])
@torch.no_grad()
def test_blocks(kind, norm):
    register(kind, adapter(kind, norm), replace=True)
    quantized = dynquant.quantize_dynamic(randomized(nn.Sequential(kind(norm))).eval())
    model = dynquant.fuse(quantized, attention="float")
    assert dynquant.fused_blocks(model) == {"0": ""}
    found = model(X)
    assert decibels(found, quantized(X)) > 50
    first = model[0].q if kind is Attending else model[0].up
    first.register_forward_hook(lambda *seen: None)
    assert decibels(model(X), found) > 50
    model[0].behind.weight.mul_(2)
    quantized[0].behind.weight.mul_(2)
    assert decibels(model(X), quantized(X)) > 50


@pytest.mark.parametrize("norm_first", [False, "first"])
def test_it_goes_with_norm_first(norm_first):
    names = FeedForward("up", "down", "act", result_norm="behind")
    with pytest.raises(ValueError, match="it goes with norm_first=True"):
        Adapter(("x",), feed_forward=names, residual=True, norm_first=norm_first)


def test_the_same_block_by_its_parts():
    """What the op gives is the sum of the input and the norm of what the block gives."""
    register(Feeding, adapter(Feeding, True), replace=True)
    model = dynquant.quantize_dynamic(randomized(nn.Sequential(Feeding(True))).eval(), fuse=True)
    block, ops = model[0], torch.ops.dynquant
    with torch.inference_mode():
        y = ops.layer_norm(X, block.before.weight, block.before.bias, block.before.eps)
        y = block.down(ops.activation(block.up(y), 3))
        assert_same(model(X), X + ops.rms_norm(y, block.behind.weight, 1e-6))
