"""DynquantConfig: how from_pretrained quantizes; what config.json says of a quantized model."""

import dataclasses
import warnings
from collections.abc import Collection, Iterable
from typing import Any

import regex
import torch
from torch import nn
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from dynquant.nn import Embedding
from dynquant.qconfig import DTYPES, QConfig, one_of
from dynquant.swap.plan import default_spec
from dynquant.swap.selection import did_you_mean
from dynquant.transformers.module_names import kept, only

METHOD = "dynquant"
EMBEDDING_DTYPES = Embedding.DTYPES


@register_quantization_config(METHOD)
class DynquantConfig(QuantizationConfigMixin):
    """How from_pretrained quantizes: as dynquant.quantize_dynamic does.

    It is saved in the model's config.json.

    Args:
        weight, activation, symmetric, activation_bits, dtype: as in dynquant.QConfig; the dtype
            also by its name, as in 'bfloat16'. Types that have no form of it stay in float.
        embeddings: torch.quint8 or torch.quint4x2, also by name: nn.Embedding and nn.EmbeddingBag
            in 8 or 4 bits, besides what `dtype` asks for.
        convolutions: whether nn.Conv1d and nn.ConvTranspose1d are quantized, in 8 bits.
        modules_to_not_convert: names of modules that stay in float, each of which covers its
            submodules, or regular expressions, as for other methods of transformers. Those that
            lose too much are found on the float model, by dynquant.compare or by
            quantize_dynamic(model, keep_float_below=..., example_inputs=...); the command
            `dynquant quantize --keep-float-below` does both.
        modules: what dynquant.quantize_dynamic has left: {name of a module, or of a product of one:
            the fields of its QConfig that are not the default; None: in float}. These modules are
            quantized, and no others.
        source: the quantization_config of a checkpoint that another library has quantized, which
            load_int8 passes.
        quant_method: "dynquant", which config.json holds.

    Raises:
        TypeError, ValueError: for an argument that is none of these.
    """

    def __init__(
        self,
        weight: str = "per_channel",
        activation: str = "per_token",
        symmetric: bool = False,
        modules_to_not_convert: Collection[str] | None = None,
        quant_method: str = METHOD,
        activation_bits: int = 8,
        modules: dict[str, dict[str, Any] | None] | None = None,
        dtype: str | torch.dtype = "qint8",
        embeddings: str | torch.dtype | None = None,
        source: dict[str, Any] | None = None,
        convolutions: bool = False,
    ) -> None:
        self.weight = weight
        self.activation = activation
        self.symmetric = symmetric
        self.activation_bits = activation_bits
        self.dtype = _name_of(dtype)
        self.embeddings = None if embeddings is None else _name_of(embeddings)
        if not isinstance(convolutions, bool):
            raise TypeError(f"convolutions is {convolutions!r}; expected a bool")
        self.convolutions = convolutions
        self._default_spec()  # checks them
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
                    f"modules_to_not_convert has {name!r}, not a regular expression: {error}"
                ) from error
        self.quant_method = METHOD
        self.modules_to_not_convert = sorted(names)
        if source is not None:
            self.source = source

    # Not an attribute of its own, and not saved, in any other config.
    source: dict[str, Any] | None = None

    def _qconfigs(self):
        """The QConfigs of `modules`, by name."""
        if not isinstance(self.modules, dict):
            raise TypeError(f"modules is {self.modules!r}; expected a dict from names to configs")
        try:
            return {name: _from_fields(fields) for name, fields in self.modules.items()}
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"modules holds what is not a config of dynquant: {error}") from error

    def spec_for(self, model: nn.Module) -> dict[Any, QConfig | None]:
        """The qconfig_spec of quantize_dynamic that says the same of `model`."""
        if self.modules is not None:
            return self._qconfigs()
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        in_float = dict.fromkeys(kept(names, self.modules_to_not_convert))
        return {**self._default_spec(), **in_float}

    def _default_spec(self):
        qconfig = QConfig(
            self.weight,
            self.activation,
            self.symmetric,
            dtype=_dtype_of(self.dtype, "dtype", DTYPES),
            activation_bits=self.activation_bits,
        )
        if self.convolutions and qconfig.dtype != torch.qint8:
            raise ValueError(f"convolutions: dtype is {self.dtype}; allowed: qint8")
        spec = default_spec(qconfig, self.convolutions)
        if self.embeddings is not None:
            dtype = _dtype_of(self.embeddings, "embeddings", EMBEDDING_DTYPES)
            spec |= default_spec(QConfig(dtype=dtype))
        return spec

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict: transformers reads the config of a model so, also where it holds this."""
        return getattr(self, key, default)

    def keep_float(self, names: Iterable[str]) -> None:
        """What the checkpoint does not have is to be trained: it stays in float when saved, too."""
        self.modules_to_not_convert = sorted({*self.modules_to_not_convert, *map(only, names)})

    def warn_of_unknown_names(self, model: nn.Module) -> None:
        """Warns of entries of modules_to_not_convert that no module of `model` fits."""
        names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
        for entry in self.modules_to_not_convert:
            if not kept(names, [entry]):
                warnings.warn(
                    f"modules_to_not_convert has {entry!r}, which fits no module of "
                    f"{type(model).__name__}{did_you_mean(entry, names)}",
                    stacklevel=2,
                )


def fields_of(qconfig):
    """What config.json holds of a QConfig; None keeps a module, or a product of it, in float."""
    if qconfig is None:
        return None
    fields = {
        one.name: getattr(qconfig, one.name)
        for one in dataclasses.fields(qconfig)
        if getattr(qconfig, one.name) != one.default
    }
    return {key: _name_of(value) for key, value in fields.items()}


def _from_fields(fields):
    if fields is None:
        return None
    dtype = _dtype_of(fields.get("dtype", "qint8"), "dtype", DTYPES)
    return QConfig(**{**fields, "dtype": dtype})


def _name_of(value):
    """The name of a torch.dtype; any other value as it is."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _dtype_of(name, argument, allowed):
    names = {_name_of(dtype): dtype for dtype in allowed}
    one_of(argument, name, tuple(names))
    return names[name]
