"""What of a model is quantized, and what stays in float."""

from collections import Counter

import torch
from torch import nn

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


def without_form(model, swapped, forms):
    """A warning about large parameters of types that cannot be quantized, or None.

    Embeddings, which other dtypes are for, and layers that could be quantized do not count, but for
    those that are quantized only where they are asked for.

    Args:
        model: the float model.
        swapped: those of its modules that are quantized.
        forms: a Forms.
    """
    counts = _float_parameters(model, swapped, least_dims=2)
    total = sum(parameter.numel() for parameter in model.parameters())
    on_request = {kind for kind in counts if forms.is_on_request(forms.of(kind)[0])}
    for kind in counts.keys() - on_request:
        scripted = kind is torch.jit.ScriptModule
        if not scripted and (forms.has_any(kind) or issubclass(kind, nn.Linear)):
            del counts[kind]
    if sum(counts.values()) < _WORTH_A_WORD * max(total, 1):
        return None
    why = "no quantized form"
    if on_request:
        names = ", ".join(sorted(kind.__name__ for kind in on_request))
        why += f", or ({names}) one only where it is asked for"
    return f"{_listed(counts, total)} of the parameters stay in float: {why}"


def _float_parameters(model, swapped, least_dims=0):
    """The number of elements by type of module; scripted modules count as one type."""
    done = {id(inner) for outer in swapped for inner in outer.modules()}
    counts, seen = Counter(), set()
    for module in model.modules():
        if id(module) in done:
            continue
        scripted = isinstance(module, torch.jit.ScriptModule)
        for parameter in module.parameters(recurse=False):
            held = parameter.data_ptr() if scripted else id(parameter)
            if parameter.dim() >= least_dims and parameter.numel() and held not in seen:
                counts[torch.jit.ScriptModule if scripted else type(module)] += parameter.numel()
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
