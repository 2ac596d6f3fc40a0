"""Reading what torch.ao's dynamically quantized modules save: plain integers and scales."""

import torch

_OF_LINEAR = ("scale", "zero_point", "_packed_params.dtype", "_packed_params._packed_params")


def under_first_child(module, state_dict, prefix, *args):
    """A hook before loading: what torch.ao saved of a fused module is its first child's."""
    for key in _OF_LINEAR:
        if prefix + key in state_dict:
            state_dict[f"{prefix}0.{key}"] = state_dict.pop(prefix + key)


def with_plain_linear(state_dict, prefix):
    """`state_dict` with plain entries in place of those of a torch.ao Linear below `prefix`.

    torch.ao saves scale, zero_point, _packed_params.dtype and _packed_params._packed_params; in
    their place come weight_int8, weight_scale, bias where there is one, and version, or weight and
    bias alone where the weight is float.

    Returns:
        the state dict, a new one where anything was replaced, and a list of error messages.
    """
    packed_key = f"{prefix}_packed_params._packed_params"
    if packed_key not in state_dict:
        return state_dict, []
    others = {prefix + key for key in _OF_LINEAR} - {packed_key}
    state_dict = {key: value for key, value in state_dict.items() if key not in others}

    def entries(packed_params):
        return {prefix + key: value for key, value in plain_linear(packed_params).items()}

    return with_plain_entries(state_dict, {packed_key: entries})


def with_plain_table(state_dict, prefix, bits, columns):
    """`state_dict` with plain entries in place of those of a torch.ao Embedding below `prefix`.

    torch.ao saves _packed_params.dtype and _packed_params._packed_weight; in their place come
    weight_uint8, weight_qparams and version.

    Args:
        bits, columns: of the table that they are for.

    Returns:
        as with_plain_linear.
    """
    key = f"{prefix}_packed_params._packed_weight"
    if key not in state_dict:
        return state_dict, []
    others = {f"{prefix}_packed_params.dtype"}
    state_dict = {name: value for name, value in state_dict.items() if name not in others}

    def entries(weight):
        return {prefix + name: one for name, one in plain_table(weight, bits, columns).items()}

    return with_plain_entries(state_dict, {key: entries})


def with_plain_entries(state_dict, readers):
    """`state_dict` with plain entries in place of what torch.ao saved under the keys of `readers`.

    Args:
        readers: {key: function that gives the entries for what was saved there; a ValueError of
            it is an error of that key}.

    Returns:
        the state dict, a new one where anything was replaced, and a list of error messages.
    """
    found = [key for key in readers if key in state_dict]
    if not found:
        return state_dict, []
    result = {key: value for key, value in state_dict.items() if key not in readers}
    errors = []
    for key in found:
        try:
            result.update(readers[key](state_dict[key]))
        except ValueError as error:
            errors.append(f"{key}: {error}")
    return result, errors


