"""The functions by which transformers' models mix tokens without attention, as ops.

Each model has them in a file of its own, under the same names: a causal convolution of each
channel, the gated delta rule, the scans of Mamba and of Mamba 2. They are known by these names and
by what they compute on some numbers. What is called in their place takes the function itself first,
and calls it where no op can run: for gradients, under autocast, for arguments that ops do not have.
So do those below, by giving NotImplemented.
"""

import logging
import threading
from contextlib import contextmanager
from functools import partial, wraps

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from dynquant.fused.functions import runs_as_op
from dynquant.ops.blocks import ACTIVATIONS
from dynquant.ops.library import OPS

# The names that transformers has for them.
_ACTIVATIONS = {None: "none", "silu": "silu", "swish": "silu"}
# What tells several sequences in one apart, which the ops do not do.
_PACKED = "cu_seqlens", "seq_idx"


class _Written(threading.local):
    state = None


_WRITTEN = _Written()


@contextmanager
def written_state(state):
    """Within the block, this thread's rule may write what comes after `state`, a tensor or None, to
    it: the caller would copy it there.
    """
    before, _WRITTEN.state = _WRITTEN.state, state
    try:
        yield
    finally:
        _WRITTEN.state = before


def _or_itself(by_ops):
    """by_ops(...) as something to call in the place of a function, which is called with the same
    where that gives NotImplemented.
    """

    @wraps(by_ops)
    def instead(function, *args, **kwargs):
        result = by_ops(*args, **kwargs)
        return function(*args, **kwargs) if result is NotImplemented else result

    return instead


def _are_for_ops(*tensors):
    return all(runs_as_op(one) for one in tensors if one is not None)


def _is_packed(kwargs):
    return any(kwargs.get(name) is not None for name in _PACKED)


@_or_itself
def _convolution(hidden_states, weight, bias=None, activation=None, **kwargs):
    """causal_conv1d_fn: x [B, C, L] behind zeros."""
    known = activation in _ACTIVATIONS and not _is_packed(kwargs)
    if not known or not _are_for_ops(hidden_states, weight, bias):
        return NotImplemented
    return _convolved(hidden_states, weight, bias, None, activation)[0]


@_or_itself
def _convolution_step(hidden_states, conv_state, weight, bias=None, activation=None):
    """causal_conv1d_update: x [B, C, L] behind a state [B, C, S], which becomes that behind x."""
    known = activation in _ACTIVATIONS and conv_state.dtype == hidden_states.dtype
    if not known or not _are_for_ops(hidden_states, conv_state, weight, bias):
        return NotImplemented
    y, state = _convolved(hidden_states, weight, bias, conv_state, activation)
    conv_state.copy_(state)
    return y


def _convolved(x, weight, bias, state, activation):
    number = ACTIVATIONS[_ACTIVATIONS[activation]]
    y, state = OPS.causal_conv1d(x.transpose(1, 2), weight, bias, state, number)
    return y.transpose(1, 2), state


@_or_itself
def _delta_rule(
    query,
    key,
    value,
    g,
    beta,
    initial_state=None,
    output_final_state=False,
    use_qk_l2norm_in_kernel=False,
    **kwargs,
):
    """torch_chunk_gated_delta_rule and torch_recurrent_gated_delta_rule."""
    given = query, key, value, g, beta
    alike = query.dtype == key.dtype == value.dtype
    if not alike or _is_packed(kwargs) or not _are_for_ops(*given, initial_state):
        return NotImplemented
    rest = None, use_qk_l2norm_in_kernel
    is_kept = initial_state is not None and initial_state is _WRITTEN.state
    if is_kept and output_final_state and _can_be_written(initial_state):
        return OPS.gated_delta_rule_(*given, initial_state, *rest), initial_state
    y, state = OPS.gated_delta_rule(*given, _widened(initial_state), *rest)
    return y, state if output_final_state else None


def _can_be_written(state):
    return state.dtype == torch.float32 and state.is_contiguous()


def _widened(x):
    return None if x is None else x.float()


