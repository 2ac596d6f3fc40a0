"""Keys and values of a second sequence that are read in int8."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from compare import assert_same
from fused import SEQUENCES, T5, decibels, seen_one_by_one, small
from fused import fused as fused_pair
from test_fused_cross import new_cache
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import dynquant
from dynquant.fused import narrowing
from dynquant.fused.narrowing import narrowed

SHAPE = 2, 3, 50, 4  # [batch, heads, tokens, features]
SIZES = {**SEQUENCES, "encoder_layers": 1}
STATES = torch.randn(2, 30, 48, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(narrowing, "_LEAST", 0)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def bart():
    return fused_pair(small("Bart", SIZES))


def layer_of(keys=None, values=None):
    """The layer of a cache, which is held by it alone."""
    cache = DynamicCache()
    cache.update(*(torch.randn(SHAPE) if one is None else one for one in (keys, values)), 0)
    return cache.layers[0]


def is_narrow(found):
    """Whether a Kept is in int8, with scales."""
    kept, *scales = {found.keys.dtype, found.values.dtype}, *found.scales
    if torch.int8 not in kept:
        assert scales == [None, None]
        return False
    assert kept == {torch.int8} and all(one.dtype == torch.float32 for one in scales)
    return True


def assert_of(found, layer):
    """A Kept that has the rounded numbers of a layer."""
    for q, scale, x in zip(found[:2], found.scales, (layer.keys, layer.values), strict=True):
        expected, of_expected, _ = torch.ops.dynquant.quantize_activation(x, True, True)
        assert_same(q, expected)
        assert_same(scale, of_expected)


def test_from_the_second_call_on():
    layer = layer_of()
    keys, values = layer.keys, layer.values
    first = narrowed(layer)
    assert first[0] is keys and first[1] is values
    second, third = narrowed(layer), narrowed(layer)
    assert is_narrow(second)
    assert_of(second, layer)
    assert second[0] is third[0] and second[1] is third[1]
    assert layer.keys is keys and layer.values is values


def test_few_numbers_stay(monkeypatch):
    monkeypatch.setattr(narrowing, "_LEAST", 2 * 3 * 50 * 4 + 1)
    layer = layer_of()
    assert not any(is_narrow(narrowed(layer)) for _ in range(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_stay(dtype):
    layer = layer_of(*(torch.randn(SHAPE).to(dtype) for _ in range(2)))
    for _ in range(3):
        assert narrowed(layer)[0] is layer.keys


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays(value, which):
    given = [torch.randn(SHAPE) for _ in range(2)]
    given[which][1, 2, 3, 0] = value
    layer = layer_of(*given)
    for _ in range(3):
        keys, values, scales = narrowed(layer)
        assert keys is layer.keys and values is layer.values and scales == (None, None)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("times, narrow", [(10, True), (1000, False)])
def test_a_feature_that_takes_the_bits_of_others(times, narrow, which):
    given = [torch.randn(SHAPE) for _ in range(2)]
    given[which][:, 1, :, 2] *= times
    layer = layer_of(*given)
    for _ in range(3):
        found = narrowed(layer)
    assert is_narrow(found) == narrow


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30, 0.0])
def test_numbers_of_any_size(scale):
    layer = layer_of(values=torch.rand(SHAPE) * scale)
    narrowed(layer)
    found = narrowed(layer)
    assert is_narrow(found)
    wide = found.values * found.scales[1][..., None]
    if scale:
        assert decibels(wide / scale, layer.values / scale) > 40
    else:
        assert (wide == 0).all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_written_is_noticed(mode):
    with mode():
        layer = layer_of()
        for one in ("values", "keys"):
            for _ in range(3):
                found = narrowed(layer)
            assert is_narrow(found)
            getattr(layer, one)[0, 0, 0] = 7.0
            assert not is_narrow(narrowed(layer))
            found = narrowed(layer)
            assert is_narrow(found)
            assert_of(found, layer)


def test_what_is_replaced_is_noticed():
    cache = DynamicCache()
    cache.update(torch.randn(SHAPE), torch.randn(SHAPE), 0)
    layer = cache.layers[0]
    for _ in range(3):
        narrowed(layer)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert not is_narrow(narrowed(layer))
    assert_of(narrowed(layer), layer)


def test_a_cache_of_inference_mode_afterwards():
    """Its keys are the same memory, and count what is written to them."""
    with torch.inference_mode():
        layer = layer_of()
        keys = layer.keys
        for _ in range(3):
            found = narrowed(layer)
        assert is_narrow(found)
        assert layer.keys.data_ptr() == keys.data_ptr() and layer.keys.stride() == keys.stride()
        assert_same(layer.keys, keys)
    assert is_narrow(narrowed(layer))
    again = pickle.loads(pickle.dumps(layer))
    assert_same(again.keys, keys)
    assert_same(copy.deepcopy(layer).values, layer.values)


def test_other_caches():
    """A static one is written to where it is."""
    config = small("Bart", SIZES).config
    cache = StaticCache(config, max_cache_len=50)
    keys, values = torch.randn(SHAPE), torch.randn(SHAPE)
    cache.update(keys, values, 0)
    layer = cache.layers[0]
    for _ in range(3):
        found = narrowed(layer)
    assert is_narrow(found)
    layer.reset()
    assert not is_narrow(narrowed(layer))
    assert_of(narrowed(layer), layer)


@pytest.mark.parametrize("end", ["layer", "keys"])
def test_memory_ends(end):
    layer = layer_of()
    narrowed(layer)
    kept = weakref.ref(narrowed(layer)[0])
    gc.collect()
    assert kept() is not None
    if end == "layer":
        del layer
    else:
        layer.keys = torch.randn(SHAPE)
        narrowed(layer)
    gc.collect()
    assert kept() is None


_READING = ("attend.", "scaled_dot_product.")


class KeysOf(TorchDispatchMode):
    """Records the dtypes of keys that attention reads."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dynquant" and function.__name__.startswith(_READING):
            self.found.append(args[1].dtype)
        return function(*args, **(kwargs or {}))


