"""What of a model is quantized, and what stays in float."""

from collections import Counter

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from dynquant.swap.registry import STUBS, Forms

_STORED = (torch.int8, torch.uint8, torch.float16, torch.bfloat16)  # weights in state dicts
_WORTH_A_WORD = 0.1  # of the parameters


def quantized_layers(model):
    """The outermost quantized modules, by name; stubs do not count."""
    forms = Forms(None)
    stubs = tuple(form for stub in STUBS for form in forms.of(stub)[1])
    layers = {}
    for name, module in model.named_modules():
        if any(outer == "" or name.startswith(f"{outer}.") for outer in layers):
            continue
        if forms.is_quantized(type(module)) and not isinstance(module, stubs):
            layers[name] = module
    return layers


def share_in_float(model):
    """A sentence about a quantized model: how much of it is not quantized, and in which types."""
    layers = quantized_layers(model)
    quantized = sum(map(_weights_in, layers.values()))
    counts = _float_parameters(model, layers.values())
    total = quantized + sum(counts.values())
    if not total or not counts:
        return "no parameter stays in float"
    return f"{_listed(counts, total)} of the parameters stay in float"


def without_form(model, swapped, forms, on_request):
    """A warning about large parameters of types that are not quantized, or None.

    Embeddings, which other dtypes are for, and layers that could be quantized do not count.

    Args:
        model: the float model.
        swapped: those of its modules that are quantized.
        forms: a Forms.
        on_request: the types of modules that would be quantized if they were asked for.
    """
    counts = _float_parameters(model, swapped, least_dims=2)
    total = sum(parameter.numel() for parameter in model.parameters())
    for kind in counts.keys() - on_request:
        scripted = kind is torch.jit.ScriptModule
        is_left = forms.is_on_request(forms.of(kind)[0])
        if not scripted and not is_left and (forms.has_any(kind) or issubclass(kind, nn.Linear)):
            del counts[kind]
    if sum(counts.values()) < _WORTH_A_WORD * max(total, 1):
        return None
    asked = ", ".join(sorted(kind.__name__ for kind in counts.keys() & on_request))
    but_for = f", but for {asked} where that is asked for" if asked else ""
    return f"{_listed(counts, total)} of the parameters stay in float: no quantized form{but_for}"


def _float_parameters(model, swapped, least_dims=0):
    """The number of elements by type of module; scripted modules count as one type.

    What a parametrization, weight_norm say, makes a weight of is the parametrized module's.
    """
    done = {id(inner) for outer in swapped for inner in outer.modules()}
    counts, seen = Counter(), set()
    for module in model.modules():
        if id(module) in done:
            continue
        scripted = isinstance(module, torch.jit.ScriptModule)
        kind = torch.jit.ScriptModule if scripted else type_before_parametrizations(module)
        originals = [] if kind is type(module) or scripted else module.parametrizations.parameters()
        for parameter in (*module.parameters(recurse=False), *originals):
            held = parameter.data_ptr() if scripted else id(parameter)
            if parameter.dim() >= least_dims and parameter.numel() and held not in seen:
                counts[kind] += parameter.numel()
                seen.add(held)
    return counts


def _listed(counts, total):
    kinds = [f"{kind.__name__} {count / total:.1%}" for kind, count in counts.most_common(5)]
    more = ", ..." if len(counts) > 5 else ""
    return f"{sum(counts.values()) / total:.1%} ({', '.join(kinds)}{more})"


def _weights_in(module: nn.Module):
    """The number of elements of a quantized module's weights."""
    count = 0
    for value in module.state_dict().values():
        if value.dtype in _STORED and value.dim() >= 2:
            count += value.numel()
    # Rows in 4 bits hold two values a byte.
    return count * (2 if getattr(module, "bits", 8) == 4 else 1)
