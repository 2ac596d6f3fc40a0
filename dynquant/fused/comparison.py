"""A block's fused form compared with what it did before, on random batches, also padded ones."""

import torch

from dynquant.fused import experts, inline
from dynquant.fused.adapters import RESULTS
from dynquant.fused.arguments import always_gives_weights, implementation_of
from dynquant.fused.biases import with_bias
from dynquant.fused.block import compute
from dynquant.fused.caches import own_of, with_own
from dynquant.fused.classes import base_of
from dynquant.fused.inner import arguments_given
from dynquant.fused.parts import dtype_of
from dynquant.fused.plan import Plan
from dynquant.fused.readers import READERS
from dynquant.fused.samples import BATCH, LENGTH, random_of, samples_of, samples_of_sublayers

# Below it a block computes something else than its adapter says. Bytes that round otherwise leave
# 40 dB and more, integers in the attention 30.
LEAST_DB = {"integer": 20, "float": 35}


@torch.no_grad()
def chain_difference(chain):
    """Why the ops of a Chain cannot take the place of its modules, or ""."""
    for run in chain.runs:
        if elsewhere := _elsewhere(run.linear.packed):
            return elsewhere
        x = expected = random_of(run.dtype())(BATCH, LENGTH, run.linear.in_features)
        try:
            for _, module in run.modules:
                expected = module.forward(expected)
        except Exception as error:
            return f"could not be compared: {type(error).__name__}: {error}"
        if differs := _differs(run.compute(x), expected, "float", "a random batch"):
            return differs
    return ""


@torch.no_grad()
def difference(module, parts, attention):
    """Why the fused form of `module`, not fused yet, cannot take its place, or ""."""
    if elsewhere := _elsewhere(next(iter(parts.linears.values())).packed):
        return elsewhere
    way = parts.attention and implementation_of(parts.attention.core)
    if always_gives_weights(parts.adapter, way):
        return f"its attention is {way!r}; it runs as ops where it is 'sdpa'"
    try:
        return _difference(module, parts, attention)
    except Exception as error:
        return f"could not be compared: {type(error).__name__}: {error}"


@torch.no_grad()
def experts_difference(module, activation):
    """Why the op cannot take the place of the forward of dynquant.nn.Experts, or ""."""
    up = next(iter(module._formats.values()))
    if elsewhere := _elsewhere(module._held(up.name)[0]):
        return elsewhere
    choices = min(2, up.experts)
    chosen = torch.arange(LENGTH * choices).view(LENGTH, choices) % up.experts
    random = random_of(torch.float32)
    given = random(LENGTH, up.k), chosen, random(LENGTH, choices)
    try:
        found, expected = experts.compute(module, activation, *given), module.forward(*given)
    except Exception as error:
        return f"could not be compared: {type(error).__name__}: {error}"
    return _differs(found, expected, "float", "a random batch")


def _difference(module, parts, attention):
    for what, kwargs in samples_of(parts):
        if parts.adapter.inline:
            differs = _inline_difference(module, parts, what, kwargs)
        elif _updates(parts, kwargs):
            differs = _token_difference(module, parts, what, kwargs)
        else:
            differs = _block_difference(module, parts, what, kwargs, attention)
        if differs:
            return differs
    return ""


def _updates(parts, kwargs):
    """Whether the cache takes in a token, as it does where the keys are the block's own."""
    if parts.adapter.cache not in kwargs or parts.adapter.cross in kwargs:
        return False
    return parts.attention.groups is None


def _block_difference(module, parts, what, kwargs, attention):
    if name := parts.adapter.inner_function():
        for args, named in arguments_given(module, name, kwargs):
            if len(args) != 1 or named:
                return f"{name} is called with more than x"
    expected = module.forward(**kwargs)
    if unlike := _unlike(expected, parts.adapter.result):
        return unlike
    call = _call_of(parts, kwargs)
    if call is None:
        return f"could not be compared: {what} is not what its ops take"
    for kind in {"float", attention} if parts.attention else {"float"}:
        found = compute(parts, Plan(module, parts), call, kind)
        if differs := _differs(found, _first(expected), kind, what):
            return differs
    return _bias_difference(parts, call, expected, what)


def _call_of(parts, kwargs):
    call = READERS[parts.adapter.family](parts, (), kwargs)
    if call is None or parts.adapter.result != "bias":
        return call
    return with_bias(parts, call)


