"""What quantize_dynamic leaves on a model of transformers, so that it is saved as quantized."""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from dynquant.qconfig import QConfig
from dynquant.transformers.config import DynquantConfig, fields_of
from dynquant.transformers.quantizer import DynquantQuantizer


def take_config(model: nn.Module) -> None:
    """Takes from models of transformers within `model`, in which all is float, what is left on them
    while something is quantized.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            held = getattr(module.config, "quantization_config", None)
            if isinstance(held, DynquantConfig):
                DynquantQuantizer(held).remove_quantization_config(module)


def leave_config(model: nn.Module, qconfigs: Mapping[str, QConfig | None]) -> None:
    """Has models of transformers within `model` say, when they are saved, what is quantized.

    Args:
        model: what quantize_dynamic has made.
        qconfigs: the QConfig (None: float) of each module that it has quantized, and of products
            that have another, by name.
    """
    outer = None
    for prefix, module in model.named_modules():
        if (
            outer is not None
            and prefix.startswith(outer)
            or not isinstance(module, PreTrainedModel)
        ):
            continue
        outer = f"{prefix}." if prefix else ""
        own = {
            name.removeprefix(outer): fields_of(qconfig)
            for name, qconfig in qconfigs.items()
            if name.startswith(outer) and name != prefix
        }
        held = getattr(module.config, "quantization_config", None)
        if held is None and own:
            held = DynquantConfig(modules={})
            module.config.quantization_config = held
            module.hf_quantizer = DynquantQuantizer(held, pre_quantized=True)
        if isinstance(held, DynquantConfig) and held.modules is not None:
            held.modules = {**held.modules, **own}
