"""Models of transformers whose layers are fused: less between the caller and the first layer.

At one short text, what the forward of such a model does besides its layers (defaults read from the
config, masks, capturing) takes as long as they do.
"""

import sys
from typing import NamedTuple

import torch
from torch.nn.modules.module import _has_any_global_hook

from dynquant.fused.adapters import name_of
from dynquant.fused.arguments import READERS, Call
from dynquant.fused.block import FusedBlock, compute
from dynquant.fused.classes import Swapped
from dynquant.fused.functions import runs_as_op
from dynquant.fused.hooks import disturbed
from dynquant.fused.padding import groups_of, run_in_groups
from dynquant.fused.plan import Watched, holds

_KNOWN = {
    f"transformers.models.{module}.modeling_{module}.{name}"
    for module, name in (
        ("bert", "BertModel"),
        ("roberta", "RobertaModel"),
        ("xlm_roberta", "XLMRobertaModel"),
        ("camembert", "CamembertModel"),
    )
}
_WAY = "_attn_implementation_internal"
_OUTPUT = "BaseModelOutputWithPoolingAndCrossAttentions"


def is_known(module):
    """Whether it is such a model, not fused yet, with fused layers."""
    if name_of(type(module)) not in _KNOWN or isinstance(module, Swapped):
        return False
    return all(isinstance(layer, FusedBlock) for layer in module.encoder.layer)


class _Layers(NamedTuple):
    """All layers of a model and its pooler, for as long as `fixed` holds and there are as many.

    Attributes:
        runs: parts, plan and attention of each layer.
        pooler: those of the pooler; None where it is called.
        per_token: whether no row depends on another sequence.
    """

    fixed: tuple
    runs: list
    pooler: tuple | None
    per_token: bool

    def run(self, hidden, mask):
        for parts, plan, attention in self.runs:
            hidden = compute(parts, plan, Call(hidden, mask), attention)
        return hidden


def _watched_run(watched, parent, name, block):
    """(parts, plan, attention) of a block that runs as ops now, which is watched; or None."""
    parts, plan = block._current_plan() if isinstance(block, FusedBlock) else (None, None)
    if plan is None or plan.fixed is None:
        return None
    watched.child(parent, name, block)
    watched.attributes(block, "_parts")
    watched.update(plan.fixed)
    return parts, plan, block._settings[0]


class FusedModel(Swapped):
    """Embeddings, layers, pooler; the forward of the model itself where more is asked for."""

    _NOT_KEPT = ("_layers",)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, *args, **kwargs):
        return_dict = kwargs.get("return_dict")
        if args or not self._fits(input_ids, attention_mask, kwargs):
            return super().forward(input_ids, attention_mask, token_type_ids, *args, **kwargs)
        mask = None
        if attention_mask is not None and not attention_mask.all():
            mask = attention_mask.to(torch.bool)
        hidden = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        hidden, pooled = self._run_layers(hidden, mask)
        if self.config.__dict__.get("return_dict", True) if return_dict is None else return_dict:
            made = getattr(sys.modules["transformers.modeling_outputs"], _OUTPUT)
            return made(last_hidden_state=hidden, pooler_output=pooled)
        return (hidden,) if pooled is None else (hidden, pooled)

    def _run_layers(self, hidden, mask):
        seen = None if mask is None else mask[:, None, None, :]
        layers = self._current_layers(hidden)
        if layers is None or not runs_as_op(hidden, self.parameters):
            for layer in self.encoder.layer:
                hidden = layer(hidden, seen)
            return hidden, None if self.pooler is None else self.pooler(hidden)
        groups = groups_of(mask) if mask is not None and layers.per_token else None
        if groups is None:
            hidden = layers.run(hidden, seen)
        else:
            hidden = run_in_groups(groups, hidden, mask, layers.run)
        if layers.pooler is None:
            return hidden, None if self.pooler is None else self.pooler(hidden)
        parts, plan, attention = layers.pooler
        call = READERS[parts.adapter.family](parts, (hidden,), {})
        return hidden, compute(parts, plan, call, attention)

    def _current_layers(self, hidden):
        """What all layers run as without a call of each; None where one of them has to decide."""
        known, held = self.__dict__.get("_layers"), self.encoder.layer
        if known is not None and len(known.runs) == len(held) and holds(known.fixed):
            return known
        self.__dict__["_layers"] = None
        watched, runs = Watched(), []
        for name, layer in held.named_children():
            run = _watched_run(watched, held, name, layer)
            if run is None or not self._says_nothing(run[0], hidden):
                return None
            watched.attributes(run[0].attention.core, "config", "is_causal")
            runs.append(run)
        if not watched.hold():  # a layer itself has a hook
            return None
        beside = Watched()
        pooler = _watched_run(beside, self, "pooler", self.pooler)
        if pooler is not None and beside.hold():
            watched.update(beside.fixed())
        else:
            pooler = None
        per_token = all(parts.scheme[0] for parts, _, _ in runs)
        layers = self.__dict__["_layers"] = _Layers(watched.fixed(), runs, pooler, per_token)
        return layers

    def _says_nothing(self, parts, hidden):
        """Whether a layer adds nothing of its own to the call: it has the model's own config."""
        if getattr(parts.attention.core, "config", None) is not self.config:
            return False
        call = READERS[parts.adapter.family](parts, (hidden, None), {})
        return call == Call(hidden)

    def _fits(self, ids, mask, kwargs):
        if self.training or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or not ids.is_cpu:
            return False
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
            return False
        for name, value in kwargs.items():
            if name != "return_dict" and value is not None and value is not False:
                return False
        # Its values decide which way is taken, which nothing that traces can follow.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(ids) is not torch.Tensor:
            return False
        config = self.config.__dict__
        asked = ("output_hidden_states", "_output_attentions", "is_decoder", "is_causal")
        if any(config.get(name) for name in asked) or config.get(_WAY) != "sdpa":
            return False
        return not (_has_any_global_hook() or disturbed(self.encoder))
