"""What an architecture calls its parts: data, one Adapter for each class of block."""

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class Relative:
    """What the scores have besides, for how far a key lies from a query, by names in the block.

    Each distance has a vector. The content's key projection of it times the query ("c2p") and its
    query projection times the key ("p2c") are added to the products of queries and keys, and all is
    multiplied by 1 / sqrt(head_dim * number of terms), as in DeBERTa (https://arxiv.org/abs/2006.03654).

    Args:
        vectors: the argument of forward with the vectors [2 * span, features].
        positions: the argument with the distance of each query and key [1, length, length].
        span: the attribute with the number of the vector for the distance 0.
        terms: the attribute that has the names of the terms: "c2p", "p2c", or both.
        shared: the attribute that says whether query and key of the attention project the vectors.
        key, query: the linear layers that do so otherwise.
    """

    vectors: str
    positions: str
    span: str
    terms: str
    shared: str
    key: str
    query: str


@dataclass(frozen=True)
class SharedKeys:
    """How layers take keys and values from one before them, by names in the block.

    Args:
        states: the argument of forward with a mapping that has them, [batch, heads, tokens,
            features] each, as the cache gives them.
        entry: the attribute with their key in the mapping.
        stores: the attribute that says whether the layer puts its own there.
        reuses: the attribute that says whether it takes those there, and has only a query.
        groups: the attribute with how many heads of the query take one head of these.
    """

    states: str
    entry: str
    stores: str
    reuses: str
    groups: str


@dataclass(frozen=True)
class Stretch:
    """What the heads of the query are multiplied by, by names in the block, for far positions.

    1 + factor * log(1 + floor(position / length)), as in Llama 4
    (https://arxiv.org/abs/2501.19399).

    Args:
        positions: the argument of forward with them, integers [1 or batch, length].
        settings: the attribute with a mapping that has both numbers.
        factor, length: their keys.
    """

    positions: str
    settings: str
    factor: str
    length: str


@dataclass(frozen=True)
class Attention:
    """Self-attention: output(softmax(q k' / sqrt(head_dim) + mask) v), by names in the block.

    Args:
        query, key, value: the linear layers; without key and value, query has the rows of all
            three, one after another.
        head_dim: the attribute with the features of a head.
        kv_heads: the attribute with the number of heads of key and value, where query has the rows
            of all three and these may be fewer than its own.
        output: the output projection; without it, the block ends before.
        core: the module that knows `is_causal` and, in transformers, the implementation.
        norm: the norm before (norm_first) or after it, if any.
        dropout: what is called with the result of the output projection, if it is a module.
        scale: the attribute with what the scores are multiplied by; 1 / sqrt(head_dim) without it.
        query_norm, key_norm: RMS norms of each head, or of all heads together, if any: the
            attention is in fp32 then, as that of decoders is.
        value_norm: an RMS norm of each head of the values, without a weight, if any; it goes with
            these two.
        value_is_key: the attribute that says whether the key's linear layer gives the values too.
        index: the attribute with the number of the layer in the cache.
        rotates: the attribute that says whether the layer applies the rotary embedding that it is
            called with, where some do not.
        turned: the attribute with how many features of a head the rotary embedding turns, where
            these may be fewer than all.
        interleaved: where the rotary embedding turns pairs of neighbors, and not of both halves of
            what it turns: "first_half" where the first half of its cosines and sines is that of
            the pairs, "each_twice" where two neighbors have it twice. None where it turns halves.
        once: whether it turns halves by cosines and sines that are given once for both.
        gated: whether the query has, behind the rows of each head, as many for its gate: what the
            head gives is multiplied by the sigmoid of that.
        head_gate: a linear layer of the input besides, whose sigmoid what the heads give is
            multiplied by: with one row for each head, or for each of its values.
        unturned: whether it may be called without a rotary embedding, and turns nothing then.
        result_norm: the norm after it in a block with norm_first, where `norm`, if any, is before
            it: its input is added behind that.
        relative: what its scores have for distances, in a block of the family "disentangled".
        shared: how it shares keys and values with other layers, if it does.
        stretch: what its query is multiplied by, behind the rotary embedding, if anything.
        softcap: the attribute with the softcap of its scores, which may be None.
        sinks: the parameter with one more score of each head.
    """

    query: str
    key: str | None
    value: str | None
    head_dim: str
    output: str | None = None
    core: str = ""
    norm: str | None = None
    dropout: str | None = None
    kv_heads: str | None = None
    scale: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    value_norm: str | None = None
    value_is_key: str | None = None
    index: str | None = None
    rotates: str | None = None
    turned: str | None = None
    interleaved: str | None = None
    once: bool = False
    gated: bool = False
    head_gate: str | None = None
    unturned: bool = False
    result_norm: str | None = None
    relative: Relative | None = None
    shared: SharedKeys | None = None
    stretch: Stretch | None = None
    softcap: str | None = None
    sinks: str | None = None

    def __post_init__(self):
        if (self.key is None) != (self.value is None):
            raise ValueError("key and value: name both, or neither where query has their rows")
        if (self.query_norm is None) != (self.key_norm is None):
            raise ValueError("query_norm and key_norm: name both, or neither")
        if self.query_norm is None and (self.value_norm or self.shared):
            raise ValueError("value_norm and shared: they go with query_norm and key_norm")
        if self.key is not None and self.kv_heads is not None:
            raise ValueError("kv_heads: where key and value are named, they tell it")
        if self.interleaved not in INTERLEAVED:
            raise ValueError(
                f"interleaved is {self.interleaved!r}; allowed: {', '.join(map(str, INTERLEAVED))}"
            )
        if self.once and self.interleaved:
            raise ValueError("once and interleaved: name one of them")
        if self.gated and self.head_gate:
            raise ValueError("gated and head_gate: name one of them")
        if self.gated and (self.key is None or self.output is None):
            raise ValueError("gated: it goes with names for key, value and output")
        if self.key is None and (self.value_norm or self.value_is_key or self.shared):
            raise ValueError("value_norm, value_is_key and shared: they go with a name for key")
        if self.shared and (self.gated or self.head_gate or self.stretch):
            raise ValueError("shared: it goes without gated, head_gate and stretch")
        if self.key is None and self.output is None:
            raise ValueError("output: an attention whose query has all rows needs a name for it")


