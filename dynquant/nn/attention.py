"""nn.MultiheadAttention with projections whose weights are in int8 or in 16 bits."""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from dynquant.nn._fx import TENSOR_OR_NONE, as_one_call
from dynquant.nn._products import Products
from dynquant.nn._state import frozen_copy
from dynquant.nn.linear import Linear, outputs_of
from dynquant.nn.linear_half import Linear16bit
from dynquant.qconfig import QConfig

_IN_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class MultiheadAttention(Products, nn.Module):
    """nn.MultiheadAttention whose four projections are dynquant.nn.Linear or Linear16bit.

    Made by from_float, which quantize_dynamic calls. It is called as nn.MultiheadAttention is, with
    the same shapes, masks and results. A large input that serves several projections (query, key
    and value of self-attention) is quantized once (Linear16bit quantizes none). Scores, softmax and
    the sum of the values are computed in float, by scaled_dot_product_attention where need_weights
    is False.

    A nested query, key and value (without masks and weights) give a nested result.

    Attributes:
        q_proj, k_proj, v_proj, out_proj: dynquant.nn.Linear, whose per_tensor weights have one
            scale for each of them; or Linear16bit.
        bias_k, bias_v: parameters [1, 1, embed_dim] without gradient, or None.
        embed_dim, kdim, vdim, num_heads, head_dim, dropout, batch_first, add_zero_attn: as in
            nn.MultiheadAttention.
        in_proj_weight: a QuantizedWeight [3 * embed_dim, embed_dim]; None where kdim or vdim differ
            from embed_dim.
        in_proj_bias: [3 * embed_dim], or None.
    """

    FLOAT = "nn.MultiheadAttention"
    COPIED = (
        "embed_dim",
        "kdim",
        "vdim",
        "num_heads",
        "head_dim",
        "dropout",
        "batch_first",
        "add_zero_attn",
    )
    DTYPES = (*Linear.DTYPES, *Linear16bit.DTYPES)
    MIXED = True  # each projection may have a config of its own

    merge_masks = nn.MultiheadAttention.merge_masks  # public there, too

    def __init__(
        self,
        mod: nn.Module,
        qconfig: QConfig,
        tied_to: nn.Module | None = None,
        products: Mapping[str, QConfig | None] | None = None,
    ) -> None:
        super().__init__()
        for key in self.COPIED:
            setattr(self, key, getattr(mod, key))
        # Where it is true, the fast paths of nn.TransformerEncoderLayer and nn.TransformerEncoder
        # run their own float kernels.
        self._qkv_same_embed_dim = False
        for product, (_, weight, bias) in _projections(mod).items():
            config = (products or {}).get(product, qconfig)
            setattr(self, product, _projection(weight, bias, config))
        for name in ("bias_k", "bias_v"):
            self.register_parameter(name, frozen_copy(getattr(mod, name)))
        self.eval()

    @torch.inference_mode(False)
    @torch.no_grad()
    def to_float(self) -> nn.Module:
        """The nn.MultiheadAttention, with the dequantized weights in the dtype that they show.

        It shares no memory with this one, and its parameters take gradients.
        """
        *given, (out_weight, out_bias) = (
            _float_parts(getattr(self, product)) for product in (*_IN_PROJECTIONS, "out_proj")
        )
        settings = {key: getattr(self, key) for key in self.COPIED if key != "head_dim"}
        with torch.device("meta"):
            mod = nn.MultiheadAttention(
                **settings, bias=out_bias is not None, add_bias_kv=self.bias_k is not None
            )
        found = {"bias_k": self.bias_k, "bias_v": self.bias_v}
        weights, biases = zip(*given, strict=True)
        if mod._qkv_same_embed_dim:
            found["in_proj_weight"] = torch.cat(weights)
        else:
            found |= {f"{one}_weight": of for one, of in zip(_IN_PROJECTIONS, weights, strict=True)}
        if out_bias is not None:
            found["in_proj_bias"] = torch.cat(biases)
        for key, value in found.items():
            if value is not None:
                setattr(mod, key, nn.Parameter(value.detach().clone()))
        mod.out_proj.weight = nn.Parameter(out_weight.clone())
        if out_bias is not None:
            mod.out_proj.bias = nn.Parameter(out_bias.clone())
        return mod.train(self.training)

    @classmethod
    def _float_parameters(cls, mod):
        weights = {key: weight for key, weight, _ in _projections(mod).values()}
        biases = {key: getattr(mod, key) for key in ("in_proj_bias", "bias_k", "bias_v")}
        return weights, {**biases, "out_proj.bias": mod.out_proj.bias}

    @classmethod
    def _products(cls, mod):
        return {product: (key, weight) for product, (key, weight, _) in _projections(mod).items()}

    def config_of(self, product: str) -> QConfig | None:
        linear = getattr(self, product)
        return None if isinstance(linear, nn.Linear) else linear._formats["weight"].qconfig

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As nn.MultiheadAttention.forward, whose documentation gives the shapes.

        Returns:
            the output, of query's shape and dtype, and the attention weights or None.

        Raises:
            ValueError: for shapes or dtypes that do not fit each other.
            TypeError: for what is not a tensor, or a mask that is neither bool nor float.
            RuntimeError: for is_causal without attn_mask.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles conditions whole)
            inputs, masks = (query, key, value), (key_padding_mask, attn_mask)
            if not (
                all(isinstance(one, torch.Tensor) for one in inputs)
                and all(isinstance(one, TENSOR_OR_NONE) for one in masks)
            ):
                return as_one_call(
                    self,
                    query,
                    key,
                    value,
                    key_padding_mask,
                    need_weights,
                    attn_mask,
                    average_attn_weights,
                    is_causal,
                )
        batched = query.dim() == 3
        if not torch.jit.is_scripting():
            if query.is_nested or key.is_nested or value.is_nested:
                masked = key_padding_mask is not None or attn_mask is not None or is_causal
                return self._nested(query, key, value, masked, need_weights), None
            self._check_shapes(query, key, value, key_padding_mask)
        if attn_mask is None and is_causal:
            raise RuntimeError("is_causal tells what attn_mask is: pass attn_mask as well")
        if not torch.jit.is_scripting() and torch.compiler.is_compiling():
            is_causal = False  # nn.TransformerDecoder finds it out from the mask's values
        q, k, v = self._project(query, key, value)
        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        keys = k.shape[2]
        k, v = self._with_extra(k, self.bias_k), self._with_extra(v, self.bias_v)
        mask: torch.Tensor | None = None
        if key_padding_mask is not None or need_weights or k.shape[2] > keys or not is_causal:
            mask = _merged(attn_mask, key_padding_mask, q, keys, k.shape[2] - keys)
            is_causal = False
        dropout = self.dropout if self.training else 0.0
        weights: torch.Tensor | None = None
        if need_weights:
            scores = (q * math.sqrt(1.0 / self.head_dim)) @ k.transpose(-2, -1)
            chances = F.softmax(scores if mask is None else scores + mask, dim=-1)
            chances = F.dropout(chances, dropout, self.training)
            output = chances @ v
            weights = chances.mean(1) if average_attn_weights else chances
            weights = weights if batched else weights.squeeze(0)
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
        output = output.transpose(1, 2).flatten(2)  # [N, L, embed_dim]
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        return self.out_proj(output), weights

    def _nested(self, query, key, value, masked, need_weights):
        if masked or need_weights:
            raise ValueError(
                "nested query, key and value take no masks, and need_weights must be False"
            )
        parts = {id(x): x.unbind() for x in (query, key, value)}
        counts = [len(parts[id(x)]) for x in (query, key, value)]
        if len(set(counts)) > 1:
            raise ValueError(f"query, key and value differ in batch: {counts}")
        rows = zip(*(parts[id(x)] for x in (query, key, value)), strict=True)
        results = [self(*row, need_weights=False)[0] for row in rows]
        return torch.nested.as_nested_tensor(results, layout=query.layout)

    def _check_shapes(self, query, key, value, key_padding_mask):
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
            shapes = ", ".join(str(list(x.shape)) for x in (query, key, value))
            raise ValueError(f"query, key and value must all have 2 or 3 dimensions, got {shapes}")
        dtypes = [x.dtype for x in (query, key, value)]
        if len(set(dtypes)) > 1 and not torch.is_autocast_enabled(query.device.type):
            listed = ", ".join(map(str, dtypes))
            raise ValueError(f"query, key and value must have the same dtype, got {listed}")
        given = {"query": (query, self.embed_dim), "key": (key, self.kdim)}
        given["value"] = (value, self.vdim)
        for name, (x, width) in given.items():
            if x.shape[-1] != width:
                raise ValueError(f"{name} must have {width} features, got {list(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"key and value differ in length or batch: {list(key.shape)}, {list(value.shape)}"
            )
        if dims == 3:
            batch = 0 if self.batch_first else 1
            if query.shape[batch] != key.shape[batch]:
                raise ValueError(
                    f"query and key differ in batch: {list(query.shape)}, {list(key.shape)}"
                )
            expected = (key.shape[batch], key.shape[1 - batch])
        else:
            expected = (key.shape[0],)
        if key_padding_mask is not None and key_padding_mask.shape != expected:
            raise ValueError(
                f"key_padding_mask must have the shape {list(expected)}, got "
                f"{list(key_padding_mask.shape)}"
            )

    def _project(self, query, key, value):
        if torch.jit.is_scripting() or key is not value:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is key:
            return outputs_of((self.q_proj, self.k_proj, self.v_proj), query)
        return self.q_proj(query), *outputs_of((self.k_proj, self.v_proj), key)

    def _heads(self, x):
        """[N, L, E], [L, N, E] or [L, E] -> [N, heads, L, E / heads]."""
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _with_extra(self, x, bias: torch.Tensor | None):
        """The keys or values with the position that bias_k or bias_v adds, and that of zeros."""
        shape = (x.shape[0], self.num_heads, 1, self.head_dim)
        parts = [x]
        if bias is not None:
            bias = bias.to(x.dtype).view(1, self.num_heads, 1, self.head_dim)
            parts.append(bias.expand(shape))
        if self.add_zero_attn:
            parts.append(x.new_zeros(shape))
        return torch.cat(parts, 2) if len(parts) > 1 else x

    # TorchScript takes no optional tensor where nn.TransformerEncoderLayer reads these; it does not
    # use what it reads.
    @property
    def in_proj_weight(self) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.q_proj.weight
        if self.kdim != self.embed_dim or self.vdim != self.embed_dim:
            return None
        return torch.cat([one.weight for one in (self.q_proj, self.k_proj, self.v_proj)])

    @property
    def in_proj_bias(self) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self.q_proj.weight
        if self.q_proj.bias is None:
            return None
        return torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])

    def _load_from_state_dict(self, state_dict, prefix, *args):
        _split_projections(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, "
            f"batch_first={self.batch_first}"
        )


