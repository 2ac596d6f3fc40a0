"""torchao: dynquant's layers through torchao.quantization.quantize_.

torchao.quantization.quantize_(model, dynquant.torchao.DynquantConfig())
"""

from dataclasses import dataclass

from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from dynquant.qconfig import QConfig, per_channel, per_token
from dynquant.quantize import quantize_dynamic
from dynquant.swap.undo import all_or_nothing


@dataclass
class DynquantConfig(AOBaseConfig):
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

    def qconfig(self):
        """The dynquant.QConfig of the same meaning."""
        return QConfig(
            self.weight,
            self.activation,
            self.symmetric,
            activation_bits=self.activation_bits,
        )


@register_quantize_module_handler(DynquantConfig)
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
