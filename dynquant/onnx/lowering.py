"""Replaces the nodes of dynquant's domain by operators of the standard."""

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience
from onnx_ir.passes.common import RemoveUnusedNodesPass

from dynquant.onnx.builder import Builder
from dynquant.onnx.nodes import DOMAIN, arguments_of, scope_of
from dynquant.onnx.products import (
    FLOAT,
    FloatProduct,
    Int8Product,
    Scheme,
    in_bytes,
    integers_of,
    limited,
)
from dynquant.onnx.recurrent import recurrence

_FUSED = (
    *("linear_block", "feed_forward", "attention", "query_key_value", "attend"),
    *("scaled_dot_product", "rotary", "encoder", "embedding_sum", "activation"),
    *("layer_norm", "rms_norm", "softmax"),
)


def lower(model, unsigned_weights=False):
    """Replaces every node of dynquant's domain in an ir.Model, which is changed.

    Raises:
        ValueError: for a node that has no form in the standard.
    """
    nodes = [
        node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain == DOMAIN
    ]
    for node in nodes:
        if node.op_type not in _LOWERINGS:
            raise ValueError(f"{scope_of(node)}: {_without_form(node.op_type)}")
    for node in nodes:
        _replace(node, model.graph, unsigned_weights)
    RemoveUnusedNodesPass()(model)  # packed weights, zero points that are known
    model.opset_imports.pop(DOMAIN, None)


def _without_form(op):
    if op in _FUSED:
        return (
            f"the fused op {op} has no form in ONNX: pass the model itself, not an ExportedProgram"
        )
    return f"the op {op} has no form in ONNX; allowed: {', '.join(sorted(_LOWERINGS))}"


def _replace(node, root, unsigned):
    b = Builder(root, node.outputs[0].name)
    given = arguments_of(node)
    try:
        made = _LOWERINGS[node.op_type](b, given, unsigned)
    except ValueError as error:
        raise ValueError(f"{scope_of(node)}: {error}") from error
    made = [b.cast(one, old.dtype) for one, old in zip(made, node.outputs, strict=True)]
    for one in b.made:
        one.metadata_props.update(node.metadata_props)
    convenience.replace_nodes_and_values(node.graph, node, [node], b.made, node.outputs, made)


def _linear_dynamic(b, given, unsigned):
    product = Int8Product(
        b, given["packed"], given["weight_scale"], given["bias"], _scheme(given), unsigned
    )
    return [product(b, b.floats(given["x"]))]


def _conv1d_dynamic(b, given, unsigned):
    """The linear layer on what the kernel sees: a slice for each of its positions."""
    scheme = _scheme(given)
    if not scheme.per_token:
        raise ValueError(
            "a convolution whose activation is per_tensor has no form; allowed: per_token"
        )
    x = b.floats(given["x"])
    left, right = given["padding_left"], given["padding_right"]
    if left or right:
        x = b("Pad", x, b.constant([0, 0, left, 0, 0, right], np.int64))
    packed, columns = given["packed"], (given["weight_scale"], given["bias"])
    groups = packed.shape[0] if len(packed.shape) == 2 else None
    if groups is not None:  # [B, G, channels, positions]; a row of columns for each group
        channels = given["x"].shape[1] // groups
        x = b("Reshape", x, b.constant([0, groups, channels, -1], np.int64))
        shape = b.constant([groups, 1, -1], np.int64)
        columns = (one if one is None else b("Reshape", b.floats(one), shape) for one in columns)
    last = 2 if groups is None else 3
    rows = _windows(b, x, given, last)
    y = _turned(b, Int8Product(b, packed, *columns, scheme, unsigned)(b, rows), last)
    if groups is not None:
        y = b("Reshape", y, b.constant([0, given["weight_scale"].shape[0], -1], np.int64))
    return [y]


def _windows(b, x, given, last):
    """[..., windows, kernel_size * channels] of x [..., channels, positions]."""
    taps, dilation = given["kernel_size"], given["dilation"]
    axis, step = (b.constant([one], np.int64) for one in (last, given["stride"]))
    seen = []
    for tap in range(taps):
        behind = (taps - 1 - tap) * dilation  # positions that this one never sees
        ends = (tap * dilation, -behind if behind else np.iinfo(np.int64).max)
        begin, end = (b.constant([one], np.int64) for one in ends)
        seen.append(b("Slice", x, begin, end, axis, step))
    return _turned(b, b("Concat", *seen, axis=last - 1), last)


