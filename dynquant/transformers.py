"""Hugging Face transformers: models that are quantized while they are loaded, saved and loaded.

import dynquant.transformers  # registers the method "dynquant"; also before loading what it saved
from transformers import AutoModel

config = dynquant.transformers.DynquantConfig()
model = AutoModel.from_pretrained(path, quantization_config=config)
model.save_pretrained(folder)
model = AutoModel.from_pretrained(folder)
"""

import dataclasses
import re
import time
import warnings
from itertools import chain

import regex
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import __version__ as _version
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from dynquant import nn as quantized
from dynquant.checkpoint_names import FloatNames, while_loading, while_saving
from dynquant.nn._module import QuantizedModule
from dynquant.qconfig import DTYPES, QConfig
from dynquant.quantize import quantize_dynamic
from dynquant.swap.places import replace_modules
from dynquant.swap.plan import default_spec, plan_from_spec
from dynquant.swap.registry import Forms
from dynquant.swap.selection import did_you_mean

if int(_version.partition(".")[0]) < 5:
    raise ImportError(
        f"dynquant.transformers needs transformers 5 or newer; {_version} is installed. "
        "dynquant.quantize_dynamic(model) works with every version"
    )

METHOD = "dynquant"
_PATTERN_SECONDS = 10  # for all patterns and all modules of a model


@register_quantization_config(METHOD)
class DynquantConfig(QuantizationConfigMixin):
    """How from_pretrained quantizes: as dynquant.quantize_dynamic does, with int8 weights.

    It is saved in the model's config.json.

    Args:
        weight, activation, symmetric, activation_bits: as in dynquant.QConfig.
        modules_to_not_convert: names of modules that stay in float, each of which covers its
            submodules, or regular expressions, as for other methods of transformers. Those that
            lose too much are found on the float model, by dynquant.compare or by
            quantize_dynamic(model, keep_float_below=..., example_inputs=...); the command
            `dynquant quantize --keep-float-below` does both.
        modules: what dynquant.quantize_dynamic has left: {name of a module, or of a product of one:
            the fields of its QConfig that are not the default; None: in float}. These modules are
            quantized, and no others.
        quant_method: "dynquant", which config.json holds.

    Raises:
        TypeError, ValueError: for an argument that is none of these.
    """

    def __init__(
        self,
        weight="per_channel",
        activation="per_token",
        symmetric=False,
        modules_to_not_convert=None,
        quant_method=METHOD,
        activation_bits=8,
        modules=None,
    ):
        QConfig(weight, activation, symmetric, activation_bits=activation_bits)  # checks them
        self.modules = modules
        if modules is not None:
            self._qconfigs()
        if quant_method != METHOD:
            raise ValueError(f"quant_method is {quant_method!r}; allowed: {METHOD}")
        names = [] if modules_to_not_convert is None else modules_to_not_convert
        if not isinstance(names, (list, tuple, set)) or not all(isinstance(n, str) for n in names):
            raise TypeError(
                f"modules_to_not_convert is {modules_to_not_convert!r}; expected a list of names"
            )
        for name in names:
            try:
                regex.compile(name)
            except (regex.error, RecursionError) as error:
                raise ValueError(
                    f"modules_to_not_convert has {name!r}, which is no regular expression: {error}"
                ) from error
        self.quant_method = METHOD
        self.weight = weight
        self.activation = activation
        self.symmetric = symmetric
        self.activation_bits = activation_bits
        self.modules_to_not_convert = sorted(names)

    def _qconfigs(self):
        """The QConfigs of `modules`, by name."""
        if not isinstance(self.modules, dict):
            raise TypeError(f"modules is {self.modules!r}; expected a dict from names to configs")
        try:
            return {name: _from_fields(fields) for name, fields in self.modules.items()}
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"modules holds what is no config of dynquant: {error}") from error

    def spec_for(self, model):
        """The qconfig_spec of quantize_dynamic that says the same of `model`."""
        if self.modules is not None:
            return self._qconfigs()
        qconfig = QConfig(
            self.weight,
            self.activation,
            self.symmetric,
            activation_bits=self.activation_bits,
        )
        spec = default_spec(qconfig)
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        return {**spec, **dict.fromkeys(_kept(names, self.modules_to_not_convert))}

    def warn_of_unknown_names(self, model):
        """Warns of entries of modules_to_not_convert that no module of `model` fits."""
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        for entry in self.modules_to_not_convert:
            if not _kept(names, [entry]):
                warnings.warn(
                    f"modules_to_not_convert has {entry!r}, which fits no module of "
                    f"{type(model).__name__}{did_you_mean(entry, names)}",
                    stacklevel=2,
                )


