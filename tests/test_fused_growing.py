"""Caches that take in a token where their keys and values are."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from compare import assert_same
from fused import TEXT, fused, small
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dynquant.fused import growing
from dynquant.fused.growing import updated

SHAPE = 2, 3, 5, 4  # [batch, heads, tokens, features]
TOKEN = 2, 3, 1, 4


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(growing, "_LEAST", 0)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def plain(cache, key, value, index, rest):
    return cache.update(key, value, index, kwargs=rest)


def started(shape=SHAPE):
    cache = DynamicCache()
    cache.update(torch.randn(shape), torch.randn(shape), 0)
    return cache


def take(cache, count=1, update=updated, seed=0, shape=TOKEN):
    """What the last of that many updates by a token gives."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        given = None  # who holds it has memory of their own from then on
        key, value = (torch.randn(shape, generator=generator) for _ in range(2))
        given = update(cache, key, value, 0, {})
    return given


def grown(count=3, **more):
    """A cache that has room."""
    cache = started(**more)
    take(cache, count)
    return cache


def held(cache):
    return [cache.layers[0].keys, cache.layers[0].values]


def place(cache):
    return [one.data_ptr() for one in held(cache)]


def assert_each_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def assert_takes_as_ever(cache, count=3):
    """The cache gives and has what a plain one does, from here on."""
    other = copy.deepcopy(cache)
    assert_each_same(take(cache, count, seed=1), take(other, count, plain, seed=1))
    assert_each_same(held(cache), held(other))


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 90),
    features=st.integers(1, 9),
    more=st.integers(1, 150),
)
def test_the_same_as_copies(batch, heads, tokens, features, more):
    cache = started((batch, heads, tokens, features))
    other = copy.deepcopy(cache)
    shape = batch, heads, 1, features
    found, expected = (take(*of, shape=shape) for of in ((cache, more), (other, more, plain)))
    assert_each_same(found, expected)
    assert_each_same(held(cache), held(other))
    assert cache.get_seq_length() == tokens + more


def test_a_token_is_written_where_there_is_room():
    cache = started()
    places = [place(cache)]
    for _ in range(30):
        take(cache)
        places.append(place(cache))
    # The sixth by the cache itself, the seventh into memory for 7 + 7 // 4 + 16, the 25th in more.
    assert places[0] != places[1] != places[2]
    assert len({tuple(one) for one in places[2:20]}) == 1
    assert places[19] != places[20] == places[-1]


def test_few_are_copied(monkeypatch):
    monkeypatch.setattr(growing, "_LEAST", 10**6)
    cache = grown()
    before = place(cache)
    take(cache)
    assert place(cache) != before and all(one.is_contiguous() for one in held(cache))


HELD = {
    "them": lambda rows: rows,
    "a view": lambda rows: rows[:, :, :2],
    "a detached one": lambda rows: rows.detach(),
    "an array": lambda rows: rows.numpy(),
}


@pytest.mark.parametrize("what", HELD)
def test_what_others_hold_stays(what):
    """Whatever the cache's keys are changed to."""
    cache = grown()
    kept = [HELD[what](one) for one in held(cache)]
    expected = [torch.as_tensor(one).clone() for one in kept]
    take(cache)
    cache.layers[0].keys.mul_(2)
    cache.layers[0].values.mul_(2)
    take(cache, 5)
    assert_each_same(map(torch.as_tensor, kept), expected)
    del kept
    before = place(cache)
    take(cache)
    assert place(cache) == before


