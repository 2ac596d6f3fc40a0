"""What mixes tokens without attention: linear attention, state spaces, short convolutions.

The schemas and the implementations are in csrc/ops. What tracing and users read.
"""

import torch

from dynquant.ops.blocks import check_activation
from dynquant.ops.heads import check_heads
from dynquant.ops.library import (
    FLOAT_DTYPES,
    LIBRARY,
    OPS,
    check_bias,
    check_device,
    check_dtype,
    fake,
)


def _check_shape(name, x, shape, *dtypes):
    check_dtype(name, x, *(dtypes or FLOAT_DTYPES))
    torch._check(
        x.shape == shape,
        lambda: f"{name} must have the shape {list(shape)}, got {list(x.shape)}",
    )


def _check_written(state):
    check_dtype("state", state, torch.float32)
    torch._check(
        state.is_contiguous(),
        lambda: f"state must be contiguous, since it is written to, got {list(state.shape)}",
    )


def _register_write(name, position):
    """Lets autograd see that an op writes to its argument `state`, as those of torch do."""
    op = getattr(OPS, name).default

    def written(keys, *arguments, **options):
        state = arguments[position] if len(arguments) > position else options["state"]
        torch._check(
            not (torch.is_grad_enabled() and state.requires_grad),
            lambda: "state must not want a gradient, since it is written to",
        )
        result = op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments, **options)
        torch.autograd.graph.increment_version(state)
        return result

    LIBRARY.impl(name, written, "ADInplaceOrView", with_keyset=True)


_register_write("gated_delta_rule_", 5)
_register_write("selective_scan_", 6)


def _rule_shapes(query, key, value, decay, beta, state, scale):
    """Those of what comes out and of the state, and the checks of both ops."""
    check_device(query=query, key=key, value=value, decay=decay, beta=beta, state=state)
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_dtype(name, x, *FLOAT_DTYPES)
        check_heads(name, x)
    _check_shape("key", key, query.shape, query.dtype)
    check_dtype("value", value, query.dtype)
    batch, rows, heads, dim = key.shape
    torch._check(
        value.shape[:2] == key.shape[:2],
        lambda: f"value must have the shape [{batch}, {rows}, HV, DV], got {list(value.shape)}",
    )
    torch._check(
        heads > 0 and value.shape[2] % heads == 0,
        lambda: (
            "the heads of value must be a multiple of those of key, "
            f"got {value.shape[2]} and {heads}"
        ),
    )
    torch._check(dim > 0, lambda: f"key must have D > 0, got {list(key.shape)}")
    for name, x in (("decay", decay), ("beta", beta)):
        _check_shape(name, x, value.shape[:3])
    shape = batch, value.shape[2], dim, value.shape[3]
    if state is not None:
        _check_shape("state, as value and key have it,", state, shape, torch.float32)
    torch._check(
        scale is None or abs(scale) <= torch.finfo(torch.float32).max,
        lambda: f"scale must be finite in fp32, got {scale}",
    )
    return value.shape, shape


@fake("gated_delta_rule")
def _(query, key, value, decay, beta, state=None, scale=None, normalize=False):
    """Linear attention by the gated delta rule (https://arxiv.org/abs/2412.06464), in fp32.

    Each head of `value` has a state S [DK, DV]. For each token

        S = exp(decay) * S
        S = S + key' (beta * (value - key S))
        out = scale * query S

    so that a key's value is learnt as far as the state does not give it yet. docs/numerics.md has
    every rounding; the bits are the same on every instruction set, and for tokens one by one and
    together. exp is Inf from 88 on. No gradients.

    Args:
        query, key: fp32, bf16 or fp16 [B, L, HK, DK], any strides.
        value: of the same dtype [B, L, HV, DV]; each head of query and key is that of HV / HK
            neighbouring ones of value.
        decay: fp32, bf16 or fp16 [B, L, HV], the logarithm of what is kept of the state.
        beta: fp32, bf16 or fp16 [B, L, HV].
        state: fp32 [B, HV, DK, DV], what comes before; None for zeros.
        scale: finite in fp32; None for 1 / sqrt(DK).
        normalize: divides each vector of query and key by sqrt(its sum of squares + 1e-6).

    Returns:
        out [B, L, HV, DV] in value's dtype, and the state behind the tokens.

    Raises:
        RuntimeError: another dtype, device or shape; a scale that is not finite in fp32.
    """
    of_out, of_state = _rule_shapes(query, key, value, decay, beta, state, scale)
    return value.new_empty(of_out), value.new_empty(of_state, dtype=torch.float32)


@fake("gated_delta_rule_")
def _(query, key, value, decay, beta, state, scale=None, normalize=False):
    """gated_delta_rule that writes the state behind the tokens to `state`, for the same bits.

    Args:
        state: as there, contiguous; it shares no memory with the others, which are as there.

    Returns:
        out [B, L, HV, DV] in value's dtype.

    Raises:
        RuntimeError: as there; a state that is not contiguous, or that wants a gradient.
    """
    _check_written(state)
    of_out, _ = _rule_shapes(query, key, value, decay, beta, state, scale)
    return value.new_empty(of_out)


