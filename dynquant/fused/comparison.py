"""A block's fused form compared with what it did before, on random batches, also padded ones."""

import torch

from dynquant.fused import inline
from dynquant.fused.adapters import RESULTS
from dynquant.fused.arguments import READERS, always_gives_weights, implementation_of
from dynquant.fused.biases import with_bias
from dynquant.fused.block import compute
from dynquant.fused.caches import RecordedCache, of_two_sequences, own_of, with_own
from dynquant.fused.plan import Plan

# Below it a block computes something else than its adapter says. Bytes that round otherwise leave
# 40 dB and more, integers in the attention 30.
LEAST_DB = {"integer": 20, "float": 35}
_BATCH, _LENGTH = 2, 9


@torch.no_grad()
def chain_difference(chain):
    """Why the ops of a Chain cannot take the place of its modules, or ""."""
    for run in chain.runs:
        if elsewhere := _elsewhere(run.linear):
            return elsewhere
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(_BATCH, _LENGTH, run.linear.in_features, generator=generator)
        x = expected = x.to(run.dtype())
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
    if elsewhere := _elsewhere(next(iter(parts.linears.values()))):
        return elsewhere
    way = parts.attention and implementation_of(parts.attention.core)
    if always_gives_weights(parts.adapter, way):
        return f"its attention is {way!r}; it runs as ops where it is 'sdpa'"
    try:
        return _difference(module, parts, attention)
    except Exception as error:
        return f"could not be compared: {type(error).__name__}: {error}"


def _difference(module, parts, attention):
    for what, kwargs in _samples(parts):
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
    """Whether the cache takes in a token: in an attention to a second sequence, it does not."""
    return parts.adapter.cache in kwargs and parts.adapter.cross not in kwargs


def _block_difference(module, parts, what, kwargs, attention):
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
    kept, (keys, values, _) = again.calls[0][0], cache.calls[0][0]
    return (
        _differs(kept[0], keys, "float", f"the keys of {what}")
        or _differs(kept[1], values, "float", f"the values of {what}")
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


def _unlike(result, form):
    """Why forward does not return what an adapter says, or ""."""
    expected = RESULTS[form]
    found = 0 if isinstance(result, torch.Tensor) else len(result)
    what = [f"a tuple of {count}" if count else "a tensor" for count in (found, expected)]
    return "" if found == expected else f"returns {what[0]}, and its ops {what[1]}"


def _first(result):
    return result if isinstance(result, torch.Tensor) else result[0]


def _elsewhere(linear):
    device = linear.packed.device
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


def _samples(parts):
    """(what it is, arguments) to call a block with."""
    for what, arguments in _whole_samples(parts):
        yield what, arguments
        if parts.adapter.result == "bias":
            without = {name: one for name, one in arguments.items() if name != parts.adapter.bias}
            yield f"{what} without a bias", without


def _whole_samples(parts):
    """With everything that the block can be given."""
    adapter, attention = parts.adapter, parts.attention
    generator, dtype = torch.Generator().manual_seed(0), parts.dtype()

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    if attention is None:
        width = next(iter(parts.linears.values())).in_features
        arguments = {adapter.arguments[0]: random(_BATCH, _LENGTH, width)}
        if adapter.linear_block is not None and adapter.linear_block.residual is not None:
            wide = parts.linear_block.linear.out_features
            arguments[adapter.linear_block.residual] = random(_BATCH, _LENGTH, wide)
        yield "a random batch", arguments
        return
    seen = torch.arange(_LENGTH) < torch.tensor([[_LENGTH], [_LENGTH // 2]])
    if parts.runs_without_cache:
        arguments = _of_attention(parts, random, _LENGTH, _LENGTH)
        yield "a random batch", _with_mask(arguments, parts, None)
        yield "a padded batch", _with_mask(arguments, parts, seen)
    if adapter.cache is not None and parts.number_in_cache() is not None:
        yield from _tokens(parts, random, seen)


def _tokens(parts, random, seen):
    adapter = parts.adapter
    arguments = _of_attention(parts, random, 1, _LENGTH)
    shape = _BATCH, parts.kv_heads, _LENGTH - 1, parts.attention.head_dim
    tokens = random(*shape), random(*shape)
    # The new token is the last, and is seen.
    for what, keys in (("a token", None), ("a token of a padded batch", seen.flip(1))):
        given = {**arguments, adapter.cache: RecordedCache(*tokens)}
        yield what, _with_mask(given, parts, keys)
    if adapter.cross is None:
        return
    second = of_two_sequences(parts.number_in_cache(), random(*shape), random(*shape))
    both = with_own(second, RecordedCache(*tokens))
    yield "a token beside a second sequence", {**arguments, adapter.cache: both, adapter.mask: None}
    sequence = random(_BATCH, _LENGTH - 1, parts.attention.key.in_features)
    arguments = _of_attention(parts, random, 1, _LENGTH - 1)
    for what, keys in (("a second sequence", None), ("a padded second sequence", seen[:, :-1])):
        given = {**arguments, adapter.cache: both, adapter.cross: sequence}
        yield what, _with_mask(given, parts, keys)


def _of_attention(parts, random, rows, keys):
    """The arguments of an attention but for its mask."""
    adapter, attention = parts.adapter, parts.attention
    arguments = {adapter.arguments[0]: random(_BATCH, rows, attention.query.in_features)}
    if adapter.bias is not None:
        arguments[adapter.bias] = random(_BATCH, parts.heads, rows, keys)
    if adapter.rotary is not None:
        angles = random(1, rows, attention.head_dim // 2).repeat(1, 1, 2)
        arguments[adapter.rotary] = (angles.cos(), angles.sin())
    if adapter.family == "torch_attention":
        arguments.update(dict.fromkeys(adapter.arguments, arguments["query"]), need_weights=False)
    return arguments


def _with_mask(arguments, parts, seen):
    """seen: bool [batch, keys], or None for all."""
    adapter, core = parts.adapter, parts.attention.core
    if adapter.family != "transformers":
        if not core.batch_first:
            x = next(iter(arguments.values())).transpose(0, 1)
            arguments = {k: x if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        name = "key_padding_mask" if adapter.family == "torch_attention" else "src_key_padding_mask"
        return arguments if seen is None else {**arguments, name: ~seen}
    mask = None
    if seen is not None:
        rows = next(iter(arguments.values())).shape[1]
        mask = seen[:, None, None, :].expand(-1, 1, rows, -1)
        config = getattr(core, "config", None)
        if config is None or config._attn_implementation != "sdpa":
            dtype = next(iter(arguments.values())).dtype
            mask = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
    return {**arguments, adapter.mask: mask}