@dataclass(frozen=True)
class FeedForward:
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)), by names in the block.

    Args:
        up, down, gate: the linear layers.
        activation: a module; or a function that forward calls with x alone, by a name of its own
            file, with a colon before it: ":gelu", ":F.silu".
        split: where `up` has the rows of both: "gate_first" or "up_first".
        norm: the norm before (norm_first) or after it, if any.
        result_norm: as in Attention.
    """

    up: str
    down: str
    activation: str
    gate: str | None = None
    split: str | None = None
    norm: str | None = None
    result_norm: str | None = None

    def __post_init__(self):
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; allowed: {', '.join(map(str, SPLITS))}")
        if self.split and self.gate:
            raise ValueError("gate and split: up has the rows of the gate, or gate names them")


@dataclass(frozen=True)
class LinearBlock:
    """residual + activation(linear(x)), by names in the block.

    Args:
        linear: the linear layer.
        activation: as in FeedForward, if there is one.
        norm: the norm before (norm_first) or after it, if any.
        residual: the argument of forward with what is added, where that is not the input.
        first_token: of the input [batch, length, features], only [:, 0] is taken, as poolers do.
    """

    linear: str
    activation: str | None = None
    norm: str | None = None
    residual: str | None = None
    first_token: bool = False


@dataclass(frozen=True)
class Sublayers:
    """What an inline block is for tokens of a decoder, by names in the block.

    Its attention, one to a second sequence where that is given, and its feed-forward block, each
    with a norm and the sum with its input. The attentions are blocks that are known themselves.

    Args:
        attention, attention_norm: self-attention.
        feed_forward_norm: that of the adapter's feed-forward block.
        cross, cross_norm: the attention to a second sequence, if any.
        second, second_mask: the arguments of forward with that sequence and its mask.
    """

    attention: str
    attention_norm: str
    feed_forward_norm: str
    cross: str | None = None
    cross_norm: str | None = None
    second: str | None = None
    second_mask: str | None = None

    def __post_init__(self):
        given = self.cross, self.cross_norm, self.second, self.second_mask
        if any(given) and not all(given):
            raise ValueError("cross, cross_norm, second and second_mask: name all, or none of them")


@dataclass(frozen=True)
class Adapter:
    """How the forward of one class of modules is made of linear layers and what is beside them.

    Names are attributes of the module, with dots where they lie deeper.

    Args:
        arguments: the parameters of forward in their order; the first is the input
            [batch, length, features], or [..., features] where there is no attention.
        attention, feed_forward: what forward computes, in this order.
        linear_block: what forward computes where it has one linear layer, without these.
        inline: that forward computes more than the feed-forward block, which is all that is named
            here: it calls up, the activation and down, one after the other, and these calls run as
            one op.
        sublayers: what an inline block runs as for tokens of a decoder.
        residual: whether each of them adds its input.
        norm_first: whether each norm is applied to the input (True) or to the result (False); a
            name for an attribute that tells.
        mask: the argument with the attention mask [batch, 1, length, length], bool (True: seen) or
            added to the scores.
        bias: the argument with what is added to the scores besides.
        rotary: the argument with the cosines and sines of rotary position embeddings.
        cache: the argument with a cache of transformers, which keeps keys and values. The attention
            is in fp32 then, and without a cache too, where it is causal or has norms of heads. A
            core of transformers' "sdpa" that is given no mask is taken to be causal for several
            tokens, unless its is_causal is False.
        cross: the argument with a second sequence, an encoder's output: the attention is to that
            where it is given, and not rotated. It runs as ops where an EncoderDecoderCache has its
            keys and values, and otherwise as it is.
        ignored: arguments that change nothing.
        result: "tensor"; "tuple" for (result,); "weights" for (result, None); "bias" for (result,
            bias, None), where the core makes the bias by its method `compute_bias` if none is given
            and it has_relative_attention_bias, and it is zero otherwise.
        whole: an attribute that has to be 0 or None, as chunk_size_feed_forward.
        family: how the arguments are read: "transformers", "torch_layer", "torch_attention" or
            "disentangled", which goes with an attention that has `relative`.
    """

    arguments: tuple[str, ...]
    attention: Attention | None = None
    feed_forward: FeedForward | None = None
    linear_block: LinearBlock | None = None
    inline: bool = False
    sublayers: Sublayers | None = None
    residual: bool = False
    norm_first: bool | str = False
    mask: str | None = None
    bias: str | None = None
    rotary: str | None = None
    cache: str | None = None
    cross: str | None = None
    ignored: frozenset[str] = field(default_factory=frozenset)
    result: str = "tensor"
    whole: str | None = None
    family: str = "transformers"

    def __post_init__(self):
        layer = self.attention is not None or self.feed_forward is not None
        if layer == (self.linear_block is not None):
            raise ValueError(
                "an Adapter needs attention or feed_forward, or both, or linear_block alone"
            )
        parts = (one for one in (self.attention, self.feed_forward) if one is not None)
        if any(part.result_norm for part in parts) and self.norm_first is not True:
            raise ValueError("result_norm: it goes with norm_first=True: the input is added last")
        if self.inline:
            self._check_inline()
        if self.sublayers is not None:
            self._check_sublayers()
        else:
            self._check_cache()
        if not self.arguments:
            raise ValueError("arguments is empty; the first names the input of forward")
        for name, allowed in (("result", RESULTS), ("family", FAMILIES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}"
                )

        if (self.family == "disentangled") != bool(self.attention and self.attention.relative):
            raise ValueError("relative: it goes with the family 'disentangled', and that with it")

    def _check_inline(self):
        block = self.feed_forward
        if self.attention is not None or block is None or self.residual or _has_norm(block):
            raise ValueError("inline: it goes with feed_forward alone, without norm and residual")
        if self.inner_function() is not None:
            raise ValueError("inline: its activation is an attribute, not a function")
        if block.gate or block.split or any("." in name for name in self.names()):
            raise ValueError("inline: up, activation and down are attributes of the block itself")

    def _check_sublayers(self):
        if not self.inline or self.cache is None or self.mask is None:
            raise ValueError("sublayers: they go with inline, and with names for cache and mask")
        if self.rotary is not None or self.bias is not None or self.cross is not None:
            raise ValueError("sublayers: they go without rotary, bias and cross")

    def _check_cache(self):
        block, is_of_transformers = self.attention, self.family == "transformers"
        ready = block is not None and block.index and block.output
        if self.cache is not None and not (ready and is_of_transformers):
            raise ValueError(
                "cache: it goes with an attention of transformers with index and output"
            )
        if self.result == "bias" and self.bias is None:
            raise ValueError("result is 'bias': it goes with an argument for the bias")
        if self.cache is None and block is not None and (block.index or block.shared):
            raise ValueError("index and shared: they go with a cache")
        if block is not None and is_in_fp32(block) and not (block.output and is_of_transformers):
            raise ValueError(
                "query_norm, key_norm, gated, head_gate, stretch, softcap and sinks: they go with "
                "an attention of transformers with output"
            )
        turns = ("rotates", "interleaved", "once", "unturned")
        turned = block is not None and any(getattr(block, name) for name in turns)
        if turned and self.rotary is None:
            raise ValueError(
                "rotates, interleaved, once and unturned: they go with an argument for the rotary "
                "embedding"
            )
        is_plain = block is not None and block.key and not is_in_fp32(block)
        alone = self.cache is not None and is_plain
        if self.cross is not None and (not alone or self.feed_forward):
            raise ValueError(
                "cross: it goes with a cache and an attention alone that has key, without "
                "query_norm, gated, head_gate, stretch, softcap and sinks"
            )

    def roles(self) -> tuple[str | None, ...]:
        """The arguments of forward that its ops take, None for those that it has not."""
        usual = self.mask, self.bias, self.rotary, self.cache, self.cross
        return self.arguments[0], *usual, self.states(), self.positions()

    def states(self) -> str | None:
        """The argument with what its attention shares with other layers, if any."""
        shared = None if self.attention is None else self.attention.shared
        return None if shared is None else shared.states

    def positions(self) -> str | None:
        """The argument with the positions that its attention reads, if it does."""
        stretch = None if self.attention is None else self.attention.stretch
        return None if stretch is None else stretch.positions

    def inner_function(self) -> str | None:
        """The name of its activation where that is a function of the block's file, else None."""
        part = self.feed_forward or self.linear_block
        name = part.activation if part is not None else None
        return name if name is not None and name.startswith(MARK) else None

    def names(self) -> list[str]:
        """The attributes of a block that it names, with dots where they lie deeper."""
        parts = (self.attention, self.feed_forward, self.linear_block)
        items = (item for part in parts if part is not None for item in vars(part).items())
        found = [name for key, name in items if key not in NO_NAMES]
        found += [self.whole, self.norm_first]
        return [name for name in found if isinstance(name, str) and name and name[0] != MARK]


