"""PlainState: what modules share whose buffers are their state dict."""

import warnings

import torch
from torch import nn

from dynquant.nn._move import moved
from dynquant.nn._state import INTEGERS, Entry, OwnState, is_float, read_entries


class PlainState(OwnState):
    """A module in eval mode whose buffers keep their dtypes and make up its state dict.

    With them the state dict holds the parameters, which are biases, and version (int64). One
    without version, whose weights are float, is of a float module and is converted on load.
    A parameter without elements, `placeholder`, carries the float dtype and the device, so that
    a model without any other parameter can tell them.
    """

    def _entries(self):
        """The Entry of each key but version."""
        raise NotImplementedError

    def _weight_names(self):
        """The keys under which a float module has what is converted."""
        raise NotImplementedError

    def _float_entries(self):
        """The Entry of each key of the float module."""
        raise NotImplementedError

    def _convert(self, found, name, prefix):
        """Puts what is held for the float weight `name` in `found`, where it is.

        Raises:
            ValueError: for a weight that cannot be converted.
        """
        raise NotImplementedError

    def _read(self, state_dict, prefix, *lists):
        floats = [key for key in self._weight_names() if is_float(state_dict.get(prefix + key))]
        if f"{prefix}version" in state_dict or not floats:
            entries = {**self._entries(), "version": Entry(INTEGERS, ((),))}
            return read_entries(self, entries, state_dict, prefix, *lists)
        found, errors = read_entries(self, self._float_entries(), state_dict, prefix, *lists)
        for name in floats:
            if not errors and name in found:
                try:
                    self._convert(found, name, prefix)
                except ValueError as error:
                    errors.append(str(error))
        return found, errors

    def _set_placeholder(self, like, dtype):
        empty = torch.empty(0, dtype=dtype, device=like.device)
        self.placeholder = nn.Parameter(empty, requires_grad=False)

    def _state(self):
        version = torch.tensor(self.VERSION)
        return {**self._buffers, **self._held_biases(), "version": version}

    def _held_biases(self):
        held = self._parameters.items()
        return {key: one for key, one in held if one is not None and key != "placeholder"}

    def _apply(self, fn, recurse=True):
        held = {id(buffer) for buffer in self._buffers.values()}
        return super()._apply(
            lambda tensor: moved(fn, tensor) if id(tensor) in held else fn(tensor), recurse
        )

    @torch.no_grad()
    def _load(self, found, assign, prefix):
        if self.placeholder.is_meta and not assign:
            warnings.warn(
                f"{prefix}{next(iter(self._buffers))} is on the meta device, which loading does "
                "not change; pass assign=True to load_state_dict",
                stacklevel=2,
            )
            return
        for key, value in found.items():
            held = self._buffers.get(key, self._parameters.get(key))
            if not assign and (key in self._parameters or held.dtype == value.dtype):
                held.copy_(value)
            elif key in self._parameters:
                self._parameters[key] = nn.Parameter(value, requires_grad=False)
            else:
                self._buffers[key] = value if assign else value.to(held.device)
        self._set_placeholder(next(iter(self._buffers.values())), self.placeholder.dtype)