@_or_itself
def _chunk_scan(
    hidden_states,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    dt_bias=None,
    initial_states=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    **kwargs,
):
    """mamba2_chunk_scan: x [B, L, H, P], dt [B, L, H], B and C [B, L, G, N]."""
    given = hidden_states, dt, A, B, C, D, dt_bias, initial_states
    is_gated = kwargs.get("z") is not None  # a function that has it may heed it or not
    if is_gated or _is_packed(kwargs) or not _are_for_ops(*given):
        return NotImplemented
    steps = _steps(dt, dt_bias, dt_softplus).clamp(*dt_limit)
    y, state = OPS.selective_scan(
        hidden_states.float(), steps, A, B, C, D, _widened(initial_states)
    )
    return (y, state) if return_final_states else y


def _steps(dt, bias, softplus):
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


@_or_itself
def _chunk_scan_step(
    state,
    hidden_states,
    dt,
    A,
    B,
    C,
    D=None,
    dt_bias=None,
    dt_softplus=False,
    z=None,
    **kwargs,
):
    """mamba2_selective_state_update: one token; what heads have, expanded to their values."""
    given = state, hidden_states, dt, A, B, C, D, dt_bias, z
    rate = None if A.dim() != 3 or not _is_expanded(A, -1) else A[..., 0]
    expanded = [one for one in (dt, rate, D, dt_bias) if one is not None]
    known = rate is not None and all(_is_expanded(one, -1) for one in expanded)
    if not known or _is_packed(kwargs) or not _are_for_ops(*given):
        return NotImplemented
    dt, rate, D, dt_bias = (None if one is None else one[..., 0] for one in (dt, rate, D, dt_bias))
    steps = _steps(dt, dt_bias, dt_softplus)[:, None]
    arguments = hidden_states[:, None], steps, rate, B[:, None], C[:, None], D
    return _gated(_scan_step(arguments, state, state)[:, 0], z)


def _is_expanded(x, dim):
    return x.shape[dim] == 1 or x.stride(dim) == 0


def _scan_step(arguments, of_op, state):
    """y of selective_scan; the state, in the op's shape `of_op`, becomes that behind it."""
    if _can_be_written(state):
        return OPS.selective_scan_(*arguments, of_op)
    y, after = OPS.selective_scan(*arguments, of_op.float())
    state.copy_(after.view(state.shape))
    return y


@_or_itself
def _scan(
    hidden_states,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
    **kwargs,
):
    """mamba_selective_scan: x, dt and z [B, H, L], A [H, N], B and C [B, N, L]."""
    given = hidden_states, dt, A, B, C, D, z, delta_bias
    if _is_packed(kwargs) or not _are_for_ops(*given):
        return NotImplemented
    steps = _steps(dt.transpose(1, 2), delta_bias, delta_softplus)
    x = hidden_states.float().transpose(1, 2).unsqueeze(-1)
    B, C = (one.transpose(1, 2).unsqueeze(2) for one in (B, C))
    y, state = OPS.selective_scan(x, steps, A, B, C, D, None)
    y = _gated(y.squeeze(-1).transpose(1, 2), z)
    return (y, state.squeeze(2)) if return_last_state else y


def _gated(y, z):
    return y if z is None else y * F.silu(z)


@_or_itself
def _scan_of_token(
    state,
    hidden_states,
    dt,
    A,
    B,
    C,
    D=None,
    dt_bias=None,
    dt_softplus=False,
    z=None,
    **kwargs,
):
    """mamba_selective_state_update: one token, x, dt and z [B, H], state [B, H, N]."""
    given = state, hidden_states, dt, A, B, C, D, dt_bias, z
    if _is_packed(kwargs) or not _are_for_ops(*given):
        return NotImplemented
    steps = _steps(dt, dt_bias, dt_softplus)[:, None]
    x, B, C = hidden_states[:, None, :, None], B[:, None, None], C[:, None, None]
    y = _scan_step((x, steps, A, B, C, D), state.unsqueeze(2), state)
    return _gated(y[:, 0, :, 0], z)


INSTEAD = {
    "causal_conv1d_fn": _convolution,
    "causal_conv1d_update": _convolution_step,
    "torch_chunk_gated_delta_rule": _delta_rule,
    "torch_recurrent_gated_delta_rule": _delta_rule,
    "mamba2_chunk_scan": _chunk_scan,
    "mamba2_selective_state_update": _chunk_scan_step,
    "mamba_selective_scan": _scan,
    "mamba_selective_state_update": _scan_of_token,
}