def _projection(weight, bias, qconfig):
    """A linear layer; nn.Linear where qconfig is None."""
    if qconfig is not None:
        form = Linear16bit if qconfig.dtype in Linear16bit.DTYPES else Linear
        return form.from_weight(weight, bias, qconfig)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight, linear.bias = frozen_copy(weight), frozen_copy(bias)
    return linear.eval()


def _float_parts(linear):
    """The float weight of a projection, and its bias or None."""
    weight = linear.weight if isinstance(linear, nn.Linear) else linear.weight.dequantize()
    return weight, linear.bias


def _projections(mod):
    """By projection of an nn.MultiheadAttention: the weight's parameter, the weight, the bias."""
    biases = [None] * 3 if mod.in_proj_bias is None else mod.in_proj_bias.chunk(3)
    if mod.in_proj_weight is None:
        keys = [f"{one}_weight" for one in _IN_PROJECTIONS]
        weights = [getattr(mod, key) for key in keys]
    else:
        keys = ["in_proj_weight"] * 3
        weights = mod.in_proj_weight.chunk(3)
    found = {one: each for one, *each in zip(_IN_PROJECTIONS, keys, weights, biases, strict=True)}
    return {**found, "out_proj": ("out_proj.weight", mod.out_proj.weight, mod.out_proj.bias)}


