"""dequantize: a float model of a quantized one."""

import copy
import sys
import warnings
from functools import partial

from torch import nn

from dynquant.fused.classes import base_of, unswap_class
from dynquant.quantize import keep_hooks
from dynquant.swap.copies import copied
from dynquant.swap.own_thread import on_own_thread, stop_if_interrupted
from dynquant.swap.places import replace_modules
from dynquant.swap.registry import Forms
from dynquant.swap.ties import Shared
from dynquant.swap.undo import all_or_nothing


def dequantize(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The float model of a quantized one, with the dequantized values as its weights.

    Every quantized module gives way to a float one of the type that it was made from (nn.Linear for
    a type derived from it), in the dtype that its weights show. Its state dict is one of the float
    model, which can be loaded into that, or trained. Weights that were shared are shared again
    unless one of them was changed since. Blocks that dynquant.fuse made run as single ops run as
    written again. Stubs become stubs that have seen no data.

    Args:
        model: what quantize_dynamic, convert, fuse or from_pretrained gave.
        inplace: change `model` itself instead of a copy; where the call does not end well, an
            interrupt included, it is left as it was.

    Returns:
        The float model: a new one that shares no memory with `model`, or `model` itself where
        inplace; its modules are in the mode that they were in. A `model` that is itself a quantized
        module gives its float module either way. Hooks are kept.

    Raises:
        TypeError: where model is no nn.Module, or inplace no bool.

    Warns:
        UserWarning: where nothing is quantized; about modules that stay quantized, which are those
            of a `mapping` of the user's own without a method to_float, and those that
            dynquant.parallel has spread over processes.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; expected an nn.Module")
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace is {inplace!r}; expected a bool")
    with all_or_nothing(model):
        return _dequantize(model, inplace)


def _dequantize(model, inplace):
    forms = _outermost(model)
    left = {name: form for name, form in forms.items() if not _has_float(form)}
    _warn(forms, left)
    floats = _made([form for name, form in forms.items() if name not in left])
    shared = Shared(model)
    if inplace:
        for form, mod in floats.items():
            keep_hooks(form, mod, lambda hooks: hooks)
        replace_modules(model, floats)
        model = floats.get(model, model)
    else:
        memo = {id(form): mod for form, mod in floats.items()}
        model = copied(model, memo)
        for form, mod in floats.items():
            keep_hooks(form, mod, partial(copy.deepcopy, memo=memo))
    for module in model.modules():
        unswap_class(module)
    if not left:
        shared.tie(model)
        if "dynquant.transformers" in sys.modules:
            sys.modules["dynquant.transformers"].take_config(model)
    return model


def _outermost(model):
    """The outermost quantized modules, stubs included, by name."""
    kinds, found = Forms(None), {}
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(f"{outer}.") for outer in found)
        if not inside and kinds.is_quantized(type(module)):
            found[name] = module
    return found


def _has_float(form):
    """Whether to_float speaks of this very type: one that derives from ours may need another."""
    kind = base_of(type(form))
    return Forms(None).is_own(kind) or not kind.to_float.__module__.startswith("dynquant.")


def _warn(forms, left):
    if not forms:
        warnings.warn("dequantize: nothing is quantized", UserWarning, stacklevel=4)
    elif left:
        listed = ", ".join(
            f"{name or 'the model'} ({type(form).__name__})" for name, form in left.items()
        )
        warnings.warn(
            f"dequantize: left quantized, without a to_float of their own: {listed}",
            UserWarning,
            stacklevel=4,
        )


@on_own_thread
def _made(forms):
    """The float modules by the quantized ones."""
    made = {}
    for form in forms:
        stop_if_interrupted()
        made[form] = form.to_float()
    return made