def test_what_is_behind_is_zero():
    cache = grown()
    for one in held(cache):
        everything = torch.as_strided(one, (one.untyped_storage().nbytes() // 4,), (1,))
        behind = everything.view(2, 3, -1, 4)[:, :, one.shape[2] :]
        assert behind.shape[2] > 0 and not behind.any()


def test_two_that_go_on_from_the_same():
    cache = grown()
    for copied in (copy.deepcopy, copy.copy, lambda one: pickle.loads(pickle.dumps(one))):
        other = copied(cache)
        other.layers = [copied(cache.layers[0])]
        expected = [one.clone() for one in held(cache)]
        assert_takes_as_ever(other)
        assert_each_same(held(cache), expected)
        assert_takes_as_ever(cache)


def test_one_that_goes_back():
    cache = grown()
    before = held(cache)
    take(cache, 2, seed=5)
    after = held(cache)
    expected = [one.clone() for one in after]
    cache.layers[0].keys, cache.layers[0].values = before
    assert_takes_as_ever(cache)
    assert_each_same(after, expected)


def test_keys_that_want_a_gradient():
    """What autograd knows of them has their shape."""
    cache = grown()
    cache.layers[0].keys.requires_grad_()
    kept = weakref.ref(cache.layers[0].keys)
    assert_takes_as_ever(cache)
    assert not cache.layers[0].keys.requires_grad
    assert kept() is None


def test_more_keys_than_values():
    cache = grown()
    other = copy.deepcopy(cache)
    given = torch.ones(2, 3, 2, 4), torch.ones(2, 3, 1, 4), 0
    updated(cache, *given, {})
    other.update(*given)
    assert_each_same(held(cache), held(other))


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
        lambda cache: cache.update(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), 0),
        lambda cache: cache.layers[0].keys.mul_(2),
        lambda cache: setattr(cache.layers[0], "keys", cache.layers[0].keys.clone()),
        lambda cache: setattr(cache.layers[0].keys, "data", torch.ones(2, 3, 8, 4)),
        lambda cache: setattr(cache.layers[0].keys, "data", cache.layers[0].keys.data[:, :, :8]),
        lambda cache: cache.reset(),
    ],
)
def test_changed_by_others(change):
    cache = grown()
    assert cache.get_seq_length() == 8
    change(cache)
    assert_takes_as_ever(cache)


def test_memory_ends_with_the_cache():
    cache = grown()
    buffers = [weakref.ref(one) for one in held(cache)]
    gc.collect()
    before = len(growing._ROOMS)
    cache.reset()
    assert not any(one() for one in buffers)
    del cache
    gc.collect()
    assert len(growing._ROOMS) == before - 1


def test_in_and_out_of_inference_mode():
    with torch.inference_mode():
        cache = grown()
    assert_takes_as_ever(cache)
    with torch.inference_mode():
        take(cache, 3)
    take(cache, 3)
    assert cache.get_seq_length() == 17


def test_what_autograd_keeps_is_not_changed():
    cache = grown()
    with torch.enable_grad():
        weight = torch.randn(4, requires_grad=True)
        loss = (cache.layers[0].keys * weight).sum()
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    take(cache, 2)
    cache.layers[0].keys.zero_()
    assert_same(*torch.autograd.grad(loss, weight), expected)


def test_what_does_not_fit_is_refused_as_by_the_cache():
    cache = grown()
    before = [one.clone() for one in held(cache)]
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        take(cache, shape=(1, 3, 1, 4))
    assert_each_same(held(cache), before)
    cache.layers[0].keys = cache.layers[0].keys.double()
    updated(cache, torch.ones(TOKEN), torch.ones(TOKEN), 0, {})
    assert cache.layers[0].keys.dtype == torch.float64


class _Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("where", ["cache", "layer", "class of the cache", "class of the layer"])
def test_another_update_is_called(where, monkeypatch):
    cache = grown()
    of = {"cache": cache, "layer": cache.layers[0], "class of the cache": DynamicCache}
    one = of.get(where, DynamicLayer)
    counted = _Counted(one.update)
    instead = counted if "class" not in where else lambda *args, **kwargs: counted(*args, **kwargs)
    monkeypatch.setattr(one, "update", instead)
    take(cache, 4)
    assert counted.calls == 4


def test_caches_of_another_class_update_themselves():
    class Own(DynamicCache):
        def update(self, *args, **kwargs):
            self.seen = True
            return super().update(*args, **kwargs)

    cache = Own()
    take(cache, 3)
    before = place(cache)
    take(cache)
    assert cache.seen and place(cache) != before


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}])
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_generated_texts(name, options, monkeypatch):
    import transformers

    configs = {
        "Llama": {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 200},
        "GPT2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 200},
    }
    kind = {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}[name]
    config = getattr(transformers, f"{name}Config")(**configs[name])
    _, model = fused(getattr(transformers, kind)(config).eval())
    prompt = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    found = []
    for least in (0, 10**9):
        monkeypatch.setattr(growing, "_LEAST", least)
        torch.manual_seed(0)
        mask = torch.ones_like(prompt)
        options |= {"max_new_tokens": 90, "pad_token_id": 0, "attention_mask": mask}
        found.append(model.generate(prompt, eos_token_id=None, **options))
    assert_same(*found)


def test_a_compiled_token_is_the_same():
    _, model = fused(small("Llama", {**TEXT, "num_key_value_heads": 2}))
    prompt = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    outputs = []
    for one in (model, compiled):
        cache = model(input_ids=prompt, use_cache=True).cache
        for _ in range(5):
            last = one(input_ids=prompt[:, :1], cache=cache, use_cache=True)[0]
        outputs.append((last, *held(cache)))
    assert_each_same(*outputs)