def plain_linear(packed_params):
    """What a torch.ao Linear's (weight, bias) is in the state dict of dynquant.nn.Linear.

    Args:
        packed_params: a tuple of a weight [N, K], quantized or float, and a bias [N] or None; or
            the ScriptObject that holds both.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(packed_params, torch.ScriptObject):
        packed_params = _unpack_linear(packed_params)
    if not isinstance(packed_params, tuple) or len(packed_params) != 2:
        raise ValueError(
            f"expected torch.ao's (weight, bias), found {type(packed_params).__name__}"
        )
    weight, bias = packed_params
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise ValueError(f"expected a weight [N, K], found {weight!r}")
    entries = plain_weight(weight, "weight")
    if "weight_scale" in entries:
        entries["version"] = torch.tensor(2)
    if bias is not None:
        entries["bias"] = bias.detach()
    return entries


def plain_weight(weight, name):
    """A quantized weight [N, K] as {name_int8: [N, K], name_scale: fp32 [N] or [1]}.

    A weight without zero point keeps its integers, -128 included. One with zero points, of another
    dtype than qint8, or scaled along another axis comes as {name: fp32 [N, K]}, its dequantized
    values; a float weight as it is.
    """
    if not weight.is_quantized:
        return {name: weight.detach()}
    per_channel = weight.qscheme() in (
        torch.per_channel_affine,
        torch.per_channel_symmetric,
        torch.per_channel_affine_float_qparams,
    )
    if per_channel:
        scale, offsets = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
        rows = weight.q_per_channel_axis() == 0
    else:
        scale, offsets = torch.tensor([weight.q_scale()]), torch.tensor([weight.q_zero_point()])
        rows = True
    if weight.dtype != torch.qint8 or not rows or offsets.any():
        return {name: weight.dequantize()}
    return {f"{name}_int8": weight.int_repr(), f"{name}_scale": scale.to(torch.float32)}


def plain_table(weight, bits, columns):
    """What a torch.ao Embedding's weight is in the state dict of dynquant.nn.Embedding.

    Args:
        weight: quint8 [V, D], or quint4x2 [V, D rounded up to an even number], with the scale and
            the zero point of each row, which are floats.
        bits, columns: those that the table shall have.

    Raises:
        ValueError: for anything else.
    """
    is_quantized = isinstance(weight, torch.Tensor) and weight.is_quantized and weight.dim() == 2
    if not is_quantized or weight.qscheme() != torch.per_channel_affine_float_qparams:
        raise ValueError(
            f"expected torch.ao's table of an embedding, found {type(weight).__name__}"
        )
    found = {torch.quint8: 8, torch.quint4x2: 4}.get(weight.dtype)
    if found != bits:
        raise ValueError(f"expected a table in {bits} bits, found one in {weight.dtype}")
    padded = columns if bits == 8 else columns + columns % 2
    if weight.shape[1] != padded or weight.q_per_channel_axis() != 0:
        raise ValueError(f"expected the shape [V, {padded}], found {list(weight.shape)}")
    scale = weight.q_per_channel_scales().to(torch.float32)
    offset = -weight.q_per_channel_zero_points().to(torch.float32) * scale
    return {
        "weight_uint8": weight.int_repr().reshape(len(weight), -1),
        "weight_qparams": torch.stack([scale, offset], 1),
        "version": torch.tensor(2),
    }


def plain_cell(param):
    """One layer and direction of a torch.ao LSTM or GRU.

    Args:
        param: the ScriptObject under `_all_weight_values.{i}.param`; i counts the directions of a
            layer first.

    Returns:
        weight_ih_int8, weight_hh_int8, weight_ih_scale and weight_hh_scale, or weight_ih and
        weight_hh in fp32 where torch.ao kept 16 bits,, and bias_ih, bias_hh.

    Raises:
        ValueError: for another object.
    """
    try:
        (kind, tensors, _, _, packed), _ = param.__getstate__()
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"expected torch.ao's parameters of a cell, found {type(param).__name__}"
        ) from error
    if kind not in ("quantized_dynamic", "quantized_fp16"):
        raise ValueError(f"expected dynamically quantized parameters of a cell, found {kind!r}")
    result = {}
    for place, (name, one) in enumerate(zip(("ih", "hh"), packed, strict=True)):
        weight, bias = _unpack_linear(one)
        bias = tensors[place] if kind == "quantized_dynamic" else bias
        result.update(plain_weight(weight, f"weight_{name}"))
        if bias is not None:
            result[f"bias_{name}"] = bias.detach()
    return result


def _unpack_linear(packed):
    """(weight, bias) of a ScriptObject of LinearPackedParamsBase."""
    for unpack in (torch.ops.quantized.linear_unpack, torch.ops.quantized.linear_unpack_fp16):
        try:
            return unpack(packed)
        except RuntimeError:
            continue
    raise ValueError("expected torch.ao's packed parameters of a linear layer")
