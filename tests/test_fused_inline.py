"""Layers that run their own forward, in which the feed-forward block is one op."""

import copy
import pickle
import threading

import pytest
import torch
from compare import assert_same, assert_same_state
from fused import decibels, fused, ops_of
from torch import nn

import dynquant
from dynquant.fused import Adapter, Attention, FeedForward, register

NAMES = FeedForward(up="fc1", activation="act", down="fc2")


class Layer(nn.Module):
    """Something, and then a feed-forward block between the lines."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm = nn.Linear(48, 48), nn.LayerNorm(48)
        self.fc1, self.fc2 = nn.Linear(48, 80), nn.Linear(80, 48)
        self.act = nn.GELU()
        self.calls = 0

    def forward(self, x, cache=None):
        self.calls += 1
        x = x + self.mix(x)
        if cache is not None:
            cache.append(x)
        h = self.act(self.fc1(self.norm(x)))
        h = nn.functional.dropout(h, p=0.5, training=self.training)
        return x + self.fc2(h)


class Twice(Layer):
    """It calls the activation once more than it should."""

    def forward(self, x):
        return x + self.fc2(self.act(self.act(self.fc1(x))))


@pytest.fixture(autouse=True, scope="module")
def adapters():
    for kind in (Layer, Twice):
        register(kind, Adapter(("x",), feed_forward=NAMES, inline=True))


@pytest.fixture
def made():
    return fused(nn.Sequential(Layer(), Layer()))


X = torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def run(model):
    return model(X)


def test_runs_as_one_op(made):
    quantized, model = made
    assert dynquant.fused_blocks(model) == {"0": "", "1": ""}
    assert ops_of(model, input=X)["feed_forward"] == 2
    assert decibels(run(model), run(quantized)) > 60


def test_the_rest_of_forward_is_its_own(made):
    _, model = made
    cache, calls = [], model[0].calls
    with torch.no_grad():
        model[0](X, cache=cache)
    assert len(cache) == 1 and model[0].calls == calls + 1


def test_names_and_state_stay(made):
    quantized, model = made
    assert_same_state(model.state_dict(), quantized.state_dict())
    assert type(model[0].fc1) is dynquant.nn.Linear
    assert model.get_submodule("0.fc2") is model[0]._modules["fc2"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(made, copied):
    _, model = made
    other = copied(model)
    assert ops_of(other, input=X)["feed_forward"] == 2
    assert_same(run(other), run(model))


@pytest.mark.parametrize("name", ["fc1", "act", "fc2", "mix"])
def test_a_hook_is_called_and_changes_no_bit(made, name):
    _, model = made
    before, seen = run(model), []
    handle = getattr(model[0], name).register_forward_hook(lambda *given: seen.append(1))
    assert_same(run(model), before)
    assert seen and "has hooks" in dynquant.fused_blocks(model)["0"]
    handle.remove()
    assert ops_of(model, input=X)["feed_forward"] == 2


def test_a_replaced_layer_is_called(made):
    _, model = made
    model[0].fc2 = nn.Linear(80, 48)
    expected = model[0]._base.forward(model[0], X)
    assert "fc2 is of type Linear" in dynquant.fused_blocks(model)["0"]
    assert_same(model[0](X), expected)


def test_gradients(made):
    quantized, model = made
    found, expected = X.clone().requires_grad_(), X.clone().requires_grad_()
    model(found).square().sum().backward()
    quantized(expected).square().sum().backward()
    assert_same(found.grad, expected.grad)


def test_training_drops(made):
    _, model = made
    model[0].train()
    assert "training" in dynquant.fused_blocks(model)["0"]
    assert not torch.equal(run(model), run(model))


def test_threads_do_not_see_each_other(made):
    """One with gradients, whose layers are called one by one, beside one without."""
    _, model = made
    expected, failures = run(model), []

    def work(wants_gradient):
        for _ in range(50):
            with torch.set_grad_enabled(wants_gradient):
                found = model(X.clone().requires_grad_(wants_gradient))
            if not torch.allclose(found, expected, atol=1e-5):
                failures.append(found)

    threads = [threading.Thread(target=work, args=(each,)) for each in (True, False, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_compiled(made):
    _, model = made
    compiled = torch.compile(model, backend="aot_eager")
    assert decibels(run(compiled), run(model)) > 60


def test_one_that_is_another_is_left_alone():
    quantized = dynquant.quantize_dynamic(nn.Sequential(Twice()).eval())
    with pytest.warns(UserWarning, match="0: differs"):
        model = dynquant.fuse(quantized)
    assert_same(run(model), run(quantized))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feed_forward": NAMES, "residual": True}, "without norm and residual"),
        (
            {"feed_forward": FeedForward("a", "b", "c", result_norm="d"), "norm_first": True},
            "without norm and residual",
        ),
        ({"attention": Attention("q", "k", "v", "d")}, "goes with feed_forward alone"),
        ({"feed_forward": FeedForward("a.b", "c", "d")}, "attributes of the block itself"),
        ({"feed_forward": FeedForward("a", "b", "c", gate="d")}, "attributes of the block itself"),
    ],
)
def test_wrong_adapters(options, message):
    with pytest.raises(ValueError, match=message):
        Adapter(("x",), inline=True, **options)
