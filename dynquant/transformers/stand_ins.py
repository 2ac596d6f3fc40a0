"""What stands in a model for quantized modules while transformers loads it."""

import torch
from torch import nn


class StandIn(nn.Module):
    """Hides a quantized module while a model is being loaded.

    The loader overwrites every buffer that no state dict has, which packed weights are. Some models
    initialize weights of submodules, and read their sizes; what is marked is left alone.
    """

    def __init__(self, form):
        super().__init__()
        self._form = [form]  # in a list, so that it is not a submodule
        self._is_hf_initialized = True
        for key in {*self.HIDDEN, *getattr(form, "_formats", ())}:
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


class AttentionStandIn(StandIn):
    """One of an attention: its parts are its own, by their names."""

    HIDDEN = ("in_proj_weight", "in_proj_bias")

    def __init__(self, form):
        super().__init__(form)
        self._modules, self._parameters = form._modules, form._parameters


class StateStandIn(StandIn):
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
            self.form.load_state_dict({**below, **self._entries(found)}, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{name}: {error}") from error

    def _entries(self, found):
        """What was found, as the module's state dict has it."""
        return found
