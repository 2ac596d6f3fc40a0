"""torchao's Int8Tensor: which of them dynquant can run, in memory and in safetensors files.

A file has `<layer>._weight_qdata`, `_weight_scale` and others, and in its metadata, as JSON under
`<layer>.weight`, what else the tensor says of itself.
"""

import json

from dynquant.foreign_layers import ForeignLayer, check, check_layers, refuse
from dynquant.qconfig import QConfig, per_channel, per_tensor, per_token

_TENSORS = {"qdata": "weight", "scale": "weight_scale", "zero_point": "zero_point"}
_GRANULARITIES = {"PerRow": per_token, "PerToken": per_token, "PerTensor": per_tensor}
_REFUSED = {
    "act_quant_scale": "a static scale of activations",
    "act_quant_zero_point": "a static zero point of activations",
    "act_pre_scale": "a scale that activations are multiplied with before",
}


def qconfig_of(layer, fields, tensors, shape):
    """The QConfig that means the same as a tensor.

    Args:
        layer: the name of the layer.
        fields: the tensor's attributes as JSON has them.
        tensors: the names of the tensors that it consists of.
        shape: of the weight.

    Raises:
        ValueError: for what dynquant has no form for.
    """
    for name in tensors:
        if name in _REFUSED:
            refuse(layer, name, _REFUSED[name], "dynamic activations alone")
        check(layer, "a tensor of the weight", name, tuple(_TENSORS))
    activation = fields.get("act_quant_kwargs")
    if activation is None:
        refuse(layer, "act_quant_kwargs", "None: activations in float", "dynamic in 8 bits")
    check(layer, "act_quant_kwargs", activation.get("_type"), ("QuantizeTensorToInt8Kwargs",))
    activation = activation["_data"]
    granularity = activation["granularity"]
    check(layer, "the activations' granularity", granularity["_type"], tuple(_GRANULARITIES))
    check(layer, "the activations' dim", granularity.get("_data", {}).get("dim", -1), (-1,))
    mapping = activation.get("mapping_type", {"_data": "SYMMETRIC"})["_data"]
    check(layer, "the activations' mapping_type", mapping, ("SYMMETRIC", "ASYMMETRIC"))
    weight = _weight_scheme(layer, fields.get("block_size"), shape)
    return QConfig(weight, _GRANULARITIES[granularity["_type"]], mapping == "SYMMETRIC")


def _weight_scheme(layer, block, shape):
    """What one scale is for: a row, or all; not a group of columns."""
    blocks = ([1, *shape[1:]], list(shape))
    if len(shape) != 2 or block not in blocks:
        refuse(layer, f"block_size of a weight {list(shape)}", block, "[1, K] or [N, K]")
    return per_channel if block[0] == 1 else per_tensor


def layers_of(headers, config=None):
    """The quantized layers of a checkpoint by their names in it, as ForeignLayers.

    Args:
        headers: its Headers.
        config: its quantization_config, which the files' metadata make superfluous.

    Raises:
        ValueError: as qconfig_of; for tensors of other types.
    """
    layers = {}
    shapes = headers.of(key for key in headers if key.endswith("_weight_qdata"))
    for key, text in headers.metadata.items():
        described = _tensor_json(text)
        if described is None or described["_type"] == "Tensor":
            continue
        layer, _, parameter = key.rpartition(".")
        check(key, "the tensor's type", described["_type"], ("Int8Tensor",))
        check(layer, "a quantized parameter", parameter, ("weight",))
        names = described.get("_tensor_data_names", ())
        if f"{layer}._weight_qdata" not in shapes:
            raise ValueError(f"{layer}: the checkpoint has no {layer}._weight_qdata")
        shape = shapes[f"{layer}._weight_qdata"][1]
        qconfig = qconfig_of(layer, described["_data"], names, shape)
        keys = {_TENSORS[name]: f"{layer}._weight_{name}" for name in names}
        if f"{layer}.bias" in headers:
            keys["bias"] = f"{layer}.bias"
        layers[layer] = ForeignLayer(qconfig, keys)
    check_layers(layers, headers)
    return layers


def _tensor_json(text):
    """What torchao says of a tensor, or None where an entry of the metadata is about none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) and "_type" in value else None
