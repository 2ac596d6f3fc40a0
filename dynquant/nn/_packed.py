"""What the modules with int8 weights share: packed weights, and their life around the forward."""

import copy
import warnings

import torch
from torch import nn

import dynquant.ops  # noqa: F401 (registers torch.ops.dynquant)
from dynquant.nn._checks import FLOAT_DTYPES, check_finite, check_scale
from dynquant.nn._move import moved
from dynquant.nn._processes import share_between_processes
from dynquant.nn._state import (
    INTEGERS,
    Entry,
    OwnState,
    check_assigned,
    is_float,
    read_entries,
)
from dynquant.nn.weight import QuantizedTable
from dynquant.qconfig import per_channel

MAX_IN_FEATURES = 65536  # beyond it a sum could leave int32


def check_weight(key, weight):
    """Raises ValueError unless the float `weight` [N, K] can be quantized."""
    if weight.shape[1] > MAX_IN_FEATURES:
        raise ValueError(
            f"{key} has {weight.shape[1]} columns; at most {MAX_IN_FEATURES} can be quantized "
            "exactly"
        )
    check_finite(key, weight)


def packed_from_float(weight, weight_scheme):
    """The packed form of a float weight [N, K], and its scale [N] or [1]."""
    quantized, scale = torch.ops.dynquant.quantize_weight(
        weight.detach(), weight_scheme == per_channel
    )
    return torch.ops.dynquant.pack_weight(quantized), scale


def packed_name(name):
    """The buffer with the packed form of the weight `name`."""
    return name.replace("weight", "packed", 1)


