"""Linear layers that other libraries have quantized to int8, and which of them dynquant can run.

dynquant has: int8 weights, symmetric, with one scale for each output or one for all; activations
quantized at each call to 8 bits, for each row or for the whole tensor.
"""

from typing import NamedTuple

from dynquant.nn._checks import FLOAT_DTYPES
from dynquant.nn._formats import MAX_IN_FEATURES
from dynquant.qconfig import QConfig, per_channel

_SCALES = ("F32", "BF16", "F16", *FLOAT_DTYPES)  # as safetensors and as torch call them


class ForeignLayer(NamedTuple):
    """What a checkpoint has of a quantized linear layer.

    qconfig: a QConfig of the same meaning.
    keys: the names in the checkpoint of `weight`, `weight_scale`, and of `zero_point` and `bias`
        where it has them.
    """

    qconfig: QConfig
    keys: dict


def refuse(layer, what, found, allowed):
    """Raises the ValueError of a layer that dynquant has no form for."""
    raise ValueError(f"{layer}: {what} is {found}; allowed: {allowed}")


def check(layer, what, found, allowed):
    """Refuses a value that is not one of `allowed`."""
    if not any(found is one or found == one for one in allowed):
        refuse(layer, what, repr(found), " or ".join(map(repr, allowed)))


def check_layers(layers, headers):
    """Refuses layers whose tensors are not as their configs say.

    Args:
        layers: ForeignLayers by name.
        headers: the Headers of their checkpoint.
    """
    for name, layer in layers.items():
        for entry in ("weight", "weight_scale"):
            if layer.keys[entry] not in headers:
                raise ValueError(f"{name}: the checkpoint has no {layer.keys[entry]}")
    described = headers.of(key for layer in layers.values() for key in layer.keys.values())
    for name, layer in layers.items():
        dtype, shape = described[layer.keys["weight"]]
        check(name, "the weight's dtype", dtype, ("I8",))
        if len(shape) != 2:
            refuse(name, "the weight's shape", list(shape), "[N, K]")
        if shape[1] > MAX_IN_FEATURES:
            refuse(name, "the number of columns", shape[1], f"at most {MAX_IN_FEATURES}")
        check_scale(name, *described[layer.keys["weight_scale"]], shape[0], layer.qconfig)
    zero_points = {
        layer.keys["zero_point"]: name
        for name, layer in layers.items()
        if "zero_point" in layer.keys
    }
    for key, value in headers.tensors(zero_points).items():
        check_zero_point(zero_points[key], value)


def check_scale(layer, dtype, shape, n, qconfig):
    check(layer, "the scale's dtype", dtype, _SCALES)
    shapes = ((n, 1), (n,)) if qconfig.weight == per_channel else ((1, 1), (1,), ())
    if tuple(shape) not in shapes:
        allowed = " or ".join(str(list(one)) for one in shapes)
        refuse(layer, f"the scale's shape ({qconfig.weight})", list(shape), allowed)


def check_zero_point(layer, zero_point):
    if zero_point.count_nonzero():
        refuse(layer, "the weight", "asymmetric: its zero points are not 0", "symmetric weights")
