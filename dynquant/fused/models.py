"""Models of transformers whose layers are fused: less between the caller and the first layer.

At one short text, what the forward of such a model does besides its layers (defaults read from the
config, masks, capturing) takes as long as they do.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.modules.module import _has_any_global_hook

from dynquant.fused import calls
from dynquant.fused.adapters import name_of, names_in_transformers
from dynquant.fused.arguments import Call
from dynquant.fused.block import FusedBlock
from dynquant.fused.classes import Swapped
from dynquant.fused.embeddings import FusedEmbeddings
from dynquant.fused.encoder import Encoder, encoder_of
from dynquant.fused.functions import runs_as_op
from dynquant.fused.outputs import maker_of
from dynquant.fused.padding import groups_of, hides_nothing, run_in_groups
from dynquant.fused.plan import Watched, holds
from dynquant.fused.readers import READERS

_KNOWN = {
    *names_in_transformers("bert", "BertModel"),
    *names_in_transformers("roberta", "RobertaModel"),
    *names_in_transformers("xlm_roberta", "XLMRobertaModel"),
    *names_in_transformers("camembert", "CamembertModel"),
}
_WAY = "_attn_implementation_internal"
_ASKS_FOR_MORE = ("output_hidden_states", "_output_attentions", "is_decoder", "is_causal")
_OUTPUT = "BaseModelOutputWithPoolingAndCrossAttentions"


def is_known(module):
    """Whether it is such a model, not fused yet, with fused layers."""
    if name_of(type(module)) not in _KNOWN or isinstance(module, Swapped):
        return False
    return all(isinstance(layer, FusedBlock) for layer in module.encoder.layer)


class _Kept(NamedTuple):
    """What a model runs as, for as long as `fixed` holds and it has `count` layers.

    Attributes:
        embeddings: what calls.embedding_sum takes; None where the module is called.
        encoder: the Encoder of its layers.
        pooler: what calls.linear_block takes; None where the module is called.
        output: makes what a call returns.
        returns_dict: where a call does not say it.
    """

    fixed: tuple
    count: int
    embeddings: tuple | None
    encoder: Encoder
    pooler: tuple | None
    output: Callable
    returns_dict: bool


class FusedModel(Swapped):
    """Embeddings, layers, pooler; the forward of the model itself where more is asked for."""

    _NOT_KEPT = ("_kept",)

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, *args, **kwargs):
        ids, types, hidden = input_ids, token_type_ids, None
        if not args and _is_plain(ids, attention_mask, kwargs):
            kept = self._current()
            hidden = None if kept is None else self._embed(kept, ids, types)
        if hidden is None:
            return super().forward(input_ids, attention_mask, token_type_ids, *args, **kwargs)
        hidden = _encode(kept.encoder, hidden, attention_mask)
        if kept.pooler is not None:
            pooled = calls.linear_block(kept.pooler, hidden[:, 0])
        else:
            pooled = None if self.pooler is None else self.pooler(hidden)
        return_dict = kwargs.get("return_dict")
        if kept.returns_dict if return_dict is None else return_dict:
            return kept.output(last_hidden_state=hidden, pooler_output=pooled)
        return (hidden,) if pooled is None else (hidden, pooled)

    def _embed(self, kept, ids, types):
        """The first layer's input; None where the layers cannot run as ops on it."""
        found = kept.embeddings
        if found is None or not calls.can_sum(found, ids, types):
            hidden = self.embeddings(input_ids=ids, token_type_ids=types)
            return hidden if runs_as_op(hidden, self.parameters) else None
        table = found[0]
        if not runs_as_op(table, self.parameters):
            return None
        return calls.embedding_sum(found, ids, types)

    def _current(self):
        """What it runs as now; None where one of its modules has to decide."""
        kept = self.__dict__.get("_kept")
        if kept is not None and kept.count == len(self.encoder.layer) and holds(kept.fixed):
            return kept
        kept = self.__dict__["_kept"] = self._keep()
        return kept

    def _keep(self):
        config, layers = self.config, self.encoder.layer
        values = config.__dict__
        if any(values.get(name) for name in _ASKS_FOR_MORE) or values.get(_WAY) != "sdpa":
            return None
        watched = Watched()
        watched.entries(self.__dict__, {"config": config, "training": False})
        watched.attributes(config, "return_dict", _WAY, *_ASKS_FOR_MORE)
        watched.child(self, "encoder", self.encoder)
        runs = [_watched_run(watched, layers, *named) for named in layers.named_children()]
        if None in runs or not all(_adds_nothing(parts, config) for parts, _, _ in runs):
            return None
        encoder = encoder_of([(parts, attention) for parts, _, attention in runs])
        if encoder is None or not watched.hold():  # one of them has a hook
            return None
        embeddings = _where_it_holds(watched, self._watch_embeddings)
        pooler = _where_it_holds(watched, self._watch_pooler)
        output = maker_of(getattr(sys.modules["transformers.modeling_outputs"], _OUTPUT))
        returns = values.get("return_dict", True)
        return _Kept(watched.fixed(), len(layers), embeddings, encoder, pooler, output, returns)

    def _watch_embeddings(self, watched):
        module = self.embeddings
        if not isinstance(module, FusedEmbeddings):
            return None
        watched.child(self, "embeddings", module)
        return module.watch(watched)

    def _watch_pooler(self, watched):
        run = _watched_run(watched, self, "pooler", self.pooler)
        if run is None:
            return None
        parts, plan, _ = run
        names = parts.adapter.linear_block
        alone = names.first_token and names.residual is None and not parts.adapter.residual
        return plan.linear_block if alone else None


def _where_it_holds(watched, watch):
    """What watch(watched) gives, which is watched as well; None where it does not hold already."""
    more = Watched()
    found = watch(more)
    if found is None or not more.hold():
        return None
    watched.update(more.fixed())
    return found


def _watched_run(watched, parent, name, block):
    """(parts, plan, attention) of a block that runs as ops now, which is watched; or None."""
    parts, plan = block._current_plan() if isinstance(block, FusedBlock) else (None, None)
    if plan is None or plan.fixed is None:
        return None
    watched.child(parent, name, block)
    watched.attributes(block, "_parts")
    watched.update(plan.fixed)
    if parts.attention is not None:
        watched.attributes(parts.attention.core, "config", "is_causal")
    return parts, plan, block._settings[0]


def _adds_nothing(parts, config):
    """Whether a layer adds nothing of its own to a call: it has the model's own config."""
    if getattr(parts.attention.core, "config", None) is not config:
        return False
    x = torch.empty(1, 1, 1)
    return READERS[parts.adapter.family](parts, (x, None), {}) == Call(x)


def _encode(encoder, hidden, mask):
    """The result of the layers. mask: [batch, length], 0 at padding, or None."""
    if mask is None or hides_nothing(mask):
        return encoder.run(hidden, None)
    mask = mask.to(torch.bool)
    groups = groups_of(mask) if encoder.per_token else None
    if groups is None:
        return encoder.run(hidden, mask[:, None, None, :])
    return run_in_groups(groups, hidden, mask, encoder.run)


def _is_plain(ids, mask, kwargs):
    """Whether a call asks for nothing but the result for some ids, in a way that can be kept."""
    # Its values decide which way is taken, which nothing that traces can follow.
    if type(ids) is not torch.Tensor or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if ids.dim() != 2 or not ids.is_cpu:
        return False
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
        return False
    for name, value in kwargs.items():
        if name != "return_dict" and value is not None and value is not False:
            return False
    return not _has_any_global_hook()
