"""A float checkpoint, quantized while it is loaded."""

import warnings
from itertools import chain

import torch
from torch import nn

from dynquant import nn as quantized
from dynquant.quantize import quantize_dynamic
from dynquant.swap.places import replace_modules
from dynquant.swap.plan import plan_from_spec
from dynquant.swap.registry import Forms
from dynquant.swap.ties import remember_shared
from dynquant.transformers.stand_ins import StandIn

_OF_ONE_WEIGHT = (
    quantized.Linear,
    quantized.HalfLinear,
    quantized.Embedding,
    quantized.EmbeddingBag,
)


class FloatCheckpoint:
    """Quantizes a module as soon as its weight is read where it has but one, others once all are.

    Args:
        model: with its parameters on the meta device.
        config: a DynquantConfig.
    """

    def __init__(self, model, config):
        self._config = config
        config.warn_of_unknown_names(model)
        remember_shared(model, list(model.all_tied_weights_keys.items()))
        tied = set(chain.from_iterable(model.all_tied_weights_keys.items()))
        plan = plan_from_spec(model, config.spec_for(model), torch.qint8, None, True, None)
        plan.warn_of_large_floats(model, Forms(None))
        for message in plan.warnings:
            warnings.warn(message, stacklevel=2)
        self._awaited = {  # by the name of the weight
            f"{item.name}.weight": item
            for item in plan.items
            if item.name and issubclass(item.form, _OF_ONE_WEIGHT)
            if not any(f"{item.name}.{key}" in tied for key in ("weight", "bias"))
        }
        self._found = set()
        self._stand_ins = []

    def awaits(self, key):
        return key in self._awaited

    def take(self, key, weight):
        """Takes a float weight from the checkpoint.

        Returns:
            whether its module is quantized now; otherwise the weight is to be set as it is.
        """
        item = self._awaited[key]
        self._found.add(key)
        bias = item.module._parameters.get("bias")
        if bias is not None and bias.is_meta:  # comes later, or never
            return False
        item.module.weight = nn.Parameter(weight, requires_grad=False)
        try:
            stand_in = StandIn(item.form.from_float(item.module, item.qconfig))
        except ValueError:  # which quantize_dynamic raises again, with the weight's whole name
            return False
        for parent, name in item.places:
            parent._modules[name] = stand_in
        self._stand_ins.append(stand_in)
        return True

    def finish(self, model):
        replace_modules(model, {one: one.form for one in self._stand_ins})
        missing = [item.name for key, item in self._awaited.items() if key not in self._found]
        self._config.keep_float(missing)
        quantize_dynamic(model, self._config.spec_for(model), inplace=True)