def _has_norm(part):
    return bool(part.norm or part.result_norm)


def is_in_fp32(names):
    """Whether an Attention of these names is computed in fp32 whatever is asked for."""
    more = names.query_norm, names.gated, names.head_gate, names.stretch, names.softcap, names.sinks
    return any(more)


MARK = ":"  # what the name of a function begins with that forward finds in its own file
# What is told of parts besides the names of their attributes.
NO_NAMES = (
    *("split", "residual", "first_token", "interleaved", "once", "gated", "unturned"),
    *("vectors", "positions", "states", "factor", "length"),
)
SPLITS = (None, "gate_first", "up_first")
INTERLEAVED = (None, "first_half", "each_twice")
RESULTS = {"tensor": 0, "tuple": 1, "weights": 2, "bias": 3}  # values in a tuple; 0: a tensor alone
FAMILIES = ("transformers", "torch_layer", "torch_attention", "disentangled")

# By "module.Class", so that no library is imported for its names.
_ADAPTERS: dict[str, Adapter] = {}


def register(block: type | str, adapter: Adapter, replace: bool = False) -> None:
    """Makes dynquant.fuse know a class of blocks.

    Args:
        block: the class (an nn.Module), or its full name "module.Class". Classes that run the same
            code, as libraries copy it from one to another, are known by it as well; those that run
            other code are not, even where they derive from it.
        adapter: what its parts are called.
        replace: allows an adapter to take the place of another.

    Raises:
        TypeError: where block is not a class of modules, or adapter not an Adapter.
        ValueError: where the class has an adapter already.
    """
    if isinstance(block, type) and issubclass(block, nn.Module):
        block = name_of(block)
    if not isinstance(block, str) or "." not in block:
        raise TypeError(f"block is {block!r}; expected a class of nn.Module or 'module.Class'")
    if not isinstance(adapter, Adapter):
        raise TypeError(f"adapter is {adapter!r}; expected a dynquant.fused.Adapter")
    if block in _ADAPTERS and not replace:
        raise ValueError(f"{block} has an adapter already; pass replace=True to replace it")
    _ADAPTERS[block] = adapter


def name_of(block: type) -> str:
    return f"{block.__module__}.{block.__qualname__}"


def names_in_transformers(model: str, *classes: str) -> list[str]:
    """The full names of classes of a model in transformers."""
    return [f"transformers.models.{model}.modeling_{model}.{name}" for name in classes]


def adapter_named(name: str) -> Adapter:
    """The one that is registered for the class of that full name.

    Raises:
        LookupError: where there is none.
    """
    if name not in _ADAPTERS:
        raise LookupError(
            f"no adapter for {name}: dynquant.fused.register it, or import what registers it, "
            "before a model that was fused with it is used"
        )
    return _ADAPTERS[name]


def registered() -> dict[str, Adapter]:
    """By the full names of their classes."""
    return _ADAPTERS
