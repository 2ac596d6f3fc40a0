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

_AT_ONCE = (
    quantized.Linear,
    quantized.Linear16bit,
    quantized.Conv1d,
    quantized.ConvTranspose1d,
    quantized.Embedding,
    quantized.EmbeddingBag,
    quantized.Experts,
)


class FloatCheckpoint:
    """Quantizes most modules as soon as their parameters are read, others once all of a model are.

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
        plan.warn_of_large_floats(model, Forms(None), getattr(torch, config.dtype))
        for message in plan.warnings:
            warnings.warn(message, stacklevel=2)
        self._awaited = {}  # items by the names of parameters
        self._missing = {}  # items by the names of weights that were not read yet
        for item in filter(_is_made_at_once, plan.items):
            weights, biases = (
                {
                    f"{item.name}.{key}": item
                    for key, value in parameters.items()
                    if value is not None
                }
                for parameters in item.form._float_parameters(item.module)
            )
            if tied.isdisjoint([*weights, *biases]):
                self._awaited |= weights | biases
                self._missing |= weights
        self._stand_ins = []

    def awaits(self, key):
        return key in self._awaited

    def take(self, key, tensor):
        """Takes a float parameter from the checkpoint.

        Returns:
            whether its module is quantized now; otherwise the parameter is to be set as it is.
        """
        item = self._awaited[key]
        self._missing.pop(key, None)
        own = key.rpartition(".")[2]
        others = item.module.named_parameters()
        if any(one.is_meta for name, one in others if name != own):  # comes later, or never
            return False
        setattr(item.module, own, nn.Parameter(tensor, requires_grad=False))
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
        self._config.keep_float({item.name for item in self._missing.values()})
        quantize_dynamic(model, self._config.spec_for(model), inplace=True)


def _is_made_at_once(item):
    return item.name and issubclass(item.form, _AT_ONCE)
