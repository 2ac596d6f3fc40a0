"""fuse and fused_blocks: which blocks of a model run as ops."""

import copy
import warnings

from torch import nn

from dynquant.fused.adapters import adapter_for
from dynquant.fused.block import FusedBlock, FusedTorchLayer
from dynquant.fused.classes import base_of, swap_class
from dynquant.fused.comparison import LEAST_DB, difference
from dynquant.fused.embeddings import FusedEmbeddings, sum_names
from dynquant.fused.functions import FusedActivation, FusedNorm
from dynquant.fused.models import FusedModel, is_known
from dynquant.fused.parts import Parts
from dynquant.qconfig import one_of
from dynquant.swap.undo import all_or_nothing


def fuse(model: nn.Module, inplace: bool = False, *, attention: str = "integer") -> nn.Module:
    """The model whose known blocks run as single ops: feed-forward, attention, encoder layers.

    Modules, their names, the state dict, copies, pickles and saving stay what they are: instances
    of the blocks get a class derived from their own. What a fused block cannot do (gradients,
    hooks and adapters on what is inside, autocast, returned attention weights, caches, arguments
    that are not known) runs for that call as it did before, by the same float functions.

    Args:
        model: what quantize_dynamic gave; blocks whose linear layers are not dynquant.nn.Linear
            with per_token, asymmetric activations stay as they are.
        inplace: change `model` itself instead of a copy; where the call does not end well, an
            interrupt included, it is left as it was.
        attention: "integer" computes the scores and the sums of values from 8-bit queries, keys
            and values; "float" in fp32.

    Returns:
        A model in eval mode; `model` itself where inplace.

    Raises:
        TypeError: where model is not an nn.Module.
        ValueError: for another attention.

    Warns:
        UserWarning: about known blocks that stay as they are, and why: each is compared with the
            original on a random and on a padded batch. Also where no block is known.
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
    blocks = {name: block for name, block in model.named_modules() if adapter_for(type(block))}
    reasons, whole = {}, {}
    for name, block in blocks.items():
        parts = Parts(block, adapter_for(type(block)))
        reason = parts.obstacle or difference(block, parts, attention)
        if reason:
            reasons[name] = reason
        else:
            whole[name] = parts
    for name, parts in whole.items():
        of_torch = parts.adapter.family == "torch_layer"
        swap_class(blocks[name], FusedTorchLayer if of_torch else FusedBlock, attention)
        _run_functions_as_ops(parts)
    for module in list(model.modules()) if whole else ():
        names = sum_names(module)
        if names is not None:
            swap_class(getattr(module, names.norm), FusedNorm, "layer")
            swap_class(module, FusedEmbeddings, names)
        elif is_known(module):
            swap_class(module, FusedModel)
    _warn(blocks, reasons, any(isinstance(module, FusedBlock) for module in model.modules()))


def _run_functions_as_ops(parts):
    """So that the block gives the same bits where it does not run fused."""
    for norm in parts.norms():
        swap_class(norm.module, FusedNorm, norm.kind)
    if parts.feed_forward is not None and isinstance(parts.feed_forward.function, nn.Module):
        swap_class(parts.feed_forward.function, FusedActivation, parts.feed_forward.activation)


def _warn(blocks, reasons, any_fused):
    if not blocks and not any_fused:
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

    Blocks inside one that is fused are left out.
    """
    found: dict[str, str] = {}
    for name, block in model.named_modules():
        inside = any(
            not why and (outer == "" or name.startswith(f"{outer}."))
            for outer, why in found.items()
        )
        adapter = adapter_for(base_of(type(block)))
        if adapter is None or inside:
            continue
        if isinstance(block, FusedBlock):
            found[name] = block.why_not()
        else:
            parts = Parts(block, adapter)
            found[name] = parts.obstacle or difference(block, parts, "float") or "not fused yet"
    return found
