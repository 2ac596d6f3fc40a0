"""fuse and fused_blocks: which blocks of a model run as ops."""

import copy
import warnings

from torch import nn

from dynquant.fused.bidirectional import FusedBidirectional, is_bidirectional
from dynquant.fused.block import FusedBlock, FusedTorchLayer
from dynquant.fused.classes import swap_class
from dynquant.fused.comparison import (
    LEAST_DB,
    chain_difference,
    difference,
    experts_difference,
    sublayers_difference,
)
from dynquant.fused.decoder import FusedDecoder, token_plan_of
from dynquant.fused.embeddings import FusedEmbeddings, sum_names
from dynquant.fused.experts import FusedExperts, activation_of_experts
from dynquant.fused.functions import FusedActivation, FusedNorm, norm_of
from dynquant.fused.inline import FusedInline
from dynquant.fused.known import known_as, stranger_in
from dynquant.fused.mixers import FusedMixer, is_mixer
from dynquant.fused.models import FusedModel, is_known
from dynquant.fused.parts import Parts
from dynquant.fused.sequential import Chain, FusedSequential, chain_of
from dynquant.fused.texts import FusedTexts, is_text_model
from dynquant.qconfig import one_of
from dynquant.swap.undo import all_or_nothing


def fuse(model: nn.Module, inplace: bool = False, *, attention: str = "integer") -> nn.Module:
    """The model whose known blocks run as single ops: feed-forward, attention, encoder layers.

    Norms that libraries make of many ops of torch run as one as well, wherever they are, and so do
    the functions of linear attention, state spaces and short convolutions, and the experts of a
    mixture.

    Modules, their names, the state dict, copies, pickles and saving stay what they are: instances
    of the blocks get a class derived from their own. What a fused block cannot do (gradients,
    hooks and adapters on what is inside, autocast, returned attention weights, caches but in some
    decoders, arguments that are not known) runs for that call as it did before, by the same float
    functions.

    Args:
        model: what quantize_dynamic gave; blocks whose linear layers are not dynquant.nn.Linear
            with per_token, asymmetric activations stay as they are.
        inplace: change `model` itself instead of a copy; where the call does not end well, an
            interrupt included, it is left as it was.
        attention: "integer" computes the scores and the sums of values from 8-bit queries, keys
            and values; "float" in fp32. Decoders are computed in fp32 in any case, prompts as well
            as tokens behind a cache, but for those that attend to an encoder's output too, where
            they have no cache.

    Returns:
        A model in eval mode; `model` itself where inplace.

    Raises:
        TypeError: where model is not an nn.Module.
        ValueError: for another attention.

    Warns:
        UserWarning: about known blocks that stay as they are, and why: each is compared with the
            original on a random and on a padded batch, or on prompts and tokens. Also where
            no block and no such function is known.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; expected an nn.Module")
    one_of("attention", attention, list(LEAST_DB))
    if not inplace:
        model = copy.deepcopy(model)
    with all_or_nothing(model):
        _fuse(model, attention)
    return model


def _fuse(model, attention):
    model.eval()
    blocks = dict(_blocks_of(model))
    reasons, whole = {}, []
    for name, (block, parts) in blocks.items():
        reason = _why_not(block, parts, attention)
        if reason:
            reasons[name] = reason
        else:
            whole.append((name, block, parts))
    for _, block, parts in whole:
        if isinstance(parts, Chain):
            swap_class(block, FusedSequential)
        else:
            settings = attention, parts.known_as, parts.inner_activation()
            swap_class(block, _kind_of(parts.adapter), *settings)
        _run_as_ops(parts.norms(), parts.activations())
    for name, block, parts in whole:
        composed = isinstance(block, FusedInline) and parts.adapter.sublayers is not None
        if composed and (reason := _fuse_sublayers(block, attention)):
            reasons[f"{name} around its attentions"] = reason
    mixers = [module for module in model.modules() if is_mixer(module)]
    for module in mixers:
        swap_class(module, FusedMixer)
    experts = _fuse_experts(model, reasons)
    for module in list(model.modules()) if whole or mixers or experts else ():
        names = sum_names(module)
        if names is not None:
            swap_class(getattr(module, names.norm), FusedNorm, "layer")
            swap_class(module, FusedEmbeddings, names)
        elif is_known(module):
            swap_class(module, FusedModel)
        elif is_text_model(module):
            swap_class(module, FusedTexts)
        elif is_bidirectional(module):
            swap_class(module, FusedBidirectional)
        elif not module._modules and (kind := _slow_norm(module)) is not None:
            swap_class(module, FusedNorm, kind)
    _warn(blocks or mixers or experts, reasons)


def _fuse_experts(model, reasons):
    """Lets the experts of mixtures run as ops.

    Returns:
        whether there are any whose op is known.
    """
    found = False
    for name, module in list(model.named_modules()):
        activation = activation_of_experts(module)
        if activation is None:
            continue
        found = True
        if reason := experts_difference(module, activation):
            reasons[name] = reason
        else:
            _run_as_ops((), [(module.act_fn, activation)])
            swap_class(module, FusedExperts, activation)
    return found


def _slow_norm(module):
    """What a norm computes that a library makes of many ops; None for any other module."""
    if isinstance(module, (nn.LayerNorm, nn.Identity)):
        return None
    return norm_of(module) or None


def _fuse_sublayers(block, attention):
    """Lets an inline block run all that it is as ops, where its attentions do.

    Returns:
        why it cannot, though they do, or "".
    """
    parts, plan = block._current_plan()
    of_token = None if plan is None else token_plan_of(block, parts, plan)
    if of_token is None:
        return ""
    if reason := sublayers_difference(block, of_token):
        return reason
    _run_as_ops(of_token.norms)
    swap_class(block, FusedDecoder, attention, parts.known_as, None)
    return ""


def _kind_of(adapter):
    if adapter.inline:
        return FusedInline
    return FusedTorchLayer if adapter.family == "torch_layer" else FusedBlock


def _blocks_of(model):
    """(name, (block, its Parts or Chain)) of each block that is known."""
    for name, block in model.named_modules():
        if isinstance(block, FusedBlock):
            parts = Parts(block, *block._settings[1:])
        else:
            known = known_as(block)
            parts = chain_of(block) if known is None else Parts(block, known)
        if parts is not None:
            yield name, (block, parts)


def _why_not(block, parts, attention):
    """What stands against fusing it, or ""."""
    if isinstance(parts, Chain):
        return chain_difference(parts)
    stranger = parts.obstacle or stranger_in(block, parts.adapter)
    return stranger or difference(block, parts, attention)


def _run_as_ops(norms, activations=()):
    """So that a block gives the same bits where it does not run fused."""
    for norm in norms:
        swap_class(norm.module, FusedNorm, norm.kind)
    for function, activation in activations:
        if isinstance(function, nn.Module):
            swap_class(function, FusedActivation, activation)


def _warn(known, reasons):
    if not known:
        warnings.warn(
            "fuse: no block of the model is known; dynquant.fused.register makes one known",
            UserWarning,
            stacklevel=4,
        )
    if reasons:
        listed = "; ".join(f"{name or 'the model'}: {why}" for name, why in reasons.items())
        warnings.warn(f"fuse: left as it is: {listed}", UserWarning, stacklevel=4)


def fused_blocks(model: nn.Module) -> dict[str, str]:
    """What stands against running each known block of `model` fused, by its name: "" for nothing.

    Blocks inside one that runs as ops as a whole are left out.
    """
    found: dict[str, str] = {}
    whole: list[str] = []
    for name, (block, parts) in _blocks_of(model):
        if any(outer == "" or name.startswith(f"{outer}.") for outer in whole):
            continue
        if isinstance(block, FusedBlock | FusedSequential):
            found[name] = block.why_not()
        else:
            found[name] = _why_not(block, parts, "float") or "not fused yet"
        if not found[name] and not isinstance(block, FusedInline):
            whole.append(name)
    return found