def _scan_shapes(x, dt, A, B, C, D, state):
    """Those of what comes out and of the state, and the checks of both ops."""
    check_device(x=x, dt=dt, A=A, B=B, C=C, D=D, state=state)
    for name, one in (("x", x), ("B", B), ("C", C)):
        check_dtype(name, one, *FLOAT_DTYPES)
        check_heads(name, one, "rows, heads" if name == "x" else "rows, groups")
    _check_shape("C", C, B.shape, B.dtype)
    batch, rows, heads, size = x.shape
    groups, n = B.shape[2:]
    torch._check(
        B.shape[:2] == x.shape[:2],
        lambda: f"B must have the shape [{batch}, {rows}, G, N], got {list(B.shape)}",
    )
    torch._check(
        groups > 0 and heads % groups == 0,
        lambda: f"the heads of x must be a multiple of the groups of B, got {heads} and {groups}",
    )
    torch._check(n > 0, lambda: f"B must have N > 0, got {list(B.shape)}")
    torch._check(size > 0, lambda: f"x must have P > 0, got {list(x.shape)}")
    _check_shape("dt", dt, x.shape[:3])
    check_dtype("A", A, *FLOAT_DTYPES)
    torch._check(
        A.shape in ((heads,), (heads, n)),
        lambda: f"A must have the shape [{heads}] or [{heads}, {n}], got {list(A.shape)}",
    )
    if D is not None:
        _check_shape("D", D, (heads,))
    shape = batch, heads, size, n
    if state is not None:
        _check_shape("state, as x and B have it,", state, shape, torch.float32)
    return x.shape, shape


@fake("selective_scan")
def _(x, dt, A, B, C, D=None, state=None):
    """The recurrence of Mamba (https://arxiv.org/abs/2312.00752) and Mamba 2 (2405.21060), in fp32.

    Each head has a state S [P, N]. For each token

        S = exp(dt * A) * S + (dt * x)' B
        out = S C + D * x

    docs/numerics.md has every rounding; the bits are the same on every instruction set, and for
    tokens one by one and together. exp is Inf from 88 on. No gradients. Mamba's channels are heads
    with P = 1, and have rates for each of their states; a head of Mamba 2 has a single one.

    Args:
        x: fp32, bf16 or fp16 [B, L, H, P], any strides.
        dt: fp32, bf16 or fp16 [B, L, H], the steps, with their bias and after softplus.
        A: fp32, bf16 or fp16 [H] or [H, N], the rates, which are negative in these models.
        B, C: of one dtype, fp32, bf16 or fp16 [B, L, G, N], any strides; each of G groups is that
            of H / G neighbouring heads.
        D: fp32, bf16 or fp16 [H], or None.
        state: fp32 [B, H, P, N], what comes before; None for zeros.

    Returns:
        out [B, L, H, P] in x's dtype, and the state behind the tokens.

    Raises:
        RuntimeError: another dtype, device or shape.
    """
    of_out, of_state = _scan_shapes(x, dt, A, B, C, D, state)
    return x.new_empty(of_out), x.new_empty(of_state, dtype=torch.float32)


@fake("selective_scan_")
def _(x, dt, A, B, C, D, state):
    """selective_scan that writes the state behind the tokens to `state`, for the same bits.

    Args:
        state: as there, contiguous; it shares no memory with the others, which are as there.

    Returns:
        out [B, L, H, P] in x's dtype.

    Raises:
        RuntimeError: as there; a state that is not contiguous, or that wants a gradient.
    """
    _check_written(state)
    of_out, _ = _scan_shapes(x, dt, A, B, C, D, state)
    return x.new_empty(of_out)


@fake("causal_conv1d")
def _(x, weight, bias=None, state=None, activation=0):
    """Each channel's convolution with itself, of a position and those before it, in fp32.

    Sums begin at the bias, or 0, and take in one tap after the other by fused multiply-adds; they
    are rounded to x's dtype, and the activation of that once more, as by the op `activation`.

    Args:
        x: fp32, bf16 or fp16 [B, L, C], any strides: positions before channels.
        weight: fp32, bf16 or fp16 [C, K]; its last tap is that of the position itself.
        bias: fp32, bf16 or fp16 [C], or None.
        state: of x's dtype [B, C, S] with S >= K - 1, what comes before x; None for zeros.
        activation: a number as in the op `activation`.

    Returns:
        A tensor of x's shape and dtype, and the last S positions of the state and x [B, C, S]
        (S = 0 without a state); both contiguous.

    Raises:
        RuntimeError: another dtype, device, shape or activation.
    """
    check_device(x=x, weight=weight, bias=bias, state=state)
    check_dtype("x", x, *FLOAT_DTYPES)
    torch._check(
        x.dim() == 3, lambda: f"x must have three dimensions [B, L, C], got {list(x.shape)}"
    )
    batch, _, channels = x.shape
    check_dtype("weight", weight, *FLOAT_DTYPES)
    torch._check(
        weight.dim() == 2 and weight.shape[0] == channels and weight.shape[1] > 0,
        lambda: f"weight must have the shape [{channels}, K], got {list(weight.shape)}",
    )
    check_bias(channels, bias)
    if state is not None:
        least = weight.shape[1] - 1
        check_dtype("state", state, x.dtype)
        torch._check(
            state.dim() == 3 and state.shape[:2] == (batch, channels) and state.shape[2] >= least,
            lambda: (
                f"state must have the shape [{batch}, {channels}, S] with S >= {least}, "
                f"got {list(state.shape)}"
            ),
        )
    check_activation("activation", activation)
    kept = 0 if state is None else state.shape[2]
    return x.new_empty(x.shape), x.new_empty(batch, channels, kept)
