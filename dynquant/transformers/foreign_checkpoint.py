"""A checkpoint that another library has quantized to int8, run on dynquant's kernels."""

import copy
import os
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from dynquant import foreign_torchao
from dynquant.headers import Headers
from dynquant.qconfig import one_of
from dynquant.transformers import compressed_tensors
from dynquant.transformers.config import METHOD, fields_of
from dynquant.transformers.entry_names import renamed_while_loading
from dynquant.transformers.int8_checkpoint import Int8Checkpoint
from dynquant.transformers.stand_ins import StateStandIn

READERS = {
    "compressed-tensors": compressed_tensors.layers_of,
    "torchao": foreign_torchao.layers_of,
}
# What from_pretrained takes that says where a file is found.
_OF_THE_HUB = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def load_int8(model_class: Any, path: str | os.PathLike[str], **arguments: Any) -> PreTrainedModel:
    """A model that compressed-tensors or torchao has quantized, on dynquant's kernels.

    The integers and scales of its linear layers are those of the checkpoint. Its activations are
    quantized as dynquant does it, with the checkpoint's granularity and symmetry; what dynquant
    has no form for is refused before a weight is loaded. The other library is not needed.
    save_pretrained writes the model as dynquant's own.

    Args:
        model_class: transformers.AutoModelForCausalLM, or any class with from_pretrained.
        path: a folder or a name on the Hub, with weights in safetensors.
        arguments: for from_pretrained.

    Raises:
        ValueError: for a model that none of the two has quantized; for static activations or
            activations in float, weights in groups, asymmetric or in other than 8 bits, and what
            else is not in a dynquant.QConfig, with the name of a layer that has it; for quantized
            weights that are not those of an nn.Linear.
        TypeError: for a quantization_config among the arguments: the checkpoint has one.
    """
    if "quantization_config" in arguments:
        raise TypeError("load_int8 takes no quantization_config: the checkpoint has its own")
    config = arguments.pop("config", None)
    if config is None:
        found = {key: arguments[key] for key in _OF_THE_HUB if key in arguments}
        config = AutoConfig.from_pretrained(path, **found)
    config = copy.deepcopy(config)
    source = _take_source(config, path)
    config.quantization_config = {"quant_method": METHOD, "source": source}
    return model_class.from_pretrained(path, config=config, **arguments)


def _take_source(config, path):
    """Takes the quantization_config of the checkpoint out of its config."""
    for holder in (config, config.get_text_config(decoder=True)):
        source = getattr(holder, "quantization_config", None)
        if source is not None:
            del holder.quantization_config
            source = source if isinstance(source, dict) else source.to_dict()
            one_of(f"{path}: quant_method", source.get("quant_method"), tuple(READERS))
            return source
    raise ValueError(
        f"{path} has no quantization_config: its weights are float, and from_pretrained with a "
        "DynquantConfig quantizes them"
    )


class ForeignCheckpoint(Int8Checkpoint):
    """Has stand-ins receive what another library calls the tensors of a quantized layer.

    Args:
        model: with its parameters on the meta device.
        config: a DynquantConfig with a `source`, which becomes `modules`.
        files: of the checkpoint.
    """

    def __init__(self, model, config, files):
        headers = Headers(files or ())
        layers = READERS[config.source["quant_method"]](headers, config.source)
        if not layers:
            raise ValueError(f"the checkpoint of {type(model).__name__} has no int8 weights")
        self._layers = _by_module(model, layers)
        self._shapes = headers.of(
            key for layer in self._layers.values() for key in layer.keys.values()
        )
        config.modules = {name: fields_of(layer.qconfig) for name, layer in self._layers.items()}
        del config.source
        super().__init__(model, config)
        for name in self._layers.keys() - self._stand_ins.keys():
            raise ValueError(
                f"{name} is quantized in the checkpoint, but its code is not that of nn.Linear"
            )

    def _stand_in(self, name, module):
        keys = self._layers[name].keys
        shapes = {entry: self._shapes[key][1] for entry, key in keys.items()}
        return _ForeignStandIn(module, shapes)

    def conversions(self, conversions, model):
        shown = {
            key: f"{name}.{entry}"
            for name, layer in self._layers.items()
            for entry, key in layer.keys.items()
        }
        return renamed_while_loading(conversions, shown)


def _by_module(model, layers):
    """The ForeignLayers by the names that their modules have in `model`.

    A head that the model does not have is left out, as it is of a float checkpoint.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    modules, state = dict(model.named_modules()), model.state_dict()
    found = {}
    for name, layer in layers.items():
        key, converter = rename_source_key(
            f"{name}.weight", renamings, converters, model.base_model_prefix, state
        )
        own = key.removesuffix(".weight")
        if converter is not None:
            raise ValueError(
                f"{name} is quantized in the checkpoint, but transformers joins, splits or "
                f"reorders its weight to make {key} of it, which is for float weights"
            )
        if own.partition(".")[0] not in modules:
            continue
        if not isinstance(modules.get(own), nn.Linear):
            kind = type(modules[own]).__name__ if own in modules else "no module"
            raise ValueError(
                f"{name} is quantized in the checkpoint, but {type(model).__name__} has {kind} of "
                f"the name {own}; allowed: nn.Linear"
            )
        found[own] = layer
    return found


class _ForeignStandIn(StateStandIn):
    """One with the entries of a ForeignLayer, whose shapes are those of the checkpoint."""

    def __init__(self, form, shapes):
        super().__init__(form)
        del self._parameters["version"]
        dtypes = {"weight_scale": torch.float32, "zero_point": torch.int8}
        for entry in dtypes.keys() & shapes.keys():
            empty = torch.empty(shapes[entry], dtype=dtypes[entry], device="meta")
            self._parameters[entry] = nn.Parameter(empty, requires_grad=False)

    def _entries(self, found):
        bias = {"bias": found["bias"]} if "bias" in found else {}
        return {
            "weight_int8": found["weight"],
            "weight_scale": found["weight_scale"].flatten(),
            "version": torch.tensor(self.form.VERSION),
            **bias,
        }
