"""The recurrent ops, with int8 weights and with 16-bit ones: what tracing and users read of them.

The schemas and the implementations are in csrc/ops, the gradients in recurrent_gradients.py.
"""

import torch

from dynquant import _C
from dynquant.ops.library import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    LIBRARY,
    OPS,
    check_bias,
    check_bits,
    check_columns,
    check_device,
    check_dtype,
    register_with_inference,
)
from dynquant.ops.recurrent_gradients import GATES, register_gradient


def _check_state(name, state, x, batch):
    check_dtype(name, state, x.dtype)
    torch._check(
        state.dim() == 2 and state.shape[0] == batch,
        lambda: f"{name} must have the shape [{batch}, size], got {list(state.shape)}",
    )


def _check_packed(name, packed, n, k):
    check_dtype(name, packed, torch.int8)
    torch._check(packed.dim() == 1, lambda: f"{name} must have one dimension")
    size = packed.shape[0]
    if isinstance(size, int) and isinstance(n, int) and isinstance(k, int):
        torch._check(
            size == _C.packed_bytes(n, k),
            lambda: f"{name} must be a packed weight of shape [{n}, {k}]",
        )


def _check_float_weight(part, weight, n, k, dtypes):
    check_dtype(f"weight_{part}", weight, *dtypes)
    torch._check(
        weight.dim() == 2 and weight.shape[0] == n and weight.shape[1] == k,
        lambda: f"weight_{part} must have the shape [{n}, {k}], got {list(weight.shape)}",
    )


def _check_product(given, part, n, k):
    """What holds the weight [n, k] and the bias of the product `part`: ih, hh or hr."""
    bias, scale = given.get(f"bias_{part}"), given.get(f"weight_scale_{part}")
    if scale is not None:
        name = f"packed_{part}" if f"packed_{part}" in given else f"weight_{part}"
        _check_packed(name, given[name], n, k)
        check_dtype(f"weight_scale_{part}", scale, torch.float32)
        check_columns(n, scale, bias, f"_{part}")
    else:
        mixed = f"weight_scale_{part}" in given
        dtypes = FLOAT_DTYPES if mixed else HALF_DTYPES
        _check_float_weight(part, given[f"weight_{part}"], n, k, dtypes)
        check_bias(n, bias, f"_{part}")


def _has_projection(given):
    if "weight_hr" in given:
        torch._check(
            given["weight_hr"] is not None or given.get("weight_scale_hr") is None,
            lambda: "weight_scale_hr must be None where weight_hr is None",
        )
        return given["weight_hr"] is not None
    held = {given.get(f"{name}_hr") is not None for name in ("packed", "weight_scale")}
    torch._check(
        len(held) == 1, lambda: "packed_hr and weight_scale_hr must both be given or neither"
    )
    return held.pop()


def _fake_layer(cell, given):
    """The outputs of one direction. given: the arguments of the op by name."""
    x, batch_sizes = given["x"], given["batch_sizes"]
    states = {name: given[name] for name in ("h0", "c0") if name in given}
    projection = _has_projection(given)
    for name in given:
        if name.startswith("activation_bits"):
            symmetric = given[name.replace("activation_bits", "symmetric")]
            check_bits(name, given[name], symmetric)
    tensors = {name: one for name, one in given.items() if isinstance(one, torch.Tensor)}
    tensors.pop("batch_sizes", None)  # on the CPU whatever the device
    check_device(**tensors)
    check_dtype("x", x, *FLOAT_DTYPES)
    dims = 3 if batch_sizes is None else 2
    torch._check(x.dim() == dims, lambda: f"x must have {dims} dimensions, got {list(x.shape)}")
    if batch_sizes is not None:
        check_dtype("batch_sizes", batch_sizes, torch.int64)
    h0, size = states["h0"], list(states.values())[-1].shape[-1]
    for name, state in states.items():
        _check_state(name, state, x, x.shape[1] if batch_sizes is None else h0.shape[0])
    columns = GATES[cell] * size
    _check_product(given, "ih", columns, x.shape[-1])
    _check_product(given, "hh", columns, h0.shape[-1])
    if projection:
        _check_product(given, "hr", h0.shape[-1], size)
    y = x.new_empty((*x.shape[:-1], h0.shape[-1]))
    return (y, *(x.new_empty(state.shape) for state in states.values()))


def _register(name, doc):
    cell = name.partition("_")[0]
    schema = getattr(OPS, name).default._schema
    defaults = {argument.name: argument.default_value for argument in schema.arguments}

    def fake(*arguments, **named):
        return _fake_layer(
            cell, {**defaults, **dict(zip(defaults, arguments, strict=False)), **named}
        )

    fake.__doc__ = doc
    cast = sum(name in defaults for name in ("x", "h0", "c0"))
    register_with_inference(name, fake, cast)
    register_gradient(name, cell, list(defaults), LIBRARY)


