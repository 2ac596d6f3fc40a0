"""Ways to save a value and read it again, and to copy it."""

import copy
import io
import pickle
import warnings

import safetensors.torch
import torch


def torch_saved(value, weights_only=True):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def safetensors_saved(state_dict):
    return safetensors.torch.load(safetensors.torch.save(state_dict))


def jit_saved(module):
    """module: traced or scripted."""
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


def traced_and_saved(module, *inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return jit_saved(torch.jit.trace(module, inputs))


FORMATS = {"torch.save": torch_saved, "safetensors": safetensors_saved}
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": lambda value: torch_saved(value, weights_only=False),
}