def one_by_one(model):
    """The last hidden states of tokens, the cache, and the dtypes of the keys that were read."""
    cache, states, keys = new_cache(), [], []
    for token in TOKENS.split(1, 1):
        with KeysOf() as recorded:
            given = {"encoder_hidden_states": STATES, "use_cache": True, "cache": cache}
            states.append(model.decoder(input_ids=token, **given)[0])
        keys.append(recorded.found)
    return torch.cat(states, 1), cache, keys


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_tokens_of_a_decoder(bart, mode):
    """Those of two layers: the first makes the keys, the second reads them in 32 bits."""
    quantized, model = bart
    with mode():
        found, cache, keys = one_by_one(model)
        expected, other, _ = one_by_one(quantized)
    wide, narrow = torch.float32, torch.int8
    assert keys[1] == [wide] * 4
    assert keys[2:] == [[wide, narrow] * 2] * 7
    assert decibels(found, expected) > 40
    layers, others = (one.cross_attention_cache.layers for one in (cache, other))
    for one, same in zip(layers, others, strict=True):
        assert_same(one.keys, same.keys)


def test_hooks_change_no_bit(bart):
    _, model = bart
    expected = one_by_one(model)[0]
    found, _, keys = one_by_one(seen_one_by_one(copy.deepcopy(model)))
    assert torch.int8 in keys[-1]
    assert_same(found, expected)


def test_t5_and_an_attention_beside_a_hooked_norm(bart):
    """Attentions that run as ops where their layer does not."""
    t5 = fused_pair(small("T5", T5))
    hooked = tuple(copy.deepcopy(one) for one in bart)
    for one in hooked:
        for layer in one.decoder.layers:
            layer.encoder_attn_layer_norm.register_forward_hook(lambda *given: None)
    for quantized, model in (t5, hooked):
        found, _, keys = one_by_one(model)
        assert torch.int8 in keys[2]
        assert decibels(found, one_by_one(quantized)[0]) > 30  # bytes may round otherwise


def test_a_compiled_decoder_reads_what_the_cache_has(bart):
    """As the first call does that finds it, which a copy of the cache is new to."""
    _, model = bart
    cache, given = new_cache(), {"encoder_hidden_states": STATES, "use_cache": True}
    for token in TOKENS[:, :4].split(1, 1):
        model.decoder(input_ids=token, cache=cache, **given)
    last = {"input_ids": TOKENS[:, 4:5], **given}
    expected = model.decoder(cache=copy.deepcopy(cache), **last)[0]
    narrow = model.decoder(cache=cache, **last)[0]
    cache.self_attention_cache.crop(-1)
    compiled = torch.compile(model.decoder, backend="eager")
    found = compiled(cache=cache, **last)[0]
    assert decibels(found, expected) > 90 > decibels(narrow, expected)


def test_attention_in_floats_reads_what_the_cache_has(bart):
    quantized, _ = bart
    model = dynquant.fuse(quantized, attention="float")
    found, _, keys = one_by_one(model)
    assert torch.int8 not in sum(keys, [])
    assert decibels(found, one_by_one(quantized)[0]) > 40  # a byte may round otherwise


def test_beams(bart):
    """Each token brings other keys, which are read as they are."""
    import transformers

    config = transformers.BartConfig(**SIZES)
    quantized, model = fused_pair(transformers.BartForConditionalGeneration(config))
    given = {"input_ids": TOKENS, "num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    with KeysOf() as recorded:
        found = model.generate(**given)
    assert set(recorded.found) == {torch.float32}
    assert_same(found, quantized.generate(**given))