def _samples():
    """Arguments of each, by position and by name."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def rule(length):
        vectors = [drawn(2, length, heads, 6) for heads in (2, 2, 4)]
        options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
        gates = {"g": -drawn(2, length, 4).abs(), "beta": drawn(2, length, 4).sigmoid()}
        return vectors, gates | options | {"initial_state": drawn(2, 4, 6, 6)}

    heads = {"D": drawn(4), "dt_bias": drawn(4)}
    of_values = {name: one[:, None].expand(4, 5) for name, one in heads.items()}
    softly = {"dt_softplus": True}
    rates, of_channels = -drawn(4).abs(), -drawn(4, 6).abs()
    step = drawn(2, 4, 1).expand(2, 4, 5), rates[:, None, None].expand(4, 5, 6)
    vectors = drawn(2, 9, 2, 6), drawn(2, 9, 2, 6)
    chunks = drawn(2, 9, 4, 5), drawn(2, 9, 4), rates, *vectors, 4
    ends = {"initial_states": drawn(2, 4, 5, 6), "return_final_states": True}
    sequences = drawn(2, 4, 9), drawn(2, 4, 9), of_channels, drawn(2, 6, 9), drawn(2, 6, 9)
    token = drawn(2, 4, 6), drawn(2, 4), drawn(2, 4), of_channels, drawn(2, 6), drawn(2, 6)
    of_scan = {"D": heads["D"], "z": drawn(2, 4, 9), "delta_bias": heads["dt_bias"]}
    return {
        "causal_conv1d_fn": ((drawn(2, 5, 7), drawn(5, 4), drawn(5)), {"activation": "silu"}),
        "causal_conv1d_update": (
            (drawn(2, 5, 1), drawn(2, 5, 4), drawn(5, 4)),
            {"activation": "silu"},
        ),
        "torch_chunk_gated_delta_rule": rule(70),
        "torch_recurrent_gated_delta_rule": rule(1),
        "mamba2_chunk_scan": (chunks, heads | softly | ends),
        "mamba2_selective_state_update": (
            (drawn(2, 4, 5, 6), drawn(2, 4, 5), *step, drawn(2, 2, 6), drawn(2, 2, 6)),
            of_values | softly | {"z": drawn(2, 4, 5)},
        ),
        "mamba_selective_scan": (
            sequences,
            of_scan | {"delta_softplus": True, "return_last_state": True},
        ),
        "mamba_selective_state_update": (token, heads | softly | {"z": drawn(2, 4)}),
    }


def op_for(name, value):
    """What is called in the place of a function that has such a name; other values as they are."""
    return (
        partial(INSTEAD[name], value)
        if name in INSTEAD and computes_the_same(name, value)
        else value
    )


_FOUND = {}  # by name and identity, with the function, which so keeps its identity


def computes_the_same(name, function):
    """Whether a function gives what is called in its place, and changes its arguments alike."""
    key = name, id(function)
    if key not in _FOUND:
        _FOUND[key] = function, callable(function) and _is_alike(name, function)
    return _FOUND[key][1]


def _is_alike(name, function):
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _disable_current_modes():
        given, named = _samples()[name]
        expected = _outcome(partial(INSTEAD[name], None), given, named)
        try:
            with _silent(function):
                found = _outcome(function, given, named)
            return len(found) == len(expected) and all(
                torch.allclose(one, other, rtol=1e-4, atol=1e-4)
                for one, other in zip(found, expected, strict=True)
            )
        except Exception:
            return False  # whatever it is, it is another function


def _outcome(call, given, named):
    """The tensors that a call gives, and its arguments, of which it may change some."""
    # What is expanded is only read, and has to stay a view.
    own = [one.clone() if _can_be_written(one) else one for one in given if _is_tensor(one)]
    left = iter(own)
    result = call(*(next(left) if _is_tensor(one) else one for one in given), **named)
    return [*(result if isinstance(result, tuple) else (result,)), *own]


def _is_tensor(x):
    return isinstance(x, torch.Tensor)


@contextmanager
def _silent(function):
    """Within the block, the file of a function does not log: transformers would say that one in
    torch is slow, and to install another.
    """
    logger = logging.getLogger(getattr(function, "__globals__", {}).get("__name__", __name__))
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