def _bias_difference(parts, call, expected, what):
    if parts.adapter.result != "bias":
        return ""
    return _differs(call.bias, expected[1], "float", f"the bias of {what}")


def _token_difference(module, parts, what, kwargs):
    name = parts.adapter.cache
    given = kwargs[name]
    cache, again = own_of(given).fresh(), own_of(given).fresh()
    expected = module.forward(**{**kwargs, name: with_own(given, cache)})
    if unlike := _unlike(expected, parts.adapter.result):
        return unlike
    if not cache.is_used_as_by_ops(parts.number_in_cache()):
        return "its cache is updated in another way"
    call = _call_of(parts, {**kwargs, name: with_own(given, again)})
    if call is None:
        return f"could not be compared: {what} is not what its ops take"
    found = compute(parts, Plan(module, parts), call, "float")
    return (
        _kept_differ(again, cache, what)
        or _differs(found, _first(expected), "float", what)
        or _bias_difference(parts, call, expected, what)
    )


def _inline_difference(module, parts, what, kwargs):
    called = []
    block = parts.feed_forward.up, parts.feed_forward.function, parts.feed_forward.down
    hooks = [one.register_forward_hook(lambda seen, *_: called.append(seen)) for one in block]
    try:
        expected = _first(module.forward(**kwargs))
        order = tuple(called)
        found = _first(inline.run(module, parts, Plan(module, parts), **kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    if order != block:
        return "differs: it does not call up, activation and down once, in this order"
    return _differs(found, expected, "float", what)


@torch.no_grad()
def sublayers_difference(block, plan):
    """Why the ops of an inline block's sublayers cannot take the place of its forward, or "".

    Args:
        block: whose attentions are fused.
        plan: its TokenPlan.
    """
    dtype = dtype_of([norm.module for norm in plan.norms])
    cross = plan.cross and plan.cross.parts
    samples = samples_of_sublayers(plan.adapter, plan.attention.parts, cross, dtype)
    try:
        for what, kwargs in samples:
            if differs := _sublayers_difference(block, plan, what, kwargs):
                return differs
    except Exception as error:
        return f"could not be compared: {type(error).__name__}: {error}"
    return ""


def _sublayers_difference(block, plan, what, kwargs):
    name = plan.adapter.cache
    given = kwargs[name]
    caches = [own_of(given).fresh() for _ in range(2)]
    one, other = ({**kwargs, name: with_own(given, cache)} for cache in caches)
    expected = base_of(type(block)).forward(block, **one)
    if unlike := _unlike(expected, "tensor"):
        return unlike
    found = plan.run((), other)
    if found is None:
        return f"could not be compared: {what} is not what its ops take"
    if not all(cache.is_used_as_by_ops(plan.attention.parts.number_in_cache()) for cache in caches):
        return "its cache is updated in another way"
    return _kept_differ(*caches, what) or _differs(found, expected, "float", what)


def _kept_differ(cache, other, what):
    """Whether two RecordedCaches were given other keys or values."""
    pairs = zip(cache.calls[0][0], other.calls[0][0], ("keys", "values"), strict=False)
    found = (_differs(kept, one, "float", f"the {name} of {what}") for kept, one, name in pairs)
    return next(filter(None, found), "")


def _unlike(result, form):
    """Why forward does not return what an adapter says, or ""."""
    expected = RESULTS[form]
    found = 0 if isinstance(result, torch.Tensor) else len(result)
    what = [f"a tuple of {count}" if count else "a tensor" for count in (found, expected)]
    return "" if found == expected else f"returns {what[0]}, and its ops {what[1]}"


def _first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


def _elsewhere(packed):
    device = packed.device
    return "" if device.type == "cpu" else f"is on {device}; blocks run fused on the CPU"


def _differs(found, expected, kind, what):
    if found.shape != expected.shape:
        return f"gives {list(found.shape)} for {list(expected.shape)}"
    ratio = _decibels(found.double(), expected.double())
    if not ratio >= LEAST_DB[kind]:
        return f"differs: {ratio:.1f} dB to the unfused block for {what}"
    return ""


def _decibels(found, expected):
    noise, signal = (found - expected).square().sum(), expected.square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(signal / noise))