def _kept(names, patterns):
    """Those of `names` that an entry of modules_to_not_convert fits: from the start to the end or a
    dot, as a regular expression, or literally at the end. So transformers reads it, too, but with
    re, which may backtrack for ever over a pattern that somebody else has written.
    """
    compiled = [(regex.compile(rf"(?:{one})(?:(?<=\.)|(?=\.|$))"), one) for one in patterns]
    end = time.monotonic() + _PATTERN_SECONDS

    def fits(pattern, literal, name):
        left = max(end - time.monotonic(), 1e-3)
        try:
            return name.endswith(literal) or pattern.match(name, timeout=left)
        except TimeoutError:
            raise ValueError(
                f"modules_to_not_convert has {literal!r}, which takes too long to match {name!r}"
            ) from None

    return [name for name in names if any(fits(*one, name) for one in compiled)]


def _fields_of(qconfig):
    """What config.json holds of a QConfig; None keeps a module, or a product of it, in float."""
    if qconfig is None:
        return None
    fields = {
        one.name: getattr(qconfig, one.name)
        for one in dataclasses.fields(qconfig)
        if getattr(qconfig, one.name) != one.default
    }
    return {key: _DTYPE_NAMES.get(value, value) for key, value in fields.items()}


def _from_fields(fields):
    if fields is None:
        return None
    dtypes = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
    given = {**fields, "dtype": dtypes[fields.get("dtype", _DTYPE_NAMES[torch.qint8])]}
    return QConfig(**given)


_DTYPE_NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}


def leave_config(model, qconfigs):
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
            name.removeprefix(outer): _fields_of(qconfig)
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


def only(name):
    """The entry of modules_to_not_convert for the module `name`: a bare name fits endings, too."""
    return f"^{re.escape(name)}"


@register_quantizer(METHOD)
class DynquantQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model with a DynquantConfig.

    A float checkpoint: a linear layer is quantized as soon as its weight is read, every other
    module once all are. A quantized one: stand-ins receive the tensors of each quantized module.
    """

    requires_calibration = False

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

    def _process_model_before_weight_loading(self, model, **kwargs):
        spec = self.quantization_config.spec_for(model)
        if self.pre_quantized:
            self._floats = dict(model.named_modules())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # given when the model was quantized
                quantize_dynamic(model, spec, inplace=True)
            self._stand_ins = {
                name: _StateStandIn(module)
                for name, module in model.named_modules()
                if isinstance(module, QuantizedModule)
            }
            replace_modules(model, {one.form: one for one in self._stand_ins.values()})
            self._attentions = {
                module: _AttentionStandIn(module)
                for module in model.modules()
                if isinstance(module, quantized.MultiheadAttention)
            }
            replace_modules(model, self._attentions)
            _forget_ties(model, self._stand_ins)
            return
        self.quantization_config.warn_of_unknown_names(model)
        tied = set(chain.from_iterable(model.all_tied_weights_keys.items()))
        plan = plan_from_spec(model, spec, torch.qint8, None, True, None)
        plan.warn_of_large_floats(model, Forms(None))
        for message in plan.warnings:
            warnings.warn(message, stacklevel=2)
        self._awaited = {  # by the name of the weight
            f"{item.name}.weight": item
            for item in plan.items
            if item.name and issubclass(item.form, quantized.Linear)
            if not any(f"{item.name}.{key}" in tied for key in ("weight", "bias"))
        }
        self._found = set()
        self._stand_ins = {}

    def update_weight_conversions(self, weight_conversions, model):
        conversions = super().update_weight_conversions(weight_conversions, model)
        if not self.pre_quantized:
            return conversions
        names = [
            f"{name}.{key}" for name, one in self._stand_ins.items() for key in one._parameters
        ]
        return while_loading(conversions, names, model.base_model_prefix)

    def param_needs_quantization(self, model, param_name, **kwargs):
        return not self.pre_quantized and param_name in self._awaited

    def get_quantize_ops(self):
        return _QuantizeOnLoad(self)

    def quantize_found(self, key, weight):
        """Takes a float weight from the checkpoint.

        Returns:
            whether its layer is quantized now; otherwise the weight is to be set as it is.
        """
        item = self._awaited[key]
        self._found.add(key)
        if item.module.bias is not None and item.module.bias.is_meta:  # comes later, or never
            return False
        item.module.weight = nn.Parameter(weight, requires_grad=False)
        try:
            stand_in = _StandIn(item.form.from_float(item.module, item.qconfig))
        except ValueError:  # which quantize_dynamic raises again, with the weight's whole name
            return False
        for parent, name in item.places:
            parent._modules[name] = stand_in
        self._stand_ins[item.name] = stand_in
        return True

    def get_new_dtype(self, converter, param, dtype):
        # A float weight for a quantized module is quantized, not cast to int8.
        if dtype is not None and not dtype.is_floating_point:
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            self._fill_quantized(model)
        else:
            replace_modules(model, {one: one.form for one in self._stand_ins.values()})
            missing = [item.name for key, item in self._awaited.items() if key not in self._found]
            self._keep_float(missing)
            quantize_dynamic(model, self.quantization_config.spec_for(model), inplace=True)
        names = [
            f"{name}.{key}"
            for name, module in model.named_modules()
            if isinstance(module, QuantizedModule)
            for key in module.state_dict()
        ]
        model._weight_conversions = while_saving(model._weight_conversions, names)
        self._stand_ins = self._awaited = self._floats = self._attentions = None
        return model

    def _fill_quantized(self, model):
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
        self._keep_float(missing)
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if isinstance(module, nn.Linear) and weight is not None and weight.dtype == torch.int8:
                raise ValueError(
                    f"{name} is quantized in the checkpoint, but in float by "
                    f"modules_to_not_convert={self.quantization_config.modules_to_not_convert}"
                )

    def _keep_float(self, names):
        """What the checkpoint does not have is to be trained: it stays in float when saved, too."""
        config = self.quantization_config
        kept = {*config.modules_to_not_convert, *map(only, names)}
        config.modules_to_not_convert = sorted(kept)

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


class _StandIn(nn.Module):
    """Hides a quantized module while a model is being loaded.

    The loader overwrites every buffer that no state dict has, which packed weights are. Some models
    initialize weights of submodules, and read their sizes; what is marked is left alone.
    """

    def __init__(self, form):
        super().__init__()
        self._form = [form]  # in a list, so that it is no submodule
        self._is_hf_initialized = True
        for key in self.HIDDEN:
            self.__dict__[key] = torch.empty(0)
            self.__dict__[key]._is_hf_initialized = True

    HIDDEN = ("weight", "bias")

    @property
    def form(self):
        return self._form[0]

    def reset_parameters(self):
        """What a model calls to initialize a float layer."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.form, name)