def _split_projections(state_dict, prefix):
    """Gives the entries of a float nn.MultiheadAttention the names of the quantized one."""
    for one in _IN_PROJECTIONS:
        if f"{prefix}{one}_weight" in state_dict:
            state_dict[f"{prefix}{one}.weight"] = state_dict.pop(f"{prefix}{one}_weight")
    for key in ("weight", "bias"):
        packed = state_dict.get(f"{prefix}in_proj_{key}")
        if isinstance(packed, torch.Tensor) and packed.dim() and packed.shape[0] % 3 == 0:
            del state_dict[f"{prefix}in_proj_{key}"]
            for one, part in zip(_IN_PROJECTIONS, packed.chunk(3), strict=True):
                state_dict[f"{prefix}{one}.{key}"] = part


def _merged(
    attn_mask: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    q: torch.Tensor,
    keys: int,
    extra: int,
) -> torch.Tensor | None:
    """The sum of both masks, to be added to the scores, or None.

    Args:
        attn_mask: [L, S] or [N * heads, L, S], or None.
        key_padding_mask: [N, S] or [S], or None.
        q: [N, heads, L, head_dim].
        keys: S.
        extra: how many keys beyond S, which no mask hides, there are.
    """
    n, heads, length = q.shape[0], q.shape[1], q.shape[2]
    merged: torch.Tensor | None = None
    if attn_mask is not None:
        shared, for_each = [length, keys], [n * heads, length, keys]
        if list(attn_mask.shape) != shared and list(attn_mask.shape) != for_each:
            raise ValueError(
                f"attn_mask must have the shape {shared} or {for_each}, got {list(attn_mask.shape)}"
            )
        merged = _additive("attn_mask", attn_mask, q.dtype)
        if merged.dim() == 3:
            merged = merged.view(n, heads, length, keys)
        else:
            merged = merged.view(1, 1, length, keys)
    if key_padding_mask is not None:
        padding = _additive("key_padding_mask", key_padding_mask, q.dtype).view(-1, 1, 1, keys)
        merged = padding if merged is None else merged + padding
    return merged if merged is None else F.pad(merged, (0, extra))


def _additive(name: str, mask: torch.Tensor, dtype: torch.dtype):
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    if not mask.is_floating_point():
        raise TypeError(f"{name} is {mask.dtype}; allowed: torch.bool and float dtypes")
    return mask.to(dtype)
