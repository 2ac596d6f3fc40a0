"""Which classes are known by another one's name: those that run its code."""

import copy
import functools
import logging
import sys

import pytest
import torch
from compare import assert_same
from fused import TEXT, decibels, fused, ops_of, randomized, small
from torch import nn

import dynquant
from dynquant.fused import Adapter, FeedForward, register
from dynquant.fused.adapters import registered
from dynquant.fused.alike import runs_the_same
from dynquant.fused.known import known_as, stranger_in

logger = logging.getLogger(__name__)
NAMES = FeedForward(up="first", activation="act", down="second", norm="norm")


def halved(x):
    return x / 2


def doubled(x):
    return x * 2


def same_halved(x):
    return x / 2


class Block(nn.Module):
    """What the others are copies of."""

    def __init__(self, features=48):
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.first, self.second = nn.Linear(features, 80), nn.Linear(80, features)
        self.act = nn.SiLU()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        """With its own words."""
        return x + self.dropout(self.second(self.act(self.first(self.norm(x)))))


class Copied(Block):
    """Its own function, with the same code."""

    def forward(self, x):
        return x + self.dropout(self.second(self.act(self.first(self.norm(x)))))


class Derived(Block):
    pass


class Other(Block):
    def forward(self, x):
        return x - self.dropout(self.second(self.act(self.first(self.norm(x)))))


class OtherCall(Block):
    def __call__(self, x):
        return super().__call__(x) + 1


@pytest.fixture(autouse=True, scope="module")
def adapter():
    register(Block, Adapter(("x",), feed_forward=NAMES, residual=True, norm_first=True))


def made(forward, **more):
    """A class with that forward."""
    return type("Made", (nn.Module,), {"forward": forward, **more})


def wrapped(forward, added):
    @functools.wraps(forward)
    def inner(self, x):
        return forward(self, x) + added

    return inner


class TestRunsTheSame:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (lambda s, x: x + 1, lambda s, x: x + 1),
            (lambda s, x: [y for y in x], lambda s, x: [y for y in x]),
            (lambda s, x, a=2: x + a, lambda s, x, a=2: x + a),
            (lambda s, x: halved(x), lambda s, x: halved(x)),
            (wrapped(lambda s, x: x, 1), wrapped(lambda s, x: x, 1)),
        ],
    )
    def test_the_same(self, one, other):
        assert runs_the_same(made(one), made(other))

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (lambda s, x: x + 1, lambda s, x: x + 2),
            (lambda s, x: x + 1, lambda s, x: x + 1.0),
            (lambda s, x: x + 1, lambda s, y: y + 1),
            (lambda s, x: x + 1, lambda s, x, *more: x + 1),
            (lambda s, x: [y + 1 for y in x], lambda s, x: [y + 2 for y in x]),
            (lambda s, x, a=2: x + a, lambda s, x, a=3: x + a),
            (lambda s, x, *, a=2: x + a, lambda s, x, *, a=3: x + a),
            (lambda s, x: halved(x), lambda s, x: doubled(x)),
            (lambda s, x: s.first(x), lambda s, x: s.second(x)),
            (wrapped(lambda s, x: x, 1), wrapped(lambda s, x: x, 2)),
            (wrapped(lambda s, x: x, 1), wrapped(lambda s, x: x * x, 1)),
            (wrapped(lambda s, x: x, torch.ones(2)), wrapped(lambda s, x: x, torch.ones(2))),
            (lambda s, x: x, print),
        ],
    )
    def test_others(self, one, other):
        assert not runs_the_same(made(one), made(other))

    def test_functions_of_the_modules(self):
        """Each function has the globals of its own library."""

        def of_library(**names):
            space = {"logger": logging.getLogger("its own"), **names}
            exec("def forward(self, x):\n    logger.info('')\n    return helper(x)", space)
            return made(space["forward"])

        one = of_library(helper=halved)
        assert runs_the_same(one, of_library(helper=same_halved))
        assert not runs_the_same(one, of_library(helper=doubled))
        assert not runs_the_same(one, of_library(helper=3))
        assert not runs_the_same(one, of_library())

    def test_methods_and_values_of_the_class(self):
        def forward(self, x):
            return self.inner(x) * self.factor

        one = made(forward, inner=lambda s, x: halved(x), factor=2)
        assert runs_the_same(one, made(forward, inner=lambda s, x: halved(x), factor=2))
        assert not runs_the_same(one, made(forward, inner=lambda s, x: doubled(x), factor=2))
        assert not runs_the_same(one, made(forward, inner=lambda s, x: halved(x), factor=3))
        assert not runs_the_same(one, made(forward, factor=2))

    def test_what_nn_module_has(self):
        """A method of nn.Module counts where a class has its own."""

        def forward(self, x):
            return x if self.extra_repr() else -x

        one = made(forward)
        assert runs_the_same(one, made(forward))
        assert not runs_the_same(one, made(forward, extra_repr=lambda self: "more"))

    def test_an_empty_cell(self):
        def of(empty):
            def forward(self, x):
                return later(x)

            if not empty:
                later = halved  # noqa: F841
            return made(forward)

        assert runs_the_same(of(True), of(True))
        assert not runs_the_same(of(True), of(False))

    def test_what_super_means(self):
        def above(added):
            return made(lambda s, x: x + added)

        def below(base):
            class Made(base):
                def forward(self, x):
                    return super().forward(x)

            return Made

        base = above(1)
        assert runs_the_same(below(base), below(base))
        assert not runs_the_same(below(base), below(above(2)))

    def test_functions_that_call_each_other(self):
        def of_library():
            space = {}
            exec("def even(x):\n    return x == 0 or odd(x - 1)", space)
            exec("def odd(x):\n    return x != 0 and even(x - 1)", space)
            exec("def forward(self, x):\n    return even(x)", space)
            return made(space["forward"])

        assert runs_the_same(of_library(), of_library())


