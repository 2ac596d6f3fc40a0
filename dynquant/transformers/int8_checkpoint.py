"""A checkpoint that dynquant has quantized, as it is loaded."""

import warnings

import torch
from torch import nn

from dynquant import nn as quantized
from dynquant.nn._module import QuantizedModule
from dynquant.quantize import quantize_dynamic
from dynquant.swap.places import replace_modules
from dynquant.swap.ties import keep_ties, remember_shared
from dynquant.transformers.entry_names import FloatNames, while_loading
from dynquant.transformers.stand_ins import AttentionStandIn, StateStandIn


class Int8Checkpoint:
    """Has stand-ins receive the tensors of each quantized module.

    Args:
        model: with its parameters on the meta device.
        config: a DynquantConfig.
    """

    def __init__(self, model, config):
        self._config = config
        self._floats = dict(model.named_modules())
        remember_shared(model, list(model.all_tied_weights_keys.items()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # given when the model was quantized
            quantize_dynamic(model, config.spec_for(model), inplace=True)
        self._stand_ins = {
            name: self._stand_in(name, module)
            for name, module in model.named_modules()
            if isinstance(module, QuantizedModule)
        }
        replace_modules(model, {one.form: one for one in self._stand_ins.values()})
        self._attentions = {
            module: AttentionStandIn(module)
            for module in model.modules()
            if isinstance(module, quantized.MultiheadAttention)
        }
        replace_modules(model, self._attentions)
        _forget_ties(model, self._stand_ins)

    def _stand_in(self, name, module):
        return StateStandIn(module)

    def conversions(self, conversions, model):
        """Those of transformers, around which the entries of quantized modules keep their names."""
        names = [
            f"{name}.{key}" for name, one in self._stand_ins.items() for key in one._parameters
        ]
        return while_loading(conversions, names, model.base_model_prefix)

    def finish(self, model):
        forms, missing = {one: form for form, one in self._attentions.items()}, []
        for name, stand_in in self._stand_ins.items():
            found = stand_in.found()
            if found:
                stand_in.load(found, name)
                forms[stand_in] = stand_in.form
            elif name in self._floats:
                forms[stand_in] = _initialized(model, self._floats[name])
                missing.append(name)
            else:
                raise ValueError(f"the checkpoint has nothing for {name}")
        has_others = any(isinstance(one, FloatNames) for one in model._weight_conversions)
        if missing and len(missing) == len(self._stand_ins) and has_others:
            raise ValueError(
                f"{type(model).__name__} has other names than the checkpoint, in which modules are "
                f"quantized: there is nothing for {missing[0]}; load it as the class that its "
                "config.json names, or with transformers.AutoModel"
            )
        replace_modules(model, forms)
        self._config.keep_float(missing)
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if isinstance(module, nn.Linear) and weight is not None and weight.dtype == torch.int8:
                raise ValueError(
                    f"{name} is quantized in the checkpoint, but in float by "
                    f"modules_to_not_convert={self._config.modules_to_not_convert}"
                )


def _forget_ties(model, names):
    """A quantized module has a weight of its own, which is saved: nothing is to be tied to it."""
    kept = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if target.rpartition(".")[0] not in names and source.rpartition(".")[0] not in names
    }
    keep_ties(model, "all_tied_weights_keys", kept)


def _initialized(model, module):
    """A float module that the checkpoint does not have, initialized as the model does it."""
    module.to_empty(device="cpu")
    with torch.no_grad():
        model._init_weights(module)
    return module
