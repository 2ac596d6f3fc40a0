"""The recurrent layers' part of the numeric specification in numpy, bit for bit.

One step of one row, everything in fp32, each operation rounded on its own:

    input  = linear(x_t, weight_ih, bias_ih)
    hidden = linear(h, weight_hh, bias_hh)
    lstm:  i, f, o = sigmoid(input + hidden), g = tanh(input + hidden)
           c = f * c + i * g,  h = o * tanh(c),  with a projection h = linear(h, weight_hr)
    gru:   r, z = sigmoid(input + hidden), n = tanh(input_n + r * hidden_n),  h = (h - n) * z + n
    rnn:   h = tanh(input + hidden) or relu(input + hidden)

where linear is linear_dynamic for an int8 weight and linear_half for one in 16 bits or fp32. States
enter widened to fp32, stay fp32 within the call, and are rounded to x's dtype where they come out.
sigmoid and tanh are these very operations, not the real functions.
"""

import numpy as np
import reference as ref
from reference import F, ignoring_overflow

POLYNOMIAL = [F(c) for c in (1.3946553e-3, 8.366644e-3, 4.166628e-2, 1.6666542e-1, 0.5)]


def _split_exp(y):
    """exp(y) = scale * (1 + p) for y in [-88, 0]; exp(-88) is 0."""
    n = np.rint(y * F(1.44269504))
    r = (y - n * F(0.693359375)) - n * F(-2.12194440e-4)
    total = POLYNOMIAL[0]
    for coefficient in POLYNOMIAL[1:]:
        total = total * r + coefficient
    p = total * (r * r) + r
    exponent = np.nan_to_num(n).astype(np.int32)
    scale = np.where(exponent <= -127, F(0), np.ldexp(F(1), exponent).astype(F))
    return scale, p


@ignoring_overflow
def sigmoid(x):
    scale, p = _split_exp(np.maximum(F(-88), -np.abs(x)))
    z = scale + scale * p
    return np.where(np.signbit(x), z, F(1)) / (F(1) + z)


@ignoring_overflow
def tanh(x):
    limited = np.maximum(F(-10), -np.abs(x))
    scale, p = _split_exp(limited + limited)
    t = scale * p + (scale - F(1))
    return np.copysign(t / (F(2) + t), x)


def relu(x):
    return np.where(x < 0, F(0), x)


@ignoring_overflow
def gates(cell, given, hidden, h, c):
    """The states (h before a projection, c) after one step, from both products [B, gates * H]."""
    if cell == "lstm":
        i, f, g, o = np.split(given + hidden, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(c), c
    if cell == "gru":
        given, hidden = np.split(given, 3, axis=-1), np.split(hidden, 3, axis=-1)
        r, z = (sigmoid(given[k] + hidden[k]) for k in (0, 1))
        n = tanh(given[2] + r * hidden[2])
        return (h - n) * z + n, c
    return (relu if cell == "rnn_relu" else tanh)(given + hidden), c


def recurrent(
    cell,
    x,
    h,
    c,
    weight_ih,
    bias_ih,
    weight_hh,
    bias_hh,
    weight_hr=None,
    batch_sizes=None,
    reverse=False,
    per_token=True,
    symmetric=False,
    bits=8,
    dtype="float32",
    schemes=None,
):
    """One direction of one layer.

    x is [T, B, K], or [rows, K] where batch_sizes tells the rows of each step; h is [B, P] and c
    [B, H] or None. A weight is a pair of int8 [N, K] and its scale, or the values [N, K] of its 16
    bits or fp32. `schemes` has (per_token, symmetric, bits) for "ih", "hh" and "hr" where they are
    not the same. Returns y, h and c.
    """
    lead = x.shape[:-1]
    sizes = [lead[1]] * lead[0] if batch_sizes is None else list(batch_sizes)
    starts = np.cumsum([0, *sizes])

    def linear(x, weight, bias, part):
        if isinstance(weight, tuple):
            scheme = (per_token, symmetric, bits) if schemes is None else schemes[part]
            return ref.linear_dynamic(x, *weight, bias, *scheme[:2], bits=scheme[2])
        return ref.linear_half(x, weight, bias)

    given = linear(x.reshape(starts[-1], x.shape[-1]), weight_ih, bias_ih, "ih")
    h, c = h.copy(), None if c is None else c.copy()
    y = np.zeros((starts[-1], h.shape[-1]), F)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        rows, here = slice(0, sizes[t]), slice(starts[t], starts[t + 1])
        hidden = linear(h[rows], weight_hh, bias_hh, "hh")
        state, cell_state = gates(
            cell, given[here], hidden, h[rows], None if c is None else c[rows]
        )
        if weight_hr is not None:
            state = linear(state, weight_hr, None, "hr")
        h[rows] = y[here] = state
        if c is not None:
            c[rows] = cell_state
    y = ref.round_to(y, dtype).reshape(*lead, h.shape[-1])
    return y, ref.round_to(h, dtype), None if c is None else ref.round_to(c, dtype)