_register(
    "lstm_dynamic",
    """One direction of one LSTM layer over a whole sequence, with int8 weights.

    At each step, with `product` as in linear_dynamic: gates i, f, g, o = product(x_t, ih) +
    product(h, hh); c = sigmoid(f) * c + sigmoid(i) * tanh(g); h = sigmoid(o) * tanh(c), and with a
    projection h = product(h, hr). Everything is fp32 within the call, each operation rounded on its
    own. sigmoid and tanh are within 1.5e-7 of the real functions, the same bits on every CPU.

    Under autocast x, h0 and c0 are cast. They have gradients: those of a float layer with the
    dequantized weights. The overload `inference` is the same without gradients, and cheaper to
    call.

    Args:
        x: fp32, bf16 or fp16 [T, B, K], any strides; or [rows, K], with batch_sizes.
        h0, c0: the states before the first step, of x's dtype, [B, P] and [B, H]; P is H without a
            projection.
        packed_ih, weight_scale_ih, bias_ih: as in linear_dynamic, of [4 * H, K].
        packed_hh, weight_scale_hh, bias_hh: of [4 * H, P].
        packed_hr, weight_scale_hr: the projection, of [P, H]; or None.
        batch_sizes: int64 [T], the rows of each step, not increasing, as a PackedSequence has them.
        reverse: from the last step to the first.
        per_token, symmetric, activation_bits: as in choose_qparams (there `bits`), for x and h;
            per_tensor spans all of x, and the h of one step.

    Returns:
        h of each step, [T, B, P] or [rows, P]; h [B, P] and c [B, H] after the last one.

    Raises:
        RuntimeError: another dtype, device or shape; a sequence of length 0.
    """,
)
_register(
    "gru_dynamic",
    """One direction of one GRU layer over a whole sequence, with int8 weights.

    At each step r, z = sigmoid(product(x_t, ih) + product(h, hh)), n = tanh(product(x_t, ih) + r *
    product(h, hh)), h = (h - n) * z + n. Otherwise as lstm_dynamic, with weights of [3 * H, K] and
    [3 * H, H].

    Returns:
        h of each step, [T, B, H] or [rows, H]; h [B, H] after the last one.

    Raises:
        RuntimeError: as lstm_dynamic.
    """,
)
_register(
    "rnn_dynamic",
    """One direction of one plain recurrent layer over a whole sequence, with int8 weights.

    At each step h = tanh(product(x_t, ih) + product(h, hh)), or relu of it. Otherwise as
    lstm_dynamic, with weights of [H, K] and [H, H].

    Returns:
        h of each step, [T, B, H] or [rows, H]; h [B, H] after the last one.

    Raises:
        RuntimeError: as lstm_dynamic.
    """,
)
_register(
    "lstm_half",
    """One direction of one LSTM layer over a whole sequence, with 16-bit weights.

    As lstm_dynamic, with `product` as in linear_half: nothing is quantized.

    Args:
        x, h0, c0, batch_sizes, reverse: as for lstm_dynamic.
        weight_ih, bias_ih: bf16 or fp16 [4 * H, K]; fp32, bf16 or fp16 [4 * H], or None.
        weight_hh, bias_hh: likewise, of [4 * H, P].
        weight_hr: the projection, bf16 or fp16 [P, H]; or None.

    Returns:
        as lstm_dynamic.

    Raises:
        RuntimeError: another dtype, device or shape; a sequence of length 0.
    """,
)
_register(
    "gru_half",
    """One direction of one GRU layer over a whole sequence, with 16-bit weights.

    As gru_dynamic, with `product` as in linear_half, weights of [3 * H, K] and [3 * H, H], and the
    other arguments of lstm_half.

    Returns:
        as gru_dynamic.

    Raises:
        RuntimeError: as lstm_half.
    """,
)
_register(
    "rnn_half",
    """One direction of one plain recurrent layer over a whole sequence, with 16-bit weights.

    As rnn_dynamic, with `product` as in linear_half, weights of [H, K] and [H, H], and the other
    arguments of lstm_half.

    Returns:
        as rnn_dynamic.

    Raises:
        RuntimeError: as lstm_half.
    """,
)
_register(
    "lstm_mixed",
    """One direction of one LSTM layer, each product with a weight of its own kind.

    As lstm_dynamic, with `product` as in linear_dynamic where there is a weight_scale. Otherwise it
    is as in linear_half, with a weight in fp32 as well, and nothing is quantized.

    Args:
        x, h0, c0, batch_sizes, reverse: as for lstm_dynamic.
        weight_ih, weight_scale_ih, bias_ih: a packed weight of [4 * H, K] and its scale; or fp32,
            bf16 or fp16 [4 * H, K] and None; fp32, bf16 or fp16 [4 * H], or None.
        weight_hh, weight_scale_hh, bias_hh: likewise, of [4 * H, P].
        weight_hr, weight_scale_hr: the projection, likewise of [P, H]; or None.
        per_token_ih, symmetric_ih, activation_bits_ih: as in linear_dynamic, for x; where weight_ih
            is float they say nothing.
        per_token_hh, symmetric_hh, activation_bits_hh: for h.
        per_token_hr, symmetric_hr, activation_bits_hr: for what is projected.

    Returns:
        as lstm_dynamic.

    Raises:
        RuntimeError: as lstm_dynamic.
    """,
)
_register(
    "gru_mixed",
    """One direction of one GRU layer, each product with a weight of its own kind.

    As gru_dynamic, with `product`, weights and their arguments as in lstm_mixed, of [3 * H, K] and
    [3 * H, H].

    Returns:
        as gru_dynamic.

    Raises:
        RuntimeError: as lstm_dynamic.
    """,
)
_register(
    "rnn_mixed",
    """One direction of one plain recurrent layer, each product with a weight of its kind.

    As rnn_dynamic, with `product`, weights and their arguments as in lstm_mixed, of [H, K] and
    [H, H].

    Returns:
        as rnn_dynamic.

    Raises:
        RuntimeError: as lstm_dynamic.
    """,
)