class PackedModule(OwnState):
    """A module with int8 weights, each held once, packed for the machine.

    A weight `name` [N, K] is the buffer packed_name(name), derived on load and never in a state
    dict, and the buffer f"{name}_scale" (fp32 [N] or [1], in a model of any dtype). The state dict
    has `name` as int8 [N, K], f"{name}_scale", the biases, and version (int64). load_state_dict
    also takes what the float module has; its weights are then quantized as these were. So is a
    float tensor that is assigned to a weight.
    """

    DTYPES = (torch.qint8,)

    def __init_subclass__(cls, **arguments):
        super().__init_subclass__(**arguments)
        share_between_processes(cls)

    def _hold(self, weights, biases, dtype):
        """Registers what the module holds.

        Args:
            weights: for each name (packed, scale, n, k).
            biases: for each name a tensor [N] or None.
            dtype: of the float module.
        """
        self._shapes = {name: (n, k) for name, (_, _, n, k) in weights.items()}
        self._bias_names = tuple(biases)
        for name, (packed, scale, _, _) in weights.items():
            self.register_buffer(packed_name(name), packed, persistent=False)
            self.register_buffer(f"{name}_scale", scale)
        for name, bias in biases.items():
            bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
            self.register_parameter(name, bias)
        if not self._held_biases():
            # A model without any parameter could not answer next(model.parameters()).dtype.
            placeholder = next(iter(self._buffers.values())).new_empty(0, dtype=dtype)
            self.placeholder = nn.Parameter(placeholder, requires_grad=False)
        self.eval()

    def __setattr__(self, name, value):
        if name in self.__dict__.get("_shapes", ()):
            self._quantize_weight(name, value)
        else:
            super().__setattr__(name, value)

    def _quantize_weight(self, name, value):
        """Assigning a float weight quantizes it, as where transformers ties an lm_head again.

        A quantized embedding's counts as its values, but for a weight that agrees with those.
        """
        if isinstance(value, QuantizedTable):
            if value.is_alike(self._plain_weight(name), self._scale(name)):
                return
            value = value.dequantized()
        check_assigned(name, value, self._entries([name])[name])
        weight = self._rows(value.detach())
        check_weight(name, weight)
        with torch.inference_mode(False), torch.no_grad():
            quantized, scale = torch.ops.dynquant.quantize_weight(
                weight, self._is_per_channel(name)
            )
            self._buffers[f"{name}_scale"] = scale
            self._buffers[packed_name(name)] = torch.ops.dynquant.pack_weight(quantized)

    def _held_biases(self):
        held = {name: self._parameters[name] for name in self._bias_names}
        return {name: bias for name, bias in held.items() if bias is not None}

    def _packed(self, name):
        return self._buffers[packed_name(name)]

    def _scale(self, name):
        return self._buffers[f"{name}_scale"]

    def _plain_weight(self, name="weight"):
        return torch.ops.dynquant.unpack_weight(self._packed(name), *self._shapes[name])

    @staticmethod
    def _rows(weight):
        """A weight of the float module with one row for each output."""
        return weight

    def _apply(self, fn, recurse=True):
        held = list(self._buffers.values())  # kept alive: a new tensor has none of their ids
        scales = {id(self._scale(name)) for name in self._shapes}
        repacked = {}
        for name in self._shapes:
            device = moved(fn, self._scale(name)).device
            repacked[id(self._packed(name))] = self._repacked(fn, name, device)

        def moved_or_repacked(tensor):
            if id(tensor) in repacked:
                return repacked[id(tensor)]
            return moved(fn, tensor) if id(tensor) in scales else fn(tensor)

        result = super()._apply(moved_or_repacked, recurse)
        del held
        return result

    def _repacked(self, fn, name, device):
        packed = self._packed(name)
        if device.type == packed.device.type:
            return moved(fn, packed)
        weight = moved(fn, self._plain_weight(name))
        if packed.is_meta:  # to_empty() leaves bytes that may be no weight
            weight.zero_()
        return torch.ops.dynquant.pack_weight(weight)

    def __deepcopy__(self, memo):
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def __getstate__(self):
        packed = {packed_name(name) for name in self._shapes}
        buffers = {key: value for key, value in self._buffers.items() if key not in packed}
        weights = {name: self._plain_weight(name) for name in self._shapes}
        return {**self.__dict__, "_buffers": buffers, "_weights": weights}

    def __setstate__(self, state):
        state = state.copy()
        weights = state.pop("_weights")
        super().__setstate__(state)
        packed = {
            packed_name(name): torch.ops.dynquant.pack_weight(weight)
            for name, weight in weights.items()
        }
        self._buffers = {**packed, **self._buffers}

    def _state(self):
        state = {}
        for name in self._shapes:
            state[name] = self._plain_weight(name)
            state[f"{name}_scale"] = self._scale(name)
        return {**state, **self._held_biases(), "version": torch.tensor(self.VERSION)}

    def _read(self, state_dict, prefix, *lists):
        floats = [name for name in self._shapes if is_float(state_dict.get(prefix + name))]
        found, errors = read_entries(self, self._entries(floats), state_dict, prefix, *lists)
        for name in floats:
            if not errors:
                errors += self._quantize_found(found, name, prefix, state_dict)
        return found, errors

    def _entries(self, floats=()):
        """What a state dict may hold; the weights named in `floats` are those of a float module."""
        entries = {}
        for name, (n, k) in self._shapes.items():
            if name in floats:
                shape = self._rows(torch.empty(n, k, device="meta")).shape
                entries[name] = Entry(FLOAT_DTYPES, (tuple(shape),))
            else:
                entries[name] = Entry((torch.int8,), ((n, k),))
                entries[f"{name}_scale"] = Entry((torch.float32,), ((n,), (1,)), check_scale)
        for name, bias in self._held_biases().items():
            entries[name] = Entry(FLOAT_DTYPES, (tuple(bias.shape),))
        if not floats:
            entries["version"] = Entry(INTEGERS, ((),))
        return entries

    def _quantize_found(self, found, name, prefix, state_dict):
        """Puts the quantized form of a float checkpoint's weight in `found`; gives the errors."""
        key, scale_key = f"{prefix}{name}", f"{prefix}{name}_scale"
        if scale_key in state_dict:
            return [f"{key} is {found[name].dtype}, but {scale_key} is there as well"]
        if name not in found:
            return []
        weight = self._rows(found[name].detach())
        try:
            check_weight(key, weight)
        except ValueError as error:
            return [str(error)]
        found[name], found[f"{name}_scale"] = torch.ops.dynquant.quantize_weight(
            weight, self._is_per_channel(name)
        )
        return []

    def _is_per_channel(self, name):
        return self._scale(name).numel() == self._shapes[name][0]

    @torch.no_grad()
    def _load(self, found, assign, prefix):
        first = next(iter(self._shapes))
        if self._packed(first).is_meta and not assign:
            warnings.warn(
                f"{prefix}{first} is on the meta device, which loading does not change; "
                "pass assign=True to load_state_dict",
                stacklevel=2,
            )
            return
        for name in self._shapes:
            if name in found:
                found |= self._packed_found(found.pop(name), found, name, assign)
        for key, value in found.items():
            held = getattr(self, key)
            if not assign and held.shape == value.shape:
                held.copy_(value)
            elif key in self._parameters:
                self._parameters[key] = nn.Parameter(value, requires_grad=False)
            else:
                self._buffers[key] = value if assign else value.to(held.device)
        if not self._held_biases():
            placeholder = torch.empty_like(self.placeholder, device=self._packed(first).device)
            self.placeholder = nn.Parameter(placeholder, requires_grad=False)

    def _packed_found(self, weight, found, name, assign):
        """The buffers of a weight int8 [N, K] that was found."""
        weight = weight if assign else weight.to(self._packed(name).device)
        scale = found.get(f"{name}_scale", self._scale(name)).to(weight.device)
        buffers = {}
        if not weight.is_meta and (weight == -128).any():
            values = weight.to(torch.float32) * scale[:, None]
            weight, buffers[f"{name}_scale"] = torch.ops.dynquant.quantize_weight(
                values, scale.numel() == self._shapes[name][0]
            )
        buffers[packed_name(name)] = torch.ops.dynquant.pack_weight(weight)
        return buffers
