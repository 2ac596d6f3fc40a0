"""What transformers calls while it loads and saves a model with a DynquantConfig."""

from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantizer

from dynquant.dequantize import dequantize
from dynquant.nn._module import QuantizedModule
from dynquant.transformers.config import METHOD
from dynquant.transformers.entry_names import while_saving
from dynquant.transformers.float_checkpoint import FloatCheckpoint
from dynquant.transformers.foreign_checkpoint import ForeignCheckpoint
from dynquant.transformers.int8_checkpoint import Int8Checkpoint


@register_quantizer(METHOD)
class DynquantQuantizer(HfQuantizer):
    """Loads a float checkpoint or a quantized one, and saves what came of it.

    While a model is being loaded, `_loading` is the FloatCheckpoint or the Int8Checkpoint.
    """

    requires_calibration = False
    _loading = None

    @property
    def is_trainable(self):
        return True  # adapters: quantized layers have gradients for their inputs

    @property
    def is_compileable(self):
        return True

    def is_serializable(self, *args, **kwargs):
        return True

    def validate_environment(self, *args, device_map=None, **kwargs):
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map: quantized modules cannot be offloaded to disk")

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        config = self.quantization_config
        if config.source is not None:
            self._loading = ForeignCheckpoint(model, config, checkpoint_files)
        elif self.pre_quantized:
            self._loading = Int8Checkpoint(model, config)
        else:
            self._loading = FloatCheckpoint(model, config)

    def update_weight_conversions(self, weight_conversions, model):
        conversions = super().update_weight_conversions(weight_conversions, model)
        return self._loading.conversions(conversions, model) if self.pre_quantized else conversions

    def param_needs_quantization(self, model, param_name, **kwargs):
        return not self.pre_quantized and self._loading.awaits(param_name)

    def get_quantize_ops(self):
        return _QuantizeOnLoad(self)

    def quantize_found(self, key, weight):
        """Whether the float weight of the checkpoint is taken; else it is to be set as it is."""
        return self._loading.take(key, weight)

    def get_new_dtype(self, converter, param, dtype):
        # A float weight for a quantized module is quantized, not cast to int8.
        if dtype is not None and not dtype.is_floating_point:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model, **kwargs):
        self._loading.finish(model)
        self._loading = None
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                # It has models go around the `weight` of their layers. Ours stands for a float one:
                # the code is the same as after quantize_dynamic, and so are the numbers.
                vars(module.config).pop("_is_quantized", None)
        names = [
            f"{name}.{key}"
            for name, module in model.named_modules()
            if isinstance(module, QuantizedModule)
            for key in module.state_dict()
        ]
        model._weight_conversions = while_saving(model._weight_conversions, names)
        return model

    def _dequantize(self, model, dtype=None):
        model = dequantize(model, inplace=True)
        return model if dtype is None else model.to(dtype)

    def get_state_dict_and_metadata(self, model):
        """The state dict for safetensors, with a tensor of its own for each quantized module."""
        state_dict = model.state_dict()
        seen = set()
        for name, module in model.named_modules():
            if not isinstance(module, QuantizedModule):
                continue
            for key in module.state_dict():
                tensor = state_dict[f"{name}.{key}"]
                if tensor.numel() and tensor.data_ptr() in seen:
                    state_dict[f"{name}.{key}"] = tensor.clone()
                seen.add(tensor.data_ptr())
        return state_dict, {}


class _QuantizeOnLoad:
    """The operation that transformers applies to a weight that param_needs_quantization named."""

    def __init__(self, hf_quantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, model=None, full_layer_name=None, missing_keys=None, **kwargs):
        kept = {}
        for key, tensors in input_dict.items():
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            target = full_layer_name if len(input_dict) == 1 else key
            quantizer = self.hf_quantizer
            if not (
                quantizer.param_needs_quantization(model, target)
                and quantizer.quantize_found(target, tensor)
            ):
                kept[target] = tensor
            elif missing_keys is not None:
                missing_keys.discard(target)
        return kept
