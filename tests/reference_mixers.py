"""What mixes tokens without attention: that part of the numeric specification in numpy.

Everything in fp32, each operation rounded on its own, and `fma` once for both of its own.
"""

import numpy as np
import reference as ref
import reference_float
from reference import F, fma, ignoring_overflow


@ignoring_overflow
def factor(x):
    """exp(x), 1 / exp(-x) where x has no minus."""
    below = reference_float.exp(-np.abs(x))
    return np.where(np.signbit(x), below, F(1) / below)


def normalized(x):
    """x [..., D] by its length: an RMS norm with a weight of 1 / sqrt(D)."""
    size = x.shape[-1]
    weight = np.full(size, 1 / np.sqrt(np.float64(size)), F)
    return reference_float.rms_norm(x, weight, F(1e-6 / size))


@ignoring_overflow
def gated_delta_rule(query, key, value, decay, beta, state, scale, dtype="float32"):
    """One head: query and key [L, DK], value [L, DV], decay and beta [L], state [DK, DV].

    Returns:
        out [L, DV] and the state behind the tokens.
    """
    state, out = state.copy(), np.zeros(value.shape, F)
    for t, (q, k, v) in enumerate(zip(query, key, value, strict=True)):
        keep = factor(decay[t])
        read, summed = np.zeros_like(v), np.zeros_like(v)
        for i, one in enumerate(k):
            read = fma(np.full_like(v, one), state[i], read)
        added = beta[t] * (v - keep * read)
        for i, one in enumerate(k):
            state[i] = fma(np.full_like(v, one), added, keep * state[i])
            summed = fma(np.full_like(v, q[i]), state[i], summed)
        out[t] = F(scale) * summed
    return ref.round_to(out, dtype), state


@ignoring_overflow
def selective_scan(x, dt, rate, b, c, skip, state, dtype="float32"):
    """One head: x [L, P], dt [L], rate a number or [N], b and c [L, N], state [P, N].

    Returns:
        out [L, P] and the state behind the tokens.
    """
    state, out = state.copy(), np.zeros(x.shape, F)
    pad = [(0, 0), (0, -state.shape[1] % 16)]
    for t, row in enumerate(x):
        keep = factor(dt[t] * rate)
        added = (dt[t] * row)[:, None]
        spread = np.broadcast_to
        state = fma(spread(added, state.shape), spread(b[t], state.shape), keep * state)
        filled = np.pad(state, pad)
        of_out = spread(np.pad(c[t], pad[1]), filled.shape)
        partial = np.zeros((len(row), 16), F)
        for j in range(0, filled.shape[1], 16):
            partial = fma(of_out[:, j : j + 16], filled[:, j : j + 16], partial)
        for step in (8, 4, 2, 1):
            partial = partial[:, :step] + partial[:, step : 2 * step]
        out[t] = partial[:, 0] + F(0)
        if skip is not None:
            out[t] = fma(np.full_like(row, skip), row, out[t])
    return ref.round_to(out, dtype), state


@ignoring_overflow
def causal_conv1d(x, weight, bias, before, activation="none", dtype="float32"):
    """x [L, C] behind `before` [K - 1, C], weight [C, K] -> [L, C]."""
    taps = weight.shape[1]
    all_rows = np.concatenate([before, x])
    total = np.zeros(x.shape, F) if bias is None else np.broadcast_to(bias, x.shape).astype(F)
    for tap in range(taps):
        spread = np.broadcast_to(weight[:, tap], x.shape)
        total = fma(spread, all_rows[tap : tap + len(x)], total)
    total = ref.round_to(total, dtype)
    return total if activation == "none" else reference_float.activation(total, activation, dtype)
