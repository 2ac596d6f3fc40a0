"""QuantizedModule: the one base of modules with quantized weights."""

import copy
import warnings

import torch
from torch import nn
from typing_extensions import Self  # which torch needs, too

from dynquant.nn import _weight_views  # noqa: F401 (tells weights what functions do with them)
from dynquant.nn._checks import FLOAT_DTYPES, check_config, check_parameters
from dynquant.nn._formats import are_alike, renamed_from_version_1
from dynquant.nn._move import moved
from dynquant.nn._processes import share_between_processes
from dynquant.nn._state import INTEGERS, Entry, check_assigned, frozen_copy, is_float, read_entries
from dynquant.nn.weight import QuantizedWeight, quantized_weight
from dynquant.qconfig import ConfigLike, QConfig, parse_qconfig


class QuantizedModule(nn.Module):
    """A module in eval mode whose weights are quantized, each of them held as its format says.

    For each weight of the float module there is a format (dynquant/nn/_formats.py) under the same
    name in `_formats`, and the buffers that the format names. They keep their dtypes in a model of
    any dtype. The state dict has the entries of the formats, the biases, and version (int64). It is
    read strictly: a weight's entries all together or not at all. load_state_dict also takes what
    the float module has; its weights are then quantized as these were. So is a float tensor that
    is assigned to a weight. Reading a weight gives a QuantizedWeight.

    A parameter without elements, `placeholder`, carries the dtype of the float module where no bias
    does.

    Attributes:
        FLOAT: how messages call the float module's type.
        FORMAT: the Format of the weights; _format_of chooses where there are several.
        DTYPES: those of a config that this form serves.
        COPIED: the attributes that are copied of the float module.
        VERSION: of the state dict.
    """

    FLOAT = None
    FORMAT = None
    DTYPES = ()
    COPIED = ()
    VERSION = 2

    def __init_subclass__(cls, **arguments):
        super().__init_subclass__(**arguments)
        share_between_processes(cls)

    def __init__(self, mod: nn.Module, qconfig: QConfig, tied_to: nn.Module | None = None) -> None:
        super().__init__()
        for key in self.COPIED:
            setattr(self, key, getattr(mod, key))
        for key, value in self.FORMAT.settings(qconfig).items():
            setattr(self, key, value)
        self._formats = {}
        weights, biases = self._float_parameters(mod)
        for name, weight in weights.items():
            weight = weight.detach()
            one = self._format_of(name, self._rows(weight), qconfig, mod)
            one.float_shape = tuple(weight.shape)
            if tied_to is not None and _can_share(one, tied_to._formats[name]):
                held = tied_to._held(name)
            else:
                held = one.held_of(one.quantized(self._rows(weight), name), weight.device)
            for key, tensor in zip(one.buffers, held, strict=True):
                self.register_buffer(key, tensor, persistent=key in one.keys)
            self._formats[name] = one
        for name, bias in biases.items():
            self.register_parameter(name, frozen_copy(bias))
        if all(bias.dtype != weight.dtype for bias in self._held_biases().values()):
            self._set_placeholder(weight.dtype)
        self.eval()

    # How it is made.

    @classmethod
    def from_float(
        cls, mod: nn.Module, qconfig: ConfigLike | None = None, tied_to: nn.Module | None = None
    ) -> Self:
        """The quantized form of `mod`, which is not changed and shares no memory with it.

        Args:
            mod: the float module, with weights in fp32, bf16 or fp16.
            qconfig: any form of a config; None means QConfig() of the first of DTYPES.
            tied_to: what from_float gave for a module with the same weight, to share what it holds
                where it is held alike.

        Raises:
            ValueError: as check_float.

        Warns:
            UserWarning: where finite weights are beyond what a 16-bit dtype holds, which then
                become the nearest finite value.
        """
        qconfig = QConfig(dtype=cls.DTYPES[0]) if qconfig is None else parse_qconfig(qconfig)
        cls.check_float(mod, qconfig)
        return cls(mod, qconfig, tied_to)

    @classmethod
    def check_float(cls, mod: nn.Module, qconfig: QConfig, name: str = "") -> None:
        """Raises what stands against quantizing `mod`, naming its parameters after `name`.

        Raises:
            ValueError: for a parameter that is uninitialized or has another dtype than fp32, bf16
                and fp16; for a weight that holds NaN or Inf, that has more than 65,536 columns
                (int8), or a row that spans more than fp32 can hold (embeddings); for a dtype of
                the config that is not in DTYPES; for dynamic=False.
        """
        check_config(name, cls.FLOAT, qconfig, cls.DTYPES)
        prefix = f"{name}." if name else ""
        weights, biases = cls._float_parameters(mod)
        check_parameters({prefix + key: value for key, value in {**weights, **biases}.items()})
        for key, weight in weights.items():
            cls.FORMAT.check(prefix + key, cls._rows_of(mod, weight))

    @classmethod
    def _float_parameters(cls, mod):
        """The weights of a float module, and its biases, which may be None; each by name."""
        return {"weight": mod.weight}, {"bias": mod.bias}

    @classmethod
    def _format_of(cls, name, rows, qconfig, mod):
        """The format of the weight `name` of `mod`, whose rows these are."""
        return cls.FORMAT(name, rows, qconfig)

    @staticmethod
    def _rows(weight):
        """A weight of the float module with one row for each output."""
        return weight

    @classmethod
    def _rows_of(cls, mod, weight):
        """The same before there is a quantized module, of a weight of `mod`."""
        return cls._rows(weight)

    @staticmethod
    def _shown(weight):
        """The inverse of _rows."""
        return weight

    # How a float module is made of it.

    @torch.inference_mode(False)
    @torch.no_grad()
    def to_float(self) -> nn.Module:
        """The float module, with the dequantized weights in the dtype that they show.

        It shares no memory with this one, and its parameters take gradients. It is of the type that
        the class says, also where from_float was given one of a type derived from that.
        """
        with torch.device("meta"):
            mod = self._float_module()
        for name in self._formats:
            values = self._weight(name).dequantize()
            values = values.clone(memory_format=torch.contiguous_format)
            setattr(mod, name, nn.Parameter(values))
        for name, bias in self._held_biases().items():
            setattr(mod, name, nn.Parameter(bias.detach().clone()))
        return mod.train(self.training)

    def _float_module(self):
        """A float module of this kind, whose parameters are yet to be set."""
        raise NotImplementedError

    # What it holds.

    def _held(self, name):
        return tuple(self._buffers[key] for key in self._formats[name].buffers)

    def _held_biases(self):
        return {
            name: one
            for name, one in self._parameters.items()
            if one is not None and name != "placeholder"
        }

    def _set_placeholder(self, dtype):
        # A model without any parameter could not answer next(model.parameters()).dtype.
        device = next(iter(self._buffers.values())).device
        empty = torch.empty(0, dtype=dtype, device=device)
        self.placeholder = nn.Parameter(empty, requires_grad=False)

    def _dtype(self):
        """That of the float module."""
        placeholder = self._parameters.get("placeholder")
        if placeholder is not None:
            return placeholder.dtype
        return next(iter(self._held_biases().values())).dtype

    def _weight(self, name):
        """The QuantizedWeight that stands for a weight of the float module."""
        weight = quantized_weight([(self._formats[name], self._held(name))], self._dtype())
        return self._shown(weight)

    def __getattr__(self, name):
        if name in self.__dict__.get("_formats", ()):
            return self._weight(name)
        return super().__getattr__(name)

    def __setattr__(self, name, value):
        if name in self.__dict__.get("_formats", ()):
            self._assign(name, value)
        else:
            super().__setattr__(name, value)

    def _assign(self, name, value):
        """Assigning a float weight quantizes it, as where transformers ties an lm_head again.

        The weight of another quantized module is held along where it is held alike, and changes
        nothing where both can be forms of one float weight.
        """
        one = self._formats[name]
        is_alike = isinstance(value, QuantizedWeight) and tuple(value.shape) == one.float_shape
        if is_alike and (part := value.whole(self._rows)):
            other, held = part
            if _can_share(one, other):
                self._buffers.update(zip(one.buffers, held, strict=True))
                return
            if are_alike(one, self._held(name), other, held):
                return
        if isinstance(value, QuantizedWeight):
            value = value.dequantize()
        check_assigned(name, value, Entry(FLOAT_DTYPES, (one.float_shape,)))
        rows = self._rows(value.detach())
        one.check(name, rows)
        with torch.inference_mode(False), torch.no_grad():
            held = one.held_of(one.quantized(rows, name), rows.device)
            self._buffers.update(zip(one.buffers, held, strict=True))

    # How it is moved and copied.

    def _apply(self, fn, recurse=True):
        own = {id(buffer): buffer for one in self._formats for buffer in self._held(one)}

        def apply(tensor):
            return moved(fn, tensor) if id(tensor) in own else fn(tensor)

        result = super()._apply(apply, recurse)
        for name, one in self._formats.items():  # to_empty() leaves bytes that may not be a weight
            if own and next(iter(own.values())).is_meta and not self._held(name)[0].is_meta:
                self._buffers.update(zip(one.buffers, one.zeros(self._held(name)), strict=True))
        return result

    def __deepcopy__(self, memo):
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def __getstate__(self):
        own = {key for one in self._formats.values() for key in one.buffers}
        buffers = {key: value for key, value in self._buffers.items() if key not in own}
        entries = {name: one.entries(self._held(name)) for name, one in self._formats.items()}
        return {**self.__dict__, "_buffers": buffers, "_entries": entries}

    def __setstate__(self, state):
        state = state.copy()
        if "_formats" not in state:
            raise RuntimeError(
                f"this {type(self).__name__} was pickled by another version of dynquant, which "
                "reads it; load its state dict instead"
            )
        entries = state.pop("_entries")
        super().__setstate__(state)
        held = {}
        for name, one in self._formats.items():
            found = entries[name]
            tensors = one.held_of(found, next(iter(found.values())).device)
            held.update(zip(one.buffers, tensors, strict=True))
        self._buffers = {**held, **self._buffers}

    # Its state dict.

    def _state(self):
        """The entries of the state dict by key, version among them."""
        state = {}
        for name, one in self._formats.items():
            state.update(one.entries(self._held(name)))
        return {**state, **self._held_biases(), "version": torch.tensor(self.VERSION)}

    def _translated(self, state_dict, prefix):
        """A state dict in the names of this module, and a list of errors."""
        return state_dict, []

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for key, value in self._state().items():
            destination[prefix + key] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict,
        prefix,
        local_metadata,
        strict,
        missing_keys,
        unexpected_keys,
        error_msgs,
    ):
        lists = (strict, missing_keys, unexpected_keys)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, *lists, error_msgs)
        state_dict, errors = self._translated(state_dict, prefix)
        found, wrong = self._read(state_dict, prefix, *lists)
        errors += wrong
        version = found.pop("version", None)
        if not (errors or version is None or version.is_meta or 1 <= version <= self.VERSION):
            errors.append(
                f"{prefix}version is {int(version)}; this dynquant reads 1 to {self.VERSION}"
            )
        if errors:
            error_msgs.extend(errors)
        elif found:
            self._load(found, local_metadata.get("assign_to_params_buffers", False), prefix)

    def _formats_to_read(self):
        """The formats that say what a state dict may hold."""
        return self._formats

    def _read(self, state_dict, prefix, *lists):
        """What `state_dict` holds of this module, in its formats, and a list of errors.

        Args:
            lists: strict, missing_keys and unexpected_keys, as for read_entries.
        """
        state_dict = renamed_from_version_1(state_dict, prefix, self._formats.values())
        expected, errors, floats = {}, [], []
        for name, one in self._formats_to_read().items():
            if is_float(state_dict.get(prefix + name)) and not one.is_own(state_dict, prefix):
                floats.append(name)
                expected[name] = Entry(FLOAT_DTYPES, (one.float_shape,))
            else:
                expected.update(one.expected())
                errors += _torn(one, state_dict, prefix)
        for name, bias in self._held_biases().items():
            expected[name] = Entry(FLOAT_DTYPES, (tuple(bias.shape),))
        if not floats or f"{prefix}version" in state_dict:
            expected["version"] = Entry(INTEGERS, ((),))
        found, wrong = read_entries(self, expected, state_dict, prefix, *lists)
        errors += wrong
        for name in floats:
            if not errors:
                errors += self._quantize_found(found, name, prefix)
        return found, errors

    def _quantize_found(self, found, name, prefix):
        """Puts the entries of a float checkpoint's weight in `found`; gives the errors."""
        rows = self._rows(found.pop(name).detach())
        one = self._formats[name]
        try:
            one.check(prefix + name, rows)
        except ValueError as error:
            return [str(error)]
        found.update(one.quantized(rows, prefix + name))
        return []

    @torch.no_grad()
    def _load(self, found, assign, prefix):
        """Takes over what was read; as the module's own tensors where `assign`."""
        first = next(iter(self._buffers.values()))
        if first.is_meta and not assign:
            warnings.warn(
                f"{prefix}{next(iter(self._formats))} is on the meta device, which loading does "
                "not change; pass assign=True to load_state_dict",
                stacklevel=2,
            )
            return
        for one in self._formats.values():
            entries = {key: found.pop(key) for key in one.keys if key in found}
            if entries:
                device = entries[one.keys[0]].device if assign else first.device
                for key, value in zip(one.buffers, one.held_of(entries, device), strict=True):
                    self._buffers[key] = _taken(self._buffers[key], value, assign)
        for key, value in found.items():
            held = self._parameters[key]
            if assign:
                self._parameters[key] = nn.Parameter(value, requires_grad=False)
            else:
                held.copy_(value)
        if "placeholder" in self._parameters:
            self._set_placeholder(self.placeholder.dtype)


def _can_share(one, other):
    """Whether what one format holds of a float weight is what the other would hold."""
    return one.shape == other.shape and one.holds_like(other)


def _torn(one, state_dict, prefix):
    """Messages where a state dict has not all entries of a weight, or its float form as well."""
    there = [prefix + key for key in one.keys if prefix + key in state_dict]
    lacking = [prefix + key for key in one.keys if prefix + key not in state_dict]
    if there and lacking:
        yield f"{', '.join(there)} without {', '.join(lacking)}: both are loaded, or neither"
    for key in (f"{prefix}{one.name}{end}" for end in ("_int8", "_uint8")):
        if key in state_dict and key.removeprefix(prefix) not in one.keys:
            yield f"{key} is there, but {prefix}{one.name} is held in another form: {one}"
    if there and one.name not in one.keys and is_float(state_dict.get(prefix + one.name)):
        key = prefix + one.name
        yield f"{key} is {state_dict[key].dtype}, but {there[0]} is there as well"


def _taken(held, value, assign):
    """The buffer after `value` was loaded: the same tensor where that can hold it."""
    if not assign and held.shape == value.shape and held.dtype == value.dtype:
        return held.copy_(value)
    return value if assign else value.clone()
