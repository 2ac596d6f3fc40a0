"""Linear attention, state spaces and short convolutions, whose functions run as ops."""

import copy
import functools
import inspect
import pickle
import warnings

import pytest
import torch
from compare import assert_same
from fused import TEXT, Counting, decibels, fused, seen_one_by_one, small
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynquant
from dynquant.fused import mixer_functions
from dynquant.fused.mixers import FusedMixer
from dynquant.nn._renamed import with_others

BASE = {**TEXT, "num_key_value_heads": 2, "head_dim": 12, "bos_token_id": 1, "eos_token_id": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 20, "mamba_n_groups": 2}
EXPERTS = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 2}
CONVOLVED = {**BASE, "layer_types": ["conv", "full_attention"]}
RULE = {"causal_conv1d", "gated_delta_rule", "gated_delta_rule_"}
SCAN = {"causal_conv1d", "selective_scan", "selective_scan_"}
# The options of each, and the ops that take the place of its functions.
MODELS = {
    "Qwen3_5Text": ({**BASE, **LINEAR}, RULE),
    "Qwen3_5MoeText": ({**BASE, **LINEAR, **EXPERTS, "num_experts_per_tok": 1}, RULE),
    "Qwen3Next": ({**BASE, **LINEAR, **EXPERTS, "num_experts_per_tok": 1}, RULE),
    "OlmoHybrid": ({**BASE, **LINEAR}, RULE),
    "Lfm2": (CONVOLVED, {"causal_conv1d"}),
    "GraniteMoeHybrid": (
        {
            **BASE,
            **MAMBA2,
            "layer_types": ["mamba", "attention"],
            "shared_intermediate_size": 80,
            "num_local_experts": 0,
        },
        SCAN,
    ),
    "FalconH1": ({**BASE, **MAMBA2, "mamba_d_ssm": 96}, SCAN),
    "Bamba": ({**BASE, **MAMBA2, "attn_layer_indices": [1]}, SCAN),
    "Lfm3": ({**CONVOLVED}, {"causal_conv1d"}),
    "LaraMini": ({**BASE, **LINEAR}, RULE),
    "Mamba2": (
        {
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 12,
            "state_size": 20,
            "n_groups": 2,
            "vocab_size": 99,
        },
        SCAN,
    ),
    "Mamba": (
        {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 5, "vocab_size": 99},
        SCAN,
    ),
    "FalconMamba": (
        {"hidden_size": 48, "num_hidden_layers": 2, "state_size": 5, "vocab_size": 99},
        SCAN,
    ),
}
PROMPT = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
NEXT = torch.randint(3, 99, (2, 1), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def made(name):
    """The quantized model, and the same fused."""
    return fused(small(name, MODELS[name][0]))


@pytest.fixture(scope="module")
def qwen():
    return fused(small("Qwen3_5Text", MODELS["Qwen3_5Text"][0]))


def mixers(model):
    return [module for module in model.modules() if isinstance(module, FusedMixer)]


@torch.no_grad()
def outputs(model, steps=3):
    """Of a prompt and some tokens behind it, and the cache."""
    found = [model(input_ids=PROMPT, use_cache=True)]
    cache = found[0].cache
    for _ in range(steps):
        found.append(model(input_ids=NEXT, cache=cache, use_cache=True))
    return torch.cat([one[0] for one in found], 1), cache


def test_prompts_and_tokens_run_as_ops(name, made):
    quantized, model = made
    assert mixers(model) and not mixers(quantized)
    with Counting() as counting:
        y, _ = outputs(model)
    assert MODELS[name][1] <= counting.found.keys()
    assert decibels(outputs(quantized)[0], y) > 40


def test_tokens_together_behind_a_cache(made):
    """As where some are guessed and checked."""
    quantized, model = made
    results = []
    for one in made:
        with torch.no_grad():
            cache = one(input_ids=PROMPT, use_cache=True).cache
            more = one(input_ids=PROMPT, cache=cache, use_cache=True)[0]
        results.append(more)
    assert decibels(*results) > 40


def test_padding(made):
    mask = torch.ones_like(PROMPT)
    mask[1, :4] = 0
    given = {"input_ids": PROMPT, "attention_mask": mask}
    with torch.no_grad():
        wanted, found = (one(**given)[0][mask.bool()] for one in made)
    assert decibels(wanted, found) > 40


def test_copies_and_pickles(made):
    _, model = made
    y, _ = outputs(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(mixers(other)) == len(mixers(model))
        assert_same(outputs(other)[0], y)


def test_fused_once_more(qwen):
    _, model = qwen
    again = dynquant.fuse(model)
    assert len(mixers(again)) == len(mixers(model))
    assert_same(outputs(again)[0], outputs(model)[0])


def test_hooks_change_nothing(qwen):
    _, model = qwen
    y, _ = outputs(model)
    seen = []
    for mixer in mixers(model):
        mixer.register_forward_hook(lambda *given: seen.append(given))
        mixer.out_proj.register_forward_hook(lambda *given: seen.append(given))
    try:
        assert_same(outputs(model)[0], y)
    finally:
        for mixer in mixers(model):
            mixer._forward_hooks.clear()
            mixer.out_proj._forward_hooks.clear()
    assert len(seen) == 8


def test_gradients_autocast_and_training_run_the_functions(qwen):
    quantized, model = qwen
    x = torch.randn(2, 9, 48)

    def gradient(one):
        given = x.clone().requires_grad_()
        one(inputs_embeds=given, use_cache=False)[0].square().sum().backward()
        return given.grad

    with Counting() as counting:
        grads = gradient(quantized), gradient(model)
    assert not RULE & counting.found.keys()
    assert_same(*grads)
    with Counting() as counting, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=PROMPT)
    assert not RULE & counting.found.keys()


def test_compiled(qwen):
    _, model = qwen
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        y, found = (one(input_ids=PROMPT, use_cache=False)[0] for one in (model, compiled))
    assert decibels(y, found) > 40


def test_halves():
    """In bfloat16, states of the rule are in fp32, and those of Mamba's in bfloat16."""
    for name in ("Qwen3_5Text", "Mamba", "Mamba2", "Lfm2"):
        model = small(name, MODELS[name][0]).to(torch.bfloat16).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = dynquant.quantize_dynamic(model)
            model = dynquant.fuse(quantized)
        (wanted, before), (found, cache) = outputs(quantized), outputs(model)
        assert found.dtype == wanted.dtype and decibels(wanted.float(), found.float()) > 25
        for one, other in zip(before.layers, cache.layers, strict=True):
            for kind in ("conv_states", "recurrent_states"):
                kept, own = (getattr(layer, kind, {}).get(0) for layer in (one, other))
                assert (kept is None) == (own is None)
                assert kept is None or (kept.dtype, kept.shape) == (own.dtype, own.shape)


def state_of(cache):
    """Of a cache's first layer, or of a layer."""
    return getattr(cache, "layers", [cache])[0].recurrent_states[0]


def test_states_are_written_in_place(qwen):
    _, model = qwen
    with torch.no_grad():
        cache = model(input_ids=PROMPT, use_cache=True).cache
        state = state_of(cache)
        before = state.clone()
        copied = copy.deepcopy(cache)
        with Counting() as counting:
            model(input_ids=NEXT, cache=cache, use_cache=True)
    assert counting.found["gated_delta_rule_"] == 1
    assert state_of(cache) is state and not torch.equal(state, before)
    assert_same(state_of(copied), before)


def keeping(one):
    """Gives a cache, or a layer of one, a class that is told of a state before the next comes."""
    kind = type(one)

    def update(self, states, *given, **named):
        self.kept = state_of(self).clone()
        return kind.update_recurrent_state(self, states, *given, **named)

    one.__class__ = type("Keeping", (kind,), {"update_recurrent_state": update})
    return one


def of_layer(cache):
    return keeping(cache.layers[0])


def of_instance(cache):
    layer = cache.layers[0]

    def kept(states, *given, **named):
        layer.kept = state_of(cache).clone()
        return type(layer).update_recurrent_state(layer, states, *given, **named)

    layer.update_recurrent_state = kept
    return layer


@pytest.mark.parametrize("keeper_of", [of_layer, keeping, of_instance])
def test_states_of_other_caches_are_not(qwen, keeper_of):
    _, model = qwen
    wanted, _ = outputs(model, 1)
    with torch.no_grad():
        cache = model(input_ids=PROMPT, use_cache=True).cache
        before, keeper = state_of(cache).clone(), keeper_of(cache)
        with Counting() as counting:
            found = model(input_ids=NEXT, cache=cache, use_cache=True)[0]
    assert "gated_delta_rule_" not in counting.found
    assert_same(keeper.kept, before)
    assert_same(found, wanted[:, -1:])


@pytest.fixture
def file(monkeypatch):
    """The file of Qwen 3.5, in which something else takes the place of names."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as module

    def replace(name, value):
        monkeypatch.setattr(module, name, value)
        return value

    replace.module = module
    return replace


def test_functions_that_compute_something_else_stay(qwen, file):
    """Also those that take their place after fusing, and what else the file has then."""
    quantized, model = qwen
    y, _ = outputs(model, 0)
    of_torch = file.module.torch_chunk_gated_delta_rule

    def twice(*given, **named):
        y, state = of_torch(*given, **named)
        return 2 * y, state

    file("torch_chunk_gated_delta_rule", twice)
    with Counting() as counting:
        found, _ = outputs(model, 0)
    assert "gated_delta_rule" not in counting.found and counting.found["causal_conv1d"]
    assert decibels(outputs(quantized, 0)[0], found) > 40
    assert_same(outputs(dynquant.fuse(quantized), 0)[0], found)
    file("torch_chunk_gated_delta_rule", of_torch)
    assert_same(outputs(model, 0)[0], y)
    file("apply_mask_to_padding_states", lambda hidden, mask: hidden * 0)
    assert decibels(outputs(quantized, 0)[0], outputs(model, 0)[0]) > 40


def test_what_cannot_be_hashed(qwen, file):
    class Unhashable:
        __hash__ = None

        def __eq__(self, other):
            return True

        def __call__(self, x, *given, **named):
            return x * 0

    quantized, model = qwen
    file("causal_conv1d_fn", Unhashable())
    assert decibels(outputs(quantized, 0)[0], outputs(dynquant.fuse(quantized), 0)[0]) > 40


def test_a_forward_that_is_replaced_after_fusing(qwen, monkeypatch):
    quantized, model = qwen
    kind = type(mixers(model)[0])._base

    def patched(self, hidden_states, **given):
        return hidden_states * 2

    monkeypatch.setattr(kind, "forward", patched)
    assert decibels(outputs(quantized, 0)[0], outputs(model, 0)[0]) > 40


@pytest.mark.parametrize("state", ["autocast", "default dtype"])
def test_functions_are_known_in_any_state(qwen, monkeypatch, state):
    """In which the first call of a process may find them."""
    quantized, _ = qwen
    monkeypatch.setattr(mixer_functions, "_FOUND", {})
    before = torch.get_default_dtype()
    try:
        if state == "default dtype":
            torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", torch.bfloat16, enabled=state == "autocast"):
            model = dynquant.fuse(quantized)
    finally:
        torch.set_default_dtype(before)
    with Counting() as counting:
        outputs(model)
    assert mixers(model) and counting.found.keys() >= RULE


def test_nobody_sees_how_functions_are_known(qwen, monkeypatch):
    _, model = qwen
    y, _ = outputs(model)
    counted = []
    for found in ({}, mixer_functions._FOUND):
        monkeypatch.setattr(mixer_functions, "_FOUND", found)
        with FlopCounterMode(display=False) as counter:
            assert_same(outputs(model)[0], y)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]


def test_fusing_says_nothing_of_other_packages(qwen, monkeypatch, caplog):
    quantized, _ = qwen
    monkeypatch.setattr(mixer_functions, "_FOUND", {})
    dynquant.fuse(quantized)
    assert "falling back" not in caplog.text


def causal_conv1d_fn(x, weight, bias=None, activation=None):
    return x * 3


class Own(nn.Module):
    """One with a function of that name that is another, in a model with a block."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        return causal_conv1d_fn(self.tower(x), self.tower[0].weight)


def test_another_function_of_such_a_name():
    quantized, model = fused(Own())
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert_same(model(x), quantized(x))
    assert not mixers(model)


def test_arguments_that_ops_do_not_have():
    """Sequences in one, activations and shapes of another kind."""
    seen = []

    def function(*given, **named):
        seen.append((given, named))
        return "its own"

    convolution, step = (
        mixer_functions.INSTEAD[name] for name in ("causal_conv1d_fn", "causal_conv1d_update")
    )
    x, weight, state = torch.randn(1, 4, 5), torch.randn(4, 3), torch.randn(1, 4, 3)
    assert convolution(function, x, weight, seq_idx=torch.zeros(1, 5)) == "its own"
    assert seen.pop()[1].keys() == {"seq_idx"}
    assert convolution(function, x, weight, activation="gelu") == "its own"
    assert step(function, x, state.half(), weight) == "its own"
    assert convolution(function, x.double(), weight.double()) == "its own"
    rule = mixer_functions.INSTEAD["torch_chunk_gated_delta_rule"]
    vectors, gates = torch.randn(1, 5, 2, 4), torch.rand(1, 5, 2)
    named = {"g": -gates, "beta": gates, "cu_seqlens": torch.tensor([0, 5])}
    assert rule(function, vectors, vectors, vectors, **named) == "its own"
    update = mixer_functions.INSTEAD["mamba2_selective_state_update"]
    given = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3), torch.rand(1, 2, 3)
    own_rates = -torch.rand(2, 3, 4)  # of each state: not one of a head
    assert update(function, *given, own_rates, *torch.randn(2, 1, 1, 4)) == "its own"


def test_decorated_functions_find_others():
    def decorated(function):
        @functools.wraps(function)
        def wrapper(*given, **named):
            return "decorated", function(*given, **named)

        return wrapper

    def hidden(function):
        calls = [function]

        @functools.wraps(function)
        def wrapper(*given):
            return calls[0](*given)

        return wrapper

    def plain(x, *, more=2):
        """Of a text."""
        return seen_one_by_one(x), more

    def negated(name, value):
        return (lambda x: -x) if name == "seen_one_by_one" else value

    copied = with_others(decorated(decorated(plain)), negated)
    assert copied(3, more=4) == ("decorated", ("decorated", (-3, 4)))
    assert copied.__name__ == "plain" and inspect.unwrap(copied).__doc__ == "Of a text."
    assert with_others(hidden(plain), negated) is None
