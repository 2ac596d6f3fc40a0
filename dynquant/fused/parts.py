"""The parts of one block: found by the names of its adapter, and watched for changes."""

import math
from typing import NamedTuple

import torch
from torch import nn

from dynquant import nn as quantized
from dynquant.fused.adapters import MARK, adapter_named, is_in_fp32
from dynquant.fused.functions import Norm, activation_of, norm_of
from dynquant.fused.hooks import first_disturbance
from dynquant.fused.inner import function_of
from dynquant.fused.places import part_of, place_of
from dynquant.fused.sharing import Sharing, groups_of
from dynquant.fused.stretching import Stretching

LINEAR = (quantized.Linear, quantized.Conv1D)  # what the ops have a form for


class RelativeParts(NamedTuple):
    """The projections of the vectors of distances, None where there is no such term.

    span: the number of the vector for the distance 0.
    """

    key: nn.Module | None
    query: nn.Module | None
    span: int


class AttentionParts(NamedTuple):
    """key and value are None where query has the rows of all three, or is all there is.

    head_norms: those of query and key, or (); each of every head, or of all heads together.
    value_norm: of each head of the values, or None.
    result_norm: of what it gives, before the input is added; in FeedForwardParts as well.
    kv_heads: None where key and value tell it, or have as many heads as the query.
    turned: the features of a head that a rotary embedding would turn.
    gated: whether query has the rows of each head's gate as well.
    head_gate: the linear layer of gates of their own, or None.
    groups: where keys and values are those of an earlier layer, how many heads of the query take
        one of these; None elsewhere.
    """

    query: nn.Module
    key: nn.Module | None
    value: nn.Module | None
    output: nn.Module | None
    norm: Norm | None
    head_dim: int
    core: nn.Module
    dropout: nn.Module | None
    head_norms: tuple[Norm, ...]
    value_norm: Norm | None
    kv_heads: int | None
    result_norm: Norm | None
    relative: RelativeParts | None
    turned: int
    gated: bool
    head_gate: nn.Module | None
    groups: int | None


class FeedForwardParts(NamedTuple):
    """gate is None where there is none, and where `split` says how up has its rows as well."""

    up: nn.Module
    gate: nn.Module | None
    down: nn.Module
    split: str | None
    norm: Norm | None
    activation: str
    function: object
    result_norm: Norm | None


class LinearParts(NamedTuple):
    """activation is "none" where there is none."""

    linear: nn.Module
    norm: Norm | None
    activation: str
    function: nn.Module | None