class TestKnownAs:
    def test_copies(self):
        name = f"{__name__}.Block"
        assert [known_as(kind()) for kind in (Block, Copied, Derived)] == [name] * 3

    @pytest.mark.parametrize("kind", [Other, OtherCall, nn.Sequential, nn.Linear])
    def test_others(self, kind):
        assert known_as(kind(2, 3) if kind is nn.Linear else kind()) is None

    def test_what_is_inside(self):
        block = Copied()
        block.dropout = nn.Identity()
        assert known_as(block) is not None
        block.dropout = nn.Tanh()
        assert known_as(block) is None
        del block.dropout
        assert known_as(block) is not None  # its forward fails, which is seen where it is fused
        del block.norm
        assert known_as(block) is None

    def test_a_copy_runs_fused(self):
        quantized, model = fused(nn.Sequential(Copied(), Derived(), Other()))
        assert dynquant.fused_blocks(model) == {"0": "", "1": ""}
        x = torch.randn(2, 5, 48)
        assert ops_of(model, input=x)["feed_forward"] == 2
        with torch.no_grad():
            assert decibels(model(x), quantized(x)) > 35
            assert torch.equal(copy.deepcopy(model)(x), model(x))

    def test_a_copy_that_is_changed_says_so(self):
        _, model = fused(nn.Sequential(Copied()))
        model[0].dropout = nn.Tanh()
        assert "dropout" in dynquant.fused_blocks(model)["0"]
        x = torch.randn(2, 48)
        assert torch.equal(model(x), model[0]._base.forward(model[0], x))

    def test_a_library_that_is_not_there(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "transformers", raising=False)
        assert known_as(Other()) is None


class Strict(nn.Module):
    """A feed-forward block that is a few tokens' as it is known, and clamps what is large."""

    def __init__(self, block):
        super().__init__()
        self.__dict__.update(block.__dict__)

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-50, 50))


class TestStrangers:
    """Modules of another library inside a block whose class is known."""

    @pytest.fixture
    def llama(self):
        config = {**TEXT, "num_key_value_heads": 2, "head_dim": 12}
        return dynquant.quantize_dynamic(randomized(small("Llama", config)))

    def test_an_attention(self, llama):
        class Windowed(type(llama.layers[0].self_attn)):
            def forward(self, hidden_states, *args, attention_mask=None, **kwargs):
                seen = None if attention_mask is None else attention_mask.clone()
                if seen is not None:
                    seen[..., :-40] = False
                return super().forward(hidden_states, *args, attention_mask=seen, **kwargs)

        llama.layers[0].self_attn.__class__ = Windowed
        with pytest.warns(UserWarning, match=r"layers\.0: self_attn is of class .*Windowed"):
            model = dynquant.fuse(llama)
        found = dynquant.fused_blocks(model)
        assert found.pop("layers.0").startswith("self_attn is of class")
        assert found == {"layers.0.mlp": "", "layers.1": ""}

    def test_a_feed_forward_block(self, llama):
        llama.layers[1].mlp = Strict(llama.layers[1].mlp)
        with pytest.warns(UserWarning, match=r"layers\.1: mlp is of class .*Strict"):
            model = dynquant.fuse(llama)
        assert set(dynquant.fused_blocks(model)) == {"layers.0", "layers.1", "layers.1.self_attn"}
        x = 400 * torch.randn(1, 5, 48)
        with torch.no_grad():
            assert_same(model.layers[1].mlp(x), llama.layers[1].mlp(x))

    def test_what_is_known_itself(self, llama):
        layer = llama.layers[0]
        names = FeedForward("up_proj", "down_proj", "act_fn", gate="gate_proj")
        register(Strict, Adapter(arguments=("x",), feed_forward=names), replace=True)
        try:
            layer.mlp = Strict(layer.mlp)
            assert not stranger_in(layer, registered()[known_as(layer)])
        finally:
            del registered()[f"{__name__}.Strict"]
