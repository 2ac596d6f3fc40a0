"""A module's own entries of a state dict: how they are written, and read strictly."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Entry(NamedTuple):
    """What a state dict may hold under one key.

    check(key, value), where there is one, raises ValueError for values that it must not hold.
    """

    dtypes: tuple
    shapes: tuple
    check: Callable | None = None


def read_entries(module, expected, state_dict, prefix, strict, missing_keys, unexpected_keys):
    """The entries of `state_dict` below `prefix`, and the messages of what is wrong with them.

    Args:
        module: whose entries they are; those of its submodules are theirs.
        expected: key to Entry. Expected keys that are absent, and keys that are not expected,
            are appended to missing_keys and unexpected_keys where `strict` asks for it.
    """
    found = {key: state_dict[prefix + key] for key in expected if prefix + key in state_dict}
    if strict:
        missing_keys.extend(prefix + key for key in expected if key not in found)
        below = (key.removeprefix(prefix) for key in state_dict if key.startswith(prefix))
        unexpected_keys.extend(
            prefix + key
            for key in below
            if key not in expected and key.split(".")[0] not in module._modules
        )
    return found, errors_in(found, expected, prefix)


def errors_in(found, expected, prefix):
    """The messages of what is wrong with the entries `found`, each by its key in `expected`."""
    return [
        message
        for key, value in found.items()
        for message in _complaints(prefix + key, value, expected[key])
    ]


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def frozen_copy(value):
    """A parameter without gradient of a copy of the tensor; None where that is None."""
    return None if value is None else nn.Parameter(value.detach().clone(), requires_grad=False)


def check_assigned(name, value, entry):
    """Raises what stands against `value` as the float form of the weight `name`.

    Raises:
        TypeError: for anything but a float tensor.
        ValueError: for one that is not as `entry` says.
    """
    if not is_float(value):
        raise TypeError(f"a float tensor can be assigned to {name}: it is quantized then")
    if value.dtype not in entry.dtypes or tuple(value.shape) not in entry.shapes:
        raise ValueError(
            f"{name} is {value.dtype} {list(value.shape)}; allowed: "
            f"{', '.join(map(str, entry.dtypes))} {list(entry.shapes[0])}"
        )


def _complaints(key, value, entry):
    if not isinstance(value, torch.Tensor):
        yield f"{key}: expected a tensor, found {type(value).__name__}"
        return
    if value.dtype not in entry.dtypes:
        yield f"{key}: expected {_either(entry.dtypes)}, found {value.dtype}"
    if tuple(value.shape) not in entry.shapes:
        shapes = _either(list(shape) for shape in entry.shapes)
        yield f"{key}: expected the shape {shapes}, found {list(value.shape)}"
    elif entry.check is not None and value.dtype in entry.dtypes:
        try:
            entry.check(key, value)
        except ValueError as error:
            yield str(error)


def _either(values):
    return " or ".join(str(value) for value in values)