class Parts:
    """What a block is made of now, and why it cannot run fused, if so.

    Args:
        module: the block.
        known_as: the name that its Adapter is registered for.
        activation: what a function of its file is known to compute, where it has such a one and was
            fused; None where that is yet to be found out.
        kinds: by name, the types that its submodules had when it was fused; None for those that
            they have now.

    Attributes:
        adapter, roles: its Adapter, and what that gives for roles().
        attention, feed_forward, linear_block: as the adapter has them, whatever their linear layers
            are; None where anything else is missing.
        linears: the linear layers of them, by name.
        obstacle: what stands against running fused, or "".
        runs_without_cache: whether the attention runs as ops where there is no cache.
        scheme: how the linear layers quantize their inputs: per_token, symmetric, activation_bits.
        plan: the last Plan that was made from them, or None.
        token_plan: the last TokenPlan (decoder.py) likewise.
        kept_vectors: what vectors.py keeps between calls, or None.
        heads, kv_heads: of the attention; None where its linear layers are not quantized.
        sharing: the Sharing of its keys and values with other layers, or None.
        stretching: the Stretching of its query, or None.
    """

    def __init__(self, module, known_as, activation=None, kinds=None):
        self.known_as, self._known_activation = known_as, activation
        self.adapter = adapter_named(known_as)
        self.roles = self.adapter.roles()
        self.attention = self.feed_forward = self.linear_block = None
        self.runs_without_cache = False
        self.linears = {}
        self.obstacle = ""
        self.plan = self.token_plan = self.kept_vectors = self.heads = self.kv_heads = None
        self._rotates = self.sharing = self.stretching = None
        self._children = [
            (parent, key, child, type(child))
            for parent in module.modules()
            for key, child in parent._modules.items()
            if child is not None
        ]
        self._named = [(key, child) for _, key, child, _ in self._children]
        found = {name: type(child) for name, child in module.named_modules() if name}
        self.kinds = found if kinds is None else kinds
        try:
            self._find(module)
            self._check_others(found)
        except _Obstacle as obstacle:
            self.attention = self.feed_forward = self.linear_block = None
            self.obstacle = str(obstacle)
            return
        try:
            self._check_linears()
        except _Obstacle as obstacle:
            self.obstacle = str(obstacle)

    def _find(self, module):
        adapter = self.adapter
        if adapter.whole and part_of(module, adapter.whole):
            raise _Obstacle(f"{adapter.whole} is {part_of(module, adapter.whole)}")
        if adapter.feed_forward is not None:
            self.feed_forward = self._feed_forward(module, adapter.feed_forward)
        if adapter.attention is not None:
            self.attention = self._attention(module, adapter.attention)
            self.runs_without_cache = _runs_without_cache(adapter, self.attention)
            if adapter.attention.index:
                self._number = place_of(module, adapter.attention.index)
            if adapter.attention.shared:
                self.sharing = Sharing(module, adapter.attention.shared)
            if adapter.attention.stretch:
                self.stretching = Stretching(module, adapter.attention.stretch)
            if name := adapter.attention.rotates:
                self._rotates = place_of(module, name)
                if not hasattr(*self._rotates):
                    raise _Obstacle(f"{name} is missing")
        if adapter.linear_block is not None:
            self.linear_block = self._linear_block(module, adapter.linear_block)

    def _feed_forward(self, module, names):
        function, activation = self._activation(module, names.activation)
        up, gate, down = (self._linear(module, n) for n in (names.up, names.gate, names.down))
        norm, last = _norm(module, names.norm), _norm(module, names.result_norm, of_result=True)
        return FeedForwardParts(up, gate, down, names.split, norm, activation, function, last)

    def _linear_block(self, module, names):
        function, activation = None, "none"
        if names.activation is not None:
            function, activation = self._activation(module, names.activation)
        linear, norm = self._linear(module, names.linear), _norm(module, names.norm)
        return LinearParts(linear, norm, activation, function)

    def _activation(self, module, name):
        is_inner = name.startswith(MARK)
        if is_inner and self._known_activation:
            return None, self._known_activation
        function = function_of(module, name) if is_inner else part_of(module, name)
        activation = activation_of(function)
        if activation is None:
            raise _Obstacle(f"{name} is not a known activation")
        if is_inner:
            return None, activation
        if not isinstance(function, nn.Module) and self.adapter.family != "torch_layer":
            raise _Obstacle(f"{name} is not a module")
        return function, activation

    def _attention(self, module, names):
        core, head_dim = part_of(module, names.core), part_of(module, names.head_dim)
        if not isinstance(core, nn.Module) or not isinstance(head_dim, int):
            raise _Obstacle(f"{names.core or 'the block'} or {names.head_dim} is missing")
        for name in ("bias_k", "bias_v"):
            if getattr(core, name, None) is not None:
                raise _Obstacle(f"{names.core or 'the block'} has {name}")
        if getattr(core, "add_zero_attn", False):
            raise _Obstacle(f"{names.core or 'the block'} has add_zero_attn")
        groups = names.shared and groups_of(module, names.shared)
        given = (names.key, names.value) if groups is None else (None, None)
        if names.value_is_key and part_of(module, names.value_is_key):
            given = given[0], given[0]
        layers = (names.query, *given, names.output)
        query, key, value, output = (self._linear(module, name) for name in layers)
        gate = names.head_gate and part_of(module, names.head_gate)
        attributes = (
            *((names.scale, float), (names.index, int)),
            *((names.kv_heads, int), (names.turned, int)),
        )
        for name, kind in attributes:
            if not name:
                continue
            found = part_of(module, name, missing=False)
            if found is None and name == names.index and self.adapter.cross is not None:
                continue  # in an encoder, where there never is a cache
            if not isinstance(found, kind) or isinstance(found, bool):
                raise _Obstacle(f"{name} is {found!r}, not of type {kind.__name__}")
        self._check_softmax(module, names)
        has_own_value = names.value_norm and groups is None
        return AttentionParts(
            query=query,
            key=key,
            value=value,
            output=output,
            norm=_norm(module, names.norm),
            head_dim=head_dim,
            core=core,
            dropout=names.dropout and part_of(module, names.dropout),
            head_norms=_head_norms(module, names, head_dim, alone=groups is not None),
            value_norm=_value_norm(module, names.value_norm) if has_own_value else None,
            kv_heads=names.kv_heads and part_of(module, names.kv_heads),
            result_norm=_norm(module, names.result_norm, of_result=True),
            relative=names.relative and self._relative(module, names.relative, key, query),
            turned=part_of(module, names.turned) if names.turned else head_dim,
            gated=names.gated,
            head_gate=None if gate is None else self._linear(module, names.head_gate),
            groups=groups,
        )

    def _check_softmax(self, module, names):
        softcap = names.softcap and part_of(module, names.softcap)
        if not (softcap is None or isinstance(softcap, int | float) and 0 < softcap < math.inf):
            raise _Obstacle(f"{names.softcap} is {softcap!r}, no positive number")
        sinks = names.sinks and part_of(module, names.sinks)
        if not (sinks is None or isinstance(sinks, torch.Tensor) and sinks.dim() == 1):
            raise _Obstacle(f"{names.sinks} is {type(sinks).__name__}, no vector")

    def _relative(self, module, names, key, query):
        terms, span = part_of(module, names.terms), part_of(module, names.span)
        if not terms or not isinstance(span, int) or not set(terms) <= {"c2p", "p2c"}:
            raise _Obstacle(f"{names.terms} is {terms!r} and {names.span} {span!r}")
        if not part_of(module, names.shared):
            key = self._linear(module, names.key) if "c2p" in terms else None
            query = self._linear(module, names.query) if "p2c" in terms else None
        return RelativeParts(
            key if "c2p" in terms else None, query if "p2c" in terms else None, span
        )

    def _linear(self, module, name):
        if name is None:
            return None
        part = part_of(module, name)
        if not isinstance(part, nn.Module):
            raise _Obstacle(f"{name} is missing")
        self.linears[name] = part
        return part

    def _check_linears(self):
        for name, part in self.linears.items():
            if type(part) not in LINEAR:
                kind = type(part).__name__
                raise _Obstacle(f"{name} is of type {kind}; dynquant.nn.Linear is fused")
        schemes = {scheme_of(part) for part in self.linears.values()}
        if len(schemes) > 1:
            raise _Obstacle("its linear layers quantize their inputs in different ways")
        if self.adapter.family == "disentangled" and not self.takes_rows_alone():
            raise _Obstacle(
                "its linear layers quantize their inputs per_tensor, and it computes with some rows"
            )
        self.scheme = schemes.pop()
        if self.attention is not None:
            self.heads, self.kv_heads = _heads_of(self.attention)
            self._check_gate(self.attention)

    def _check_gate(self, attention):
        if attention.head_gate is None:
            return
        rows = attention.head_gate.out_features
        if rows not in (self.heads, self.heads * attention.head_dim):
            raise _Obstacle(f"{rows} features of gates for {self.heads} heads")

    def _check_others(self, found):
        """What is not a linear layer has to be what it was: nothing calls it."""
        for name, kind in {**found, **self.kinds}.items():
            if found.get(name) is not self.kinds.get(name) and not self._is_linear(name):
                raise _Obstacle(f"{name} ({kind.__name__}) is not what it was")

    def _is_linear(self, name):
        return any(name == linear or name.startswith(f"{linear}.") for linear in self.linears)

    def number_in_cache(self):
        """That of the attention, where there may be a cache."""
        return getattr(*self._number)

    def rotates(self):
        """Whether its rotary embedding is applied."""
        if self._rotates is None:
            return self.adapter.rotary is not None
        return bool(getattr(*self._rotates))

    def takes_rows_alone(self):
        """Whether what a linear layer gives for a row depends on no other row."""
        return all(getattr(part, "per_token", True) for part in self.linears.values())

    def inner_activation(self):
        """What it computes, where its activation is a function of its file; else None."""
        if self.adapter.inner_function() is None:
            return None
        return (self.feed_forward or self.linear_block).activation

    def norms(self):
        found = [self.attention, self.feed_forward, self.linear_block]
        norms = [part.norm for part in found if part is not None]
        norms += [part.result_norm for part in found[:2] if part is not None]
        if self.attention is not None:
            norms += *self.attention.head_norms, self.attention.value_norm
        return [norm for norm in norms if norm is not None]

    def activations(self):
        """(function, the name of what it computes) of each."""
        found = (self.feed_forward, self.linear_block)
        return [(part.function, part.activation) for part in found if part is not None]

    def dtype(self):
        """That of the input."""
        return dtype_of([*(norm.module for norm in self.norms()), *self.linears.values()])

    def parameters(self):
        """Those that may want a gradient; a quantized linear layer has none."""
        looked_up = [one for table in self._embeddings() for one in table.parameters()]
        return [*parameters_of(self.norms()), *looked_up]

    def _embeddings(self):
        """What a core makes the bias of its positions of, by calling it."""
        if self.adapter.result != "bias" or self.attention is None:
            return []
        children = self.attention.core._modules.values()
        return [one for one in children if isinstance(one, nn.Embedding)]

    def children(self):
        """(parent, name, module) of everything in the block."""
        return [(parent, key, child) for parent, key, child, _ in self._children]

    def hold(self):
        """Whether the block still has the same submodules, of the same types."""
        for parent, key, child, kind in self._children:
            if parent._modules.get(key) is not child or child.__class__ is not kind:
                return False
        return True

    def disturbance(self, besides=frozenset()):
        """What asks for the submodules to be called one by one, or "".

        Args:
            besides: ids of submodules that do not count.
        """
        return first_disturbance(self._named, besides)

    def can_call_linears(self):
        """Whether the attention can be made of calls of its linear layers, whatever they are."""
        found = self.attention
        if found is None or self.feed_forward is not None:
            return False
        if found.result_norm or (found.norm and self.adapter.norm_first):
            return False
        called = {id(one) for part in self.linears.values() for one in part.modules()}
        norms = *found.head_norms, found.value_norm, found.norm
        called |= {id(norm.module) for norm in norms if norm}
        called |= {id(one) for one in self._embeddings()}
        return not self.disturbance(called | {id(found.dropout)})