class _AttentionStandIn(_StandIn):
    """One of an attention: its parts are its own, by their names."""

    HIDDEN = ("in_proj_weight", "in_proj_bias")

    def __init__(self, form):
        super().__init__(form)
        self._modules, self._parameters = form._modules, form._parameters


class _StateStandIn(_StandIn):
    """One with the module's own entries of a state dict as parameters, for the loader to set.

    Float submodules are its own as well.
    """

    def __init__(self, form):
        super().__init__(form)
        self._modules = form._modules
        for key, value in form._state().items():
            key = key.removesuffix("_uint8").removesuffix("_int8")
            self.__dict__.pop(key, None)
            empty = torch.empty_like(value, device="meta")
            # register_parameter would find the form's own attribute.
            self._parameters[key] = nn.Parameter(empty, requires_grad=False)

    def found(self):
        """What the loader has set; what it has made up for a missing entry is left out."""
        return {
            key: value.detach()
            for key, value in self._parameters.items()
            if getattr(value, "_is_hf_initialized", False)
        }

    def load(self, found, name):
        """Loads what the checkpoint has of the module `name`: all of it, or a float one."""
        is_float = all(value.is_floating_point() for value in found.values())
        missing = self._parameters.keys() - found.keys()
        if missing and not is_float:
            raise ValueError(f"{name}: the checkpoint lacks {', '.join(sorted(missing))}")
        try:
            below = {key: value for key, value in self.form.state_dict().items() if "." in key}
            self.form.load_state_dict({**below, **found}, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{name}: {error}") from error


def _forget_ties(model, names):
    """A quantized module has a weight of its own, which is saved: nothing is to be tied to it."""
    ties = model.all_tied_weights_keys
    for target, source in list(ties.items()):
        if target.rpartition(".")[0] in names or source.rpartition(".")[0] in names:
            del ties[target]


def _initialized(model, module):
    """A float module that the checkpoint does not have, initialized as the model does it."""
    module.to_empty(device="cpu")
    with torch.no_grad():
        model._init_weights(module)
    return module
