"""The experts of a mixture as one op: dynquant.fuse of dynquant.nn.Experts."""

import copy
import pickle
import warnings

import pytest
import torch
from compare import assert_same
from fused import Counting, small
from test_nn_experts import CLASSES, EXPERTS, QCONFIGS, experts, quantized, routed, signal_to_noise
from torch import nn

import dynquant
from dynquant.fused.classes import base_of, swap_class
from dynquant.fused.experts import FusedExperts
from dynquant.fused.functions import FusedActivation

FUSED = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "nemotron_h")


def made(kind="mixtral", dtype=torch.float32, config="int8"):
    """The experts alone, and fused."""
    unfused = quantized(experts(kind, dtype), QCONFIGS[config])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return unfused, dynquant.fuse(unfused)


@torch.no_grad()
def runs_as_op(model, *arguments, **named):
    with Counting() as counting:
        found = model(*arguments, **named)
    return found, counting.found["experts"] == 1 and not counting.found["linear_grouped"]


def as_before(model, *arguments):
    """By the forward that it had, with the activation as an op."""
    with torch.no_grad():
        return base_of(type(model)).forward(model, *arguments)


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_to_what_it_did(kind, dtype):
    unfused, model = made(kind, dtype)
    assert isinstance(model, FusedExperts) and not isinstance(unfused, FusedExperts)
    for routing in (torch.float32, dtype):
        x, chosen, weights = routed(dtype)
        given = x, chosen, weights.to(routing)
        found, is_op = runs_as_op(model, *given)
        assert is_op and found.dtype == dtype
        assert_same(found, as_before(model, *given))
        least = 100 if dtype == torch.float32 else 40
        assert signal_to_noise(unfused(*given), found) > least


@pytest.mark.parametrize("config", ["per_tensor", "symmetric", "16 bits"])
def test_every_config(config):
    _, model = made(config=config)
    found, is_op = runs_as_op(model, *routed())
    assert is_op
    assert_same(found, as_before(model, *routed()))


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind not in FUSED])
@pytest.mark.filterwarnings("ignore:fuse. no block")
def test_others_stay_as_they_are(kind):
    """With gates of their own, or a norm after each expert."""
    unfused = quantized(experts(kind))
    model = dynquant.fuse(unfused)
    if isinstance(model, FusedExperts):  # a gate as most have it
        return assert_same(model(*routed()), as_before(model, *routed()))
    assert_same(model(*routed()), unfused(*routed()))


@pytest.mark.filterwarnings("ignore:fuse. no block")
def test_weights_in_16_bits_stay_as_they_are():
    unfused = quantized(experts(), QCONFIGS["bfloat16"])
    assert not isinstance(dynquant.fuse(unfused), FusedExperts)


def test_an_index_beyond_the_experts_and_names():
    unfused, model = made()
    x, chosen, weights = routed()
    chosen[:, 0] = EXPERTS
    found, is_op = runs_as_op(model, x, top_k_weights=weights, top_k_index=chosen)
    assert is_op and signal_to_noise(unfused(x, chosen, weights), found) > 100
    assert model(*routed(tokens=0)).shape == (0, x.shape[1])
    # Of other dtypes: as before.
    for other in ((chosen.int(), weights), (chosen, weights.double())):
        found, is_op = runs_as_op(model, x, *other)
        assert not is_op and signal_to_noise(unfused(x, *other), found) > 100


def test_gradients_and_autocast():
    unfused, model = made()
    x, chosen, weights = routed()
    gradients = []
    for one in (unfused, model):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        one(leaves[0], chosen, leaves[1]).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for one, other in zip(*gradients, strict=True):
        assert signal_to_noise(one, other) > 80
    with torch.autocast("cpu", torch.bfloat16):
        _, is_op = runs_as_op(model, x, chosen, weights)
    assert not is_op


def test_a_hook_and_another_activation():
    _, model = made()
    expected, _ = runs_as_op(model, *routed())
    seen = []
    handle = model.act_fn.register_forward_hook(lambda *given: seen.append(given) and None)
    found, is_op = runs_as_op(model, *routed())
    assert seen and not is_op
    assert_same(found, expected)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *given: seen.append(given[0]))
    try:
        found, is_op = runs_as_op(model, *routed())
    finally:
        handle.remove()
    assert model.act_fn in seen and not is_op
    assert_same(found, expected)
    fused_gelu = nn.GELU().eval()
    swap_class(fused_gelu, FusedActivation, "gelu")
    for activation in (nn.ReLU(), fused_gelu):
        model.act_fn = activation
        found, is_op = runs_as_op(model, *routed())
        assert not is_op and signal_to_noise(expected, found) < 40


def test_weights_of_zero():
    mod = experts()
    nn.init.zeros_(mod.down_proj)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = dynquant.fuse(quantized(mod))
    found, is_op = runs_as_op(model, *routed())
    assert is_op and not found.any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_and_state(copied):
    unfused, model = made()
    other = copied(model)
    found, is_op = runs_as_op(other, *routed())
    assert is_op
    assert_same(found, model(*routed()))
    assert model.state_dict().keys() == unfused.state_dict().keys()
    state = {name: one.clone() for name, one in quantized(experts("mixtral")).state_dict().items()}
    key = next(name for name in state if name.endswith("_int8"))
    state[key] = state[key].flip(0)
    for one in (other, unfused):
        one.load_state_dict(state)
    changed, is_op = runs_as_op(other, *routed())
    assert is_op and signal_to_noise(unfused(*routed()), changed) > 100
    assert signal_to_noise(found, changed) < 40


def test_dequantize():
    _, model = made()
    floats = dynquant.dequantize(model)
    assert type(floats).__name__ == "MixtralExperts"
    assert signal_to_noise(floats(*routed()), model(*routed())) > 30


def test_compiled_without_a_break():
    torch._dynamo.reset()
    _, model = made()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (11, 4):
            assert_same(compiled(*routed(tokens=tokens)), model(*routed(tokens=tokens)))


def test_in_a_model():
    config = {
        **{"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "intermediate_size": 80, "vocab_size": 99, "head_dim": 12},
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    }
    quantized = dynquant.quantize_dynamic(small("Qwen3Moe", config).eval())
    model = dynquant.fuse(quantized)
    ids = torch.arange(22).view(2, 11) + 3
    with torch.no_grad(), Counting() as counting:
        found = model(input_ids=ids)[0]
    assert counting.found["experts"] == 2 and not counting.found["linear_grouped"]
    with torch.no_grad():
        assert signal_to_noise(quantized(input_ids=ids)[0], found) > 40