class _Obstacle(Exception):
    """Why a block cannot be fused."""


def scheme_of(linear):
    return linear.per_token, linear.symmetric, linear.activation_bits


def parameters_of(norms):
    return [one for norm in norms for one in norm.module._parameters.values()]


def dtype_of(modules):
    """That of their first parameter."""
    tensors = [one for module in modules for one in module._parameters.values()]
    return next((one.dtype for one in tensors if one is not None), torch.float32)


def _runs_without_cache(adapter, attention):
    """Where there may be a cache, only if it is not causal, or may be to a second sequence.

    In integers, decoders that have no other one lose more than by their linear layers.
    """
    if is_in_fp32(adapter.attention):
        return False
    if adapter.cache is None:
        return True
    return adapter.cross is not None or not getattr(attention.core, "is_causal", True)


def _norm(module, name, of_result=False):
    if name is None:
        return None
    part = part_of(module, name)
    kind = norm_of(part) if isinstance(part, nn.Module) else None
    if kind is None:
        raise _Obstacle(f"{name} is not a known norm")
    return Norm(kind, part, of_result) if kind else None


def _heads_of(attention):
    """How many heads the query has, and key and value."""
    rows, size = attention.query.out_features, attention.head_dim
    if attention.groups is not None:
        heads = rows // size
        kv_heads, wanted = heads // attention.groups, heads * size
    elif attention.key is not None:
        of_each = 2 * size if attention.gated else size
        heads, kv_heads = rows // of_each, attention.key.out_features // size
        wanted = heads * of_each
    elif attention.kv_heads is None:
        heads = kv_heads = rows // 3 // size
        wanted = 3 * heads * size
    else:
        kv_heads = attention.kv_heads
        heads = rows // size - 2 * kv_heads
        wanted = (heads + 2 * kv_heads) * size
    if rows != wanted or kv_heads <= 0 or heads <= 0 or heads % kv_heads:
        raise _Obstacle(f"{rows} features of queries for heads of {size}")
    return heads, kv_heads


