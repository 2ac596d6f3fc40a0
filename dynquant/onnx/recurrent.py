"""Recurrent layers: one direction of one layer is one Scan over its steps."""

import onnx_ir as ir

from dynquant.onnx.products import FLOAT, Scheme, product_of


def recurrence(b, cell, given, unsigned):
    """The outputs of an op lstm_*, gru_* or rnn_*: y, and the states after the last step.

    Args:
        cell: "lstm", "gru" or "rnn".
        given: the op's arguments by name.

    Raises:
        ValueError: for a packed sequence.
    """
    if given["batch_sizes"] is not None:
        raise ValueError("packed sequences have no form in ONNX: pad them")
    products = {part: _product(b, part, given, unsigned) for part in ("ih", "hh", "hr")}
    states = [b.floats(given[key]) for key in ("h0", "c0") if key in given]
    x = b.floats(given["x"])
    projected = products["ih"](b, x)
    step, body = _STEPS[cell], b.inner("step")
    before = [_input(f"{body.prefix}.state_{place}", one) for place, one in enumerate(states)]
    row = ir.Value(name=f"{body.prefix}.row", type=ir.TensorType(FLOAT), shape=ir.Shape([None] * 2))
    after = step(body, row, products["hh"](body, before[0]), before, bool(given.get("relu")))
    if products["hr"] is not None:
        after[0] = products["hr"](body, after[0])
    for one in after:
        one.type = ir.TensorType(FLOAT)
    y = body("Identity", after[0])
    y.type = ir.TensorType(FLOAT)
    graph = ir.Graph([*before, row], [*after, y], nodes=body.made, name=body.prefix)
    direction = [int(bool(given["reverse"]))]
    *last, rows = b(
        "Scan",
        *states,
        projected,
        outputs=len(states) + 1,
        body=graph,
        num_scan_inputs=1,
        scan_input_directions=direction,
        scan_output_directions=direction,
    )
    return [rows, *last]


def _input(name, like):
    return ir.Value(name=name, type=ir.TensorType(FLOAT), shape=like.shape)


def _product(b, part, given, unsigned):
    """The product of a weight, or None where the op has none."""
    weight = next(
        (given[key] for key in (f"packed_{part}", f"weight_{part}") if given.get(key) is not None),
        None,
    )
    if weight is None:
        return None
    settings = ("per_token", "symmetric", "activation_bits")
    scheme = Scheme(*(given.get(key, given.get(f"{key}_{part}")) for key in settings))
    scale, bias = given.get(f"weight_scale_{part}"), given.get(f"bias_{part}")
    return product_of(b, weight, scale, bias, scheme, unsigned)


def _lstm(b, row, hidden, before, relu):
    gates = b("Split", b("Add", row, hidden), axis=-1, num_outputs=4, outputs=4)
    i, f, o = (b("Sigmoid", gates[place]) for place in (0, 1, 3))
    c = b("Add", b("Mul", f, before[1]), b("Mul", i, b("Tanh", gates[2])))
    return [b("Mul", o, b("Tanh", c)), c]


def _gru(b, row, hidden, before, relu):
    rows = b("Split", row, axis=-1, num_outputs=3, outputs=3)
    hiddens = b("Split", hidden, axis=-1, num_outputs=3, outputs=3)
    r, z = (b("Sigmoid", b("Add", rows[place], hiddens[place])) for place in (0, 1))
    n = b("Tanh", b("Add", rows[2], b("Mul", r, hiddens[2])))
    return [b("Add", b("Mul", b("Sub", before[0], n), z), n)]


def _rnn(b, row, hidden, before, relu):
    return [b("Relu" if relu else "Tanh", b("Add", row, hidden))]


_STEPS = {"lstm": _lstm, "gru": _gru, "rnn": _rnn}
