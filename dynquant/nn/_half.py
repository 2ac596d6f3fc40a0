"""Weights in 16 bits: how a float weight becomes one, and the state of modules that hold them."""

import warnings

import torch

from dynquant.nn._checks import FLOAT_DTYPES, check_finite
from dynquant.nn._plain import PlainState
from dynquant.nn._state import Entry, check_assigned
from dynquant.nn.weight import Int8Weight, QuantizedTable
from dynquant.ops.library import HALF_DTYPES


class HalfWeight(torch.Tensor):
    """A weight in 16 bits that tells, as Int8Weight does, that no float kernel is to take it."""

    __torch_function__ = Int8Weight.__torch_function__


class HalfState(PlainState):
    """A module whose buffers are weights in 16 bits [N, K], and its parameters biases.

    The state dict has both by the names of the float module, and version (int64). A weight in the
    other 16-bit dtype is loaded as it is; those of a float module are rounded to the dtypes of
    those that are held. So is a float tensor that is assigned to a weight.
    """

    DTYPES = HALF_DTYPES

    check_weight = staticmethod(check_finite)

    @staticmethod
    def _rows(weight):
        """A weight of the float module with one row for each output."""
        return weight

    def __setattr__(self, name, value):
        if name in self.__dict__.get("_buffers", ()):
            self._round_weight(name, value)
        else:
            super().__setattr__(name, value)

    def _round_weight(self, name, value):
        """Assigning a float weight rounds it, as where transformers ties an lm_head again.

        A quantized embedding's counts as its values, but for a weight that agrees with those.
        """
        held = self._buffers[name]
        if isinstance(value, QuantizedTable):
            if value.is_alike(held):
                return
            value = value.dequantized()
        check_assigned(name, value, self._float_entries()[name])
        with torch.inference_mode(False), torch.no_grad():
            found = {name: value.detach()}
            self._convert(found, name, "")
            self._buffers[name] = found[name]

    def _entries(self):
        return self._entries_of(HALF_DTYPES, lambda weight: weight)

    def _entries_of(self, dtypes, form):
        """The entries where weights have one of the dtypes and the shape of form(weight)."""
        weights = {key: Entry(dtypes, (_shape(form(held)),)) for key, held in self._buffers.items()}
        biases = {
            key: Entry(FLOAT_DTYPES, (_shape(held),)) for key, held in self._held_biases().items()
        }
        return {**weights, **biases}

    def _weight_names(self):
        return list(self._buffers)

    def _float_entries(self):
        return self._entries_of(FLOAT_DTYPES, self._rows)  # which is its own inverse

    def _convert(self, found, name, prefix):
        key, weight = prefix + name, found[name]
        self.check_weight(key, weight)
        found[name] = in_16_bits(self._rows(weight), self._buffers[name].dtype, key)


def in_16_bits(weight, dtype, key="a weight"):
    """A copy of the finite float `weight` in the dtype, whose range it does not leave.

    Args:
        key: what the warning calls it.

    Warns:
        UserWarning: where values are beyond the range, which become the nearest finite ones.
    """
    largest = torch.finfo(dtype).max
    half = weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not weight.is_meta and not half.isfinite().all():
        warnings.warn(
            f"{key} reaches {weight.abs().max():.4g}; {dtype} ends at {largest:.4g}, which "
            "stands for what is beyond (torch.bfloat16 has the range of fp32)",
            stacklevel=2,
        )
        half = half.clamp(-largest, largest)
    return half


def _shape(tensor):
    return tuple(tensor.shape)
