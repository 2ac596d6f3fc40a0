"""Blocks that call their activation by a name of their own file."""

import math
import pickle
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same
from fused import IDS, MASK, TEXT, fused, ops_of, randomized, seen_one_by_one, small
from torch import nn

import dynquant
from dynquant.fused import Adapter, FeedForward, LinearBlock, register


def gelu(x):
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def cube(x):
    return x**3


class Intermediate(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(16, 24)

    def forward(self, x):
        return gelu(self.dense(x))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Unknown(Intermediate):
    def forward(self, x):
        return cube(self.dense(x))


class WithMore(Intermediate):
    def forward(self, x):
        return F.gelu(self.dense(x), approximate="tanh")


class InAMethod(Intermediate):
    def forward(self, x):
        return self.act(self.dense(x))

    def act(self, x):
        return gelu(x)


class Wrapped(Intermediate):
    @torch.no_grad()
    def forward(self, x):
        return gelu(self.dense(x))


class Super(Intermediate):
    """Its forward closes over its class."""

    def forward(self, x):
        assert isinstance(super(), Intermediate | super)
        return gelu(self.dense(x))


_GATED = FeedForward(up="w3", gate="w1", activation=":F.silu", down="w2")
register(Intermediate, Adapter(("x",), linear_block=LinearBlock("dense", ":gelu")))
register(Gated, Adapter(("x",), feed_forward=_GATED))
for _kind, _name in (
    (Unknown, ":cube"),
    (WithMore, ":F.gelu"),
    (InAMethod, ":gelu"),
    (Wrapped, ":gelu"),
    (Super, ":gelu"),
):
    register(_kind, Adapter(("x",), linear_block=LinearBlock("dense", _name)))
X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[Intermediate, Gated, Super])
def block(request):
    return fused(nn.Sequential(request.param()))[1]


@torch.no_grad()
def test_runs_as_one_op(block):
    assert dynquant.fused_blocks(block) == {"0": ""}
    assert sum(ops_of(block, input=X).values()) == 1


@torch.no_grad()
def test_has_the_same_bits_where_a_hook_keeps_it_from_that(block):
    expected, seen = block(X), []
    for module in block[0].children():
        handle = module.register_forward_hook(lambda *call: seen.append(call))
        assert_same(block(X), expected)
        handle.remove()
    assert len(seen) == len(list(block[0].children()))
    assert_same(seen_one_by_one(block)(X), expected)


def test_gradients_and_autocast_are_those_of_the_function(block):
    x = X.clone().requires_grad_()
    block(x).sum().backward()
    assert x.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert block(X).dtype == torch.bfloat16


@torch.no_grad()
def test_the_class_keeps_its_function(block):
    plain = type(block[0])._base()
    assert plain.forward.__globals__ is globals() and gelu(torch.ones(1)) != 1
    assert_same(randomized(nn.Sequential(plain))(X), randomized(nn.Sequential(plain))(X))


@torch.no_grad()
def test_compiled(block):
    expected = block(X)
    assert_same(torch.compile(block, backend="aot_eager", fullgraph=True)(X), expected)
    next(block[0].children()).register_forward_hook(lambda *call: None)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager")
    torch.testing.assert_close(compiled(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_compiled_with_a_gradient(block, training):
    """Also where nothing was called before."""
    again = pickle.loads(pickle.dumps(block)).train(training)
    x = X.clone().requires_grad_()
    compiled = torch.compile(again, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.export.export(again, (X,), strict=True).module()(X), block(X), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Unknown, ":cube is not a known activation"),
        (WithMore, ":F.gelu is called with more than x"),
        (InAMethod, ":gelu is not a known activation"),
        (Wrapped, ":gelu is not a known activation"),
    ],
)
def test_what_is_left_alone(kind, reason):
    quantized = dynquant.quantize_dynamic(nn.Sequential(kind()).eval())
    with pytest.warns(UserWarning, match=f"0: {reason}"):
        model = dynquant.fuse(quantized)
    assert_same(model(X), quantized(X))


def test_an_inherited_forward_calls_what_its_own_file_has(monkeypatch):
    namespace = {"__name__": "of_another_file", "Intermediate": Intermediate, "gelu": cube}
    exec("class Derived(Intermediate): pass", namespace)
    monkeypatch.setitem(sys.modules, "of_another_file", SimpleNamespace(**namespace))
    derived = namespace["Derived"]
    register(derived, Adapter(("x",), linear_block=LinearBlock("dense", ":gelu")))
    quantized, model = fused(nn.Sequential(derived()))
    torch.testing.assert_close(model(X), quantized(X), rtol=1e-5, atol=1e-5)


def test_inline_goes_with_attributes():
    names = FeedForward("up", "down", ":gelu")
    with pytest.raises(ValueError, match="inline: its activation is an attribute"):
        Adapter(("x",), feed_forward=names, inline=True)


class TestEsm:
    pytest.importorskip("transformers", reason="transformers is not installed")
    MODEL = {**TEXT, "position_embedding_type": "rotary", "token_dropout": False}

    @torch.no_grad()
    def test_has_the_same_bits_where_hooks_see_its_parts(self):
        _, model = fused(small("Esm", self.MODEL))
        expected = model(IDS, MASK).last_hidden_state
        for name in ("attention.output", "intermediate", "intermediate.dense", "output"):
            handle = (
                model.encoder.layer[0].get_submodule(name).register_forward_hook(lambda *_: None)
            )
            assert_same(model(IDS, MASK).last_hidden_state, expected)
            handle.remove()

    def test_positions_of_other_kinds_are_left_alone(self):
        model = small("Esm", {**self.MODEL, "position_embedding_type": "absolute"})
        quantized = dynquant.quantize_dynamic(randomized(model))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = dynquant.fuse(quantized)
        with torch.no_grad():
            found = model(IDS, MASK).last_hidden_state
            expected = quantized(IDS, MASK).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