def _turned(b, x, last):
    """x with its last two dimensions exchanged, the very last of which is number `last`."""
    return b("Transpose", x, perm=[*range(last - 1), last, last - 1])


def _linear_half(b, given, unsigned):
    return [FloatProduct(b, given["half_weight"], given["bias"])(b, b.floats(given["x"]))]


def _scheme(given):
    bits = given.get("activation_bits", given.get("bits", 8))
    return Scheme(given.get("per_token", True), bool(given["symmetric"]), bits)


def _quantize_activation(b, given, unsigned):
    x, scheme = b.floats(given["x"]), _scheme(given)
    if scheme.is_standard:
        q, scale, zero_point = b("DynamicQuantizeLinear", x, outputs=3)
        q, zero_point = (b("Cast", one, to=int(FLOAT)) for one in (q, zero_point))
    else:
        q, scale, zero_point = integers_of(b, x, scheme)
        if zero_point is None:
            zero_point = b("Sub", scale, scale)
    return q, _as_rows(b, scale, scheme), _as_rows(b, zero_point, scheme)


def _as_rows(b, value, scheme):
    if scheme.per_token:
        return b("Squeeze", value, b.constant([-1], np.int64))
    return b("Reshape", value, b.constant([1], np.int64))


def _quantize_with(b, given, unsigned):
    scheme = _scheme(given)
    scale, zero_point = (_against(b, given[key], given["x"]) for key in ("scale", "zero_point"))
    return [limited(b, b("Div", b.floats(given["x"]), scale), zero_point, scheme)]


def _against(b, qparams, x):
    """Scales or zero points in fp32, those of rows so that they broadcast against x."""
    is_of_rows = len(qparams.shape) == len(x.shape) - 1
    qparams = b.floats(qparams)
    if is_of_rows:
        return b("Unsqueeze", qparams, b.constant([-1], np.int64))
    return b("Reshape", qparams, b.constant([1] * len(x.shape), np.int64))


def _scaled_mm(b, given, unsigned):
    q = given["q"]
    symmetric = q.dtype == ir.DataType.INT8
    scheme = Scheme(True, symmetric, 16 if q.dtype == ir.DataType.UINT16 else 8)
    zero_point = None if symmetric else _against(b, given["zero_point"], q)
    scale = _against(b, given["scale"], q)
    product = Int8Product(
        b, given["packed"], given["weight_scale"], given["bias"], scheme, unsigned
    )
    return [product.of_quantized(b, in_bytes(b, b.floats(q), zero_point, scale, scheme))]


def _embedding(b, given, unsigned):
    indices = given["indices"]
    q = b("Cast", b("Gather", given["rows"], indices), to=int(FLOAT))
    if given["bits"] == 4:
        high = b("Floor", b("Mul", q, b.constant(1 / 16)))
        low = b("Sub", q, b("Mul", high, b.constant(16)))
        last = b.constant([-1], np.int64)
        pairs = b("Concat", *(b("Unsqueeze", one, last) for one in (low, high)), axis=-1)
        flat = b("Reshape", pairs, b.constant([0] * len(indices.shape) + [-1], np.int64))
        first, dim = b.constant([0], np.int64), b.constant([given["dim"]], np.int64)
        q = b("Slice", flat, first, dim, last)
    qparams = b("Gather", given["qparams"], indices)
    scale, offset = b("Split", qparams, axis=-1, num_outputs=2, outputs=2)
    return [b("Add", b("Mul", q, scale), offset)]


def _recurrence(cell):
    return lambda b, given, unsigned: recurrence(b, cell, given, unsigned)


_LOWERINGS = {
    "linear_dynamic": _linear_dynamic,
    "conv1d_dynamic": _conv1d_dynamic,
    "linear_half": _linear_half,
    "quantize_activation": _quantize_activation,
    "quantize_with": _quantize_with,
    "scaled_mm": _scaled_mm,
    "embedding": _embedding,
    **{
        f"{cell}_{form}": _recurrence(cell)
        for cell in ("lstm", "gru", "rnn")
        for form in ("dynamic", "half", "mixed")
    },
}
