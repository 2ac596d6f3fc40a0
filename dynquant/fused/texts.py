"""Models of transformers that encode texts: padding behind them is left out where it is much."""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from dynquant import nn as quantized
from dynquant.fused.adapters import adapter_named, name_of, names_in_transformers
from dynquant.fused.arguments import by_name
from dynquant.fused.block import FusedBlock
from dynquant.fused.classes import Swapped, SwappedModel
from dynquant.fused.hooks import first_disturbance
from dynquant.fused.padding import groups_of, hides_nothing

# Those of BERT's kind have a forward of their own, which does so as well: models.py.
_KNOWN = {
    *names_in_transformers("deberta_v2", "DebertaV2Model"),
    *names_in_transformers("distilbert", "DistilBertModel"),
    *names_in_transformers("electra", "ElectraModel"),
    *names_in_transformers("ernie", "ErnieModel"),
    *names_in_transformers("gte", "GteModel"),
    *names_in_transformers("jina_embeddings_v3", "JinaEmbeddingsV3Model"),
    *names_in_transformers("modernbert", "ModernBertModel"),
    *names_in_transformers("mpnet", "MPNetModel"),
    *names_in_transformers("nomic_bert", "NomicBertModel"),
}
_CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d, quantized.Conv1d, quantized.ConvTranspose1d)
# The angles of others depend on the longest text of a batch.
_ROTARY = (None, "default", "linear", "llama3", "yarn", "proportional")
_FIRST = ("input_ids", "attention_mask")
_ASKS_FOR_MORE = ("output_hidden_states", "_output_attentions", "is_decoder")


def is_text_model(module):
    """Whether it is such a model, not fused yet, and the attentions of all its layers are fused."""
    if name_of(type(module)) not in _KNOWN or isinstance(module, Swapped):
        return False
    if any(isinstance(one, _CONVOLUTIONS) for one in module.modules()):
        return False  # they see what is behind a text
    return _attentions_of(module) is not None


class FusedTexts(SwappedModel):
    """A model in which no token depends on other texts, nor on padding behind its own.

    Where a batch has much padding, texts of about the same length run together. Tokens have the
    same bits then; there are zeros at the padding.
    """

    def _called(self, base, args, kwargs):
        groups = _groups_of_call(self, args, kwargs)
        if groups is None:
            return base(self, *args, **kwargs)
        return _run(self, base, groups, args, kwargs)


def _run(model, base, groups, args, kwargs):
    given = by_name(_FIRST, args, kwargs)
    mask = given["attention_mask"]
    results = []
    for indices, length in groups:
        some = {
            name: value[indices, :length] if isinstance(value, torch.Tensor) else value
            for name, value in given.items()
        }
        results.append(base(model, **some))
    seen = mask.to(torch.bool)
    if isinstance(results[0], tuple):
        fields = zip(*results, strict=True)
        return tuple(_joined(list(field), groups, seen) for field in fields)
    names = results[0].keys()
    fields = {name: _joined([one[name] for one in results], groups, seen) for name in names}
    return type(results[0])(**fields)


def _joined(parts, groups, seen):
    """[batch, length, features] of texts' tokens, [batch, features] of texts, or None."""
    if parts[0] is None:
        return None
    of_tokens = parts[0].dim() == 3
    shape = (*seen.shape, parts[0].shape[-1]) if of_tokens else (len(seen), parts[0].shape[-1])
    result = parts[0].new_zeros(shape)
    for (indices, length), part in zip(groups, parts, strict=True):
        if of_tokens:
            result[indices, :length] = part.masked_fill(~seen[indices, :length, None], 0)
        else:
            result[indices] = part
    return result


def _groups_of_call(model, args, kwargs):
    """What groups_of gives, or None where the texts run as they are given."""
    # Values decide which way is taken, which nothing that traces can follow.
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _has_any_global_hook():
        return None
    given = by_name(_FIRST, args, kwargs)
    if given is None:
        return None
    ids, mask = given.pop("input_ids", None), given.pop("attention_mask", None)
    if not all(type(one) is torch.Tensor and one.dim() == 2 for one in (ids, mask)):
        return None
    if ids.shape != mask.shape or not ids.is_cpu or not mask.is_cpu:
        return None
    for name, value in given.items():
        if value is None or value is False or name == "return_dict":
            continue
        if name != "token_type_ids" or getattr(value, "shape", None) != ids.shape:
            return None
    groups = None if hides_nothing(mask) else groups_of(mask.to(torch.bool))
    return groups if groups is not None and _is_by_token(model) else None


def _is_by_token(model):
    """Whether the model runs now as FusedTexts says."""
    values = model.config.__dict__
    if model.training or any(values.get(name) for name in _ASKS_FOR_MORE):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled() and any(one.requires_grad for one in model.parameters()):
        return False
    named = [(name, one) for name, one in model.named_modules() if one is not model]
    if first_disturbance(named) or not all(_is_of_tokens(one) for _, one in named):
        return False
    attentions = _attentions_of(model)
    return attentions is not None and all(one._current_plan()[1] is not None for one in attentions)


def _is_of_tokens(module):
    """Whether nothing that it computes is of a whole batch: ranges, angles."""
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return getattr(module, "per_token", True) and all(kind in _ROTARY for kind in kinds)


def _attentions_of(model):
    """The fused blocks that have an attention, where there are as many as layers; or None."""
    found = [
        one
        for one in model.modules()
        if isinstance(one, FusedBlock) and adapter_named(one._settings[1]).attention is not None
    ]
    # A layer of BERT's kind is one, and so is the attention in it, which it does not call.
    outer = _outermost(found)
    return outer if len(outer) == getattr(model.config, "num_hidden_layers", None) else None


def _outermost(blocks):
    inside = {id(one) for block in blocks for one in block.modules() if one is not block}
    return [block for block in blocks if id(block) not in inside]