class Numbers(NamedTuple):
    """What an attention computes with besides its parts, each None where there is none.

    Attributes:
        scale: what scores are multiplied by.
        index: the number of the layer in a cache.
        softcap, sinks: as in scaled_dot_product.
    """

    scale: float | None = None
    index: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None


def numbers_of(module, parts):
    """The Numbers of a block's attention."""
    names = parts.adapter.attention
    given = names.scale, names.index, names.softcap, names.sinks
    return Numbers(*(name and part_of(module, name) for name in given))


def _value_norm(module, name):
    norm = _norm(module, name)
    if norm is None or norm.kind != "rms" or norm.size is not None:
        raise _Obstacle(f"{name} is not an RMS norm without a weight")
    return norm


def _head_norms(module, names, head_dim, alone):
    """Those of query and key, or of the query alone, or none."""
    given = [name for name in (names.query_norm, names.key_norm) if name][: 1 if alone else 2]
    found = tuple(_norm(module, name) for name in given)
    for name, linear, norm in zip(given, (names.query, names.key), found, strict=False):
        sizes = [head_dim]
        if names.key is not None and not names.gated:  # else query has the rows of others too
            sizes.append(getattr(part_of(module, linear), "out_features", head_dim))
        if norm is None or norm.kind == "layer" or norm.size not in sizes:
            wanted = " or ".join(map(str, dict.fromkeys(sizes)))
            raise _Obstacle(f"{name} is not an RMS norm of {wanted} values")
    if len({norm.kind for norm in found}) > 1:
        raise _Obstacle(f"{' and '.join(given)} are norms of two kinds")
    return found
