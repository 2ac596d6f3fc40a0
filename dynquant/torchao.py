"""torchao: dynquant's layers through torchao.quantization.quantize_, or in place of torchao's own.

torchao.quantization.quantize_(model, dynquant.torchao.DynamicActivationInt8WeightConfig())
model = dynquant.torchao.from_torchao(model)
"""

from dataclasses import dataclass

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import Int8Tensor
from torchao.quantization.transform_module import register_quantize_module_handler
from torchao.utils import TorchAOBaseTensor

from dynquant.foreign_layers import check_scale, check_zero_point
from dynquant.foreign_torchao import qconfig_of
from dynquant.nn import Linear
from dynquant.qconfig import QConfig, per_channel, per_token
from dynquant.quantize import keep_hooks, left_on, quantize_dynamic
from dynquant.swap.copies import copied
from dynquant.swap.places import replace_modules
from dynquant.swap.undo import all_or_nothing


@dataclass
class DynamicActivationInt8WeightConfig(AOBaseConfig):
    """How quantize_ quantizes a module that its filter_fn selects: as dynquant does.

    Args:
        weight, activation, symmetric, activation_bits: as in dynquant.QConfig.

    Raises:
        TypeError, ValueError: for an argument that is none of these.
    """

    weight: str = per_channel
    activation: str = per_token
    symmetric: bool = False
    activation_bits: int = 8

    def __post_init__(self):
        self.qconfig()

    def qconfig(self) -> QConfig:
        """The dynquant.QConfig of the same meaning."""
        return QConfig(
            self.weight,
            self.activation,
            self.symmetric,
            activation_bits=self.activation_bits,
        )


DynquantConfig = DynamicActivationInt8WeightConfig  # its first name


@register_quantize_module_handler(DynamicActivationInt8WeightConfig)
def _quantize(module, config):
    """The module itself, which is quantized in place.

    An object that is the whole model, or belongs to it twice, stays the same object: quantize_
    would drop another.
    """
    with all_or_nothing(module):
        form = quantize_dynamic(module, {type(module): config.qconfig()}, inplace=True)
        if form is not module:
            module.__class__ = type(form)
            vars(module).clear()
            vars(module).update(vars(form))
    return module


def from_torchao(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The model with the linear layers that torchao has quantized to int8 on dynquant's kernels.

    Their integers and scales stay as they are; activations are quantized as dynquant does it, with
    the same granularity and symmetry.

    Args:
        model: with weights that are Int8Tensor, as Int8DynamicActivationInt8WeightConfig makes
            them. The rest of it stays as it is.
        inplace: as for quantize_dynamic.

    Raises:
        ValueError: before anything is changed, for a tensor of torchao's that is not such a weight
            of an nn.Linear, or that has what a dynquant.QConfig has not: static activations or
            activations in float, groups, zero points; and where there is none.
    """
    qconfigs = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, TorchAOBaseTensor):
            layer, _, own = key.rpartition(".")
            module = model.get_submodule(layer)
            qconfigs[layer] = _checked(key, own, module, parameter)
    if not qconfigs:
        raise ValueError("the model has no weight that torchao has quantized to int8")
    if not inplace:
        return _swapped(copied(model), qconfigs)
    with all_or_nothing(model):
        return _swapped(model, qconfigs)


def _swapped(model, qconfigs):
    """The model with quantized forms in the places of the layers that qconfigs names."""
    forms = {}
    for layer, qconfig in qconfigs.items():
        module = model.get_submodule(layer)
        if module not in forms:
            weight, bias = module.weight, module.bias
            form = Linear.from_integers(weight.qdata, weight.scale, bias, qconfig, weight.dtype)
            keep_hooks(module, form, lambda hooks: hooks)
            forms[module] = form
    replace_modules(model, forms)
    for module in model.modules():
        _forget_torchao(module)
    left_on(model, qconfigs)
    return forms.get(model, model).eval()


def _forget_torchao(module):
    """Takes away what transformers has left on a model that it loaded with torchao's tensors."""
    config = getattr(module, "config", None)
    held = getattr(config, "quantization_config", None)
    if getattr(held, "quant_method", None) == "torchao":
        del config.quantization_config
        # Steps that made torchao's tensors, which transformers could not reverse to save others.
        module._weight_conversions = [
            one
            for one in getattr(module, "_weight_conversions", None) or ()
            if not any(hasattr(step, "hf_quantizer") for step in getattr(one, "operations", ()))
        ]


def _checked(key, own, module, weight):
    """The QConfig of a quantized parameter `key`, which is `own` of the module."""
    if type(module).forward is not nn.Linear.forward or own != "weight":
        raise ValueError(
            f"{key} is quantized, but it is not a weight of an nn.Linear: {type(module).__name__}"
        )
    layer = key.removesuffix(f".{own}")
    if not isinstance(weight, Int8Tensor):
        raise ValueError(f"{layer}: the weight is a {type(weight).__name__}; allowed: Int8Tensor")
    tensors = [*weight.tensor_data_names, *weight.optional_tensor_data_names]
    tensors = [name for name in tensors if getattr(weight, name) is not None]
    qconfig = qconfig_of(layer, _fields(weight), tensors, weight.shape)
    scale = weight.scale
    check_scale(layer, scale.dtype, scale.shape, weight.shape[0], qconfig)
    if weight.zero_point is not None:
        check_zero_point(layer, weight.zero_point)
    return qconfig


def _fields(weight):
    """What torchao's JSON of an Int8Tensor says."""
    activation = weight.act_quant_kwargs
    if activation is not None:
        granularity = activation.granularity
        data = {
            "granularity": {"_type": type(granularity).__name__, "_data": vars(granularity)},
            "mapping_type": {"_data": activation.mapping_type.name},
        }
        activation = {"_type": type(activation).__name__, "_data": data}
    return {"block_size": list(weight.block_size), "act_quant_kwargs": activation}
