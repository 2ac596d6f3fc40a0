"""The recurrent ops, with int8 weights and with 16-bit ones: what tracing and training need."""

from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from dynquant import _C
from dynquant.ops import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    _check_bias,
    _check_columns,
    _check_device,
    _check_dtype,
    _library,
    _ops,
    _register_with_inference,
)

GATES = {"lstm": 4, "gru": 3, "rnn": 1}


class _Int8Product(NamedTuple):
    """What holds the weight of a product `part` (ih, hh or hr)."""

    packed: torch.Tensor | None = None
    weight_scale: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def check(self, part, n, k):
        """The weight is of shape [n, k]."""
        _check_dtype(f"packed_{part}", self.packed, torch.int8)
        _check_dtype(f"weight_scale_{part}", self.weight_scale, torch.float32)
        torch._check(self.packed.dim() == 1, lambda: f"packed_{part} must have one dimension")
        size = self.packed.shape[0]
        if isinstance(size, int) and isinstance(n, int) and isinstance(k, int):
            torch._check(
                size == _C.packed_bytes(n, k),
                lambda: f"packed_{part} must be a packed weight of shape [{n}, {k}]",
            )
        _check_columns(n, self.weight_scale, self.bias, f"_{part}")


class _HalfProduct(NamedTuple):
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def check(self, part, n, k):
        name, weight = f"weight_{part}", self.weight
        _check_dtype(name, weight, *HALF_DTYPES)
        torch._check(
            weight.dim() == 2 and weight.shape[0] == n and weight.shape[1] == k,
            lambda: f"{name} must have the shape [{n}, {k}], got {list(weight.shape)}",
        )
        _check_bias(n, self.bias, f"_{part}")


def _check_state(name, state, x, batch):
    _check_dtype(name, state, x.dtype)
    torch._check(
        state.dim() == 2 and state.shape[0] == batch,
        lambda: f"{name} must have the shape [{batch}, size], got {list(state.shape)}",
    )


def _fake_layer(cell, x, states, ih, hh, hr, batch_sizes):
    """The outputs of one direction; `ih`, `hh` and `hr` (or None) are products."""
    products = {"ih": ih, "hh": hh} if hr is None else {"ih": ih, "hh": hh, "hr": hr}
    parts = {
        f"{name}_{part}": tensor
        for part, product in products.items()
        for name, tensor in product._asdict().items()
    }
    _check_device(x=x, **states, **parts)
    _check_dtype("x", x, *FLOAT_DTYPES)
    dims = 3 if batch_sizes is None else 2
    torch._check(x.dim() == dims, lambda: f"x must have {dims} dimensions, got {list(x.shape)}")
    if batch_sizes is not None:
        _check_dtype("batch_sizes", batch_sizes, torch.int64)
    h0, size = states["h0"], list(states.values())[-1].shape[-1]
    for name, state in states.items():
        _check_state(name, state, x, x.shape[1] if batch_sizes is None else h0.shape[0])
    columns = GATES[cell] * size
    ih.check("ih", columns, x.shape[-1])
    hh.check("hh", columns, h0.shape[-1])
    if hr is not None:
        hr.check("hr", h0.shape[-1], size)
    y = x.new_empty((*x.shape[:-1], h0.shape[-1]))
    return (y, *(x.new_empty(state.shape) for state in states.values()))


def _fake_lstm(
    x,
    h0,
    c0,
    packed_ih,
    weight_scale_ih,
    bias_ih,
    packed_hh,
    weight_scale_hh,
    bias_hh,
    packed_hr=None,
    weight_scale_hr=None,
    batch_sizes=None,
    reverse=False,
    per_token=True,
    symmetric=False,
):
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
        per_token, symmetric: as in choose_qparams, for x and h; per_tensor spans all of x, and the
            h of one step.

    Returns:
        h of each step, [T, B, P] or [rows, P]; h [B, P] and c [B, H] after the last one.

    Raises:
        RuntimeError: another dtype, device or shape; a sequence of length 0.
    """
    torch._check(
        (packed_hr is None) == (weight_scale_hr is None),
        lambda: "packed_hr and weight_scale_hr must both be given or neither",
    )
    return _fake_layer(
        "lstm",
        x,
        {"h0": h0, "c0": c0},
        _Int8Product(packed_ih, weight_scale_ih, bias_ih),
        _Int8Product(packed_hh, weight_scale_hh, bias_hh),
        None if packed_hr is None else _Int8Product(packed_hr, weight_scale_hr),
        batch_sizes,
    )


def _fake_gru(
    x,
    h0,
    packed_ih,
    weight_scale_ih,
    bias_ih,
    packed_hh,
    weight_scale_hh,
    bias_hh,
    batch_sizes=None,
    reverse=False,
    per_token=True,
    symmetric=False,
):
    """One direction of one GRU layer over a whole sequence, with int8 weights.

    At each step r, z = sigmoid(product(x_t, ih) + product(h, hh)), n = tanh(product(x_t, ih) + r *
    product(h, hh)), h = (h - n) * z + n. Otherwise as lstm_dynamic, with weights of [3 * H, K] and
    [3 * H, H].

    Returns:
        h of each step, [T, B, H] or [rows, H]; h [B, H] after the last one.

    Raises:
        RuntimeError: as lstm_dynamic.
    """
    return _fake_layer(
        "gru",
        x,
        {"h0": h0},
        _Int8Product(packed_ih, weight_scale_ih, bias_ih),
        _Int8Product(packed_hh, weight_scale_hh, bias_hh),
        None,
        batch_sizes,
    )


def _fake_rnn(
    x,
    h0,
    packed_ih,
    weight_scale_ih,
    bias_ih,
    packed_hh,
    weight_scale_hh,
    bias_hh,
    relu=False,
    batch_sizes=None,
    reverse=False,
    per_token=True,
    symmetric=False,
):
    """One direction of one plain recurrent layer over a whole sequence, with int8 weights.

    At each step h = tanh(product(x_t, ih) + product(h, hh)), or relu of it. Otherwise as
    lstm_dynamic, with weights of [H, K] and [H, H].

    Returns:
        h of each step, [T, B, H] or [rows, H]; h [B, H] after the last one.

    Raises:
        RuntimeError: as lstm_dynamic.
    """
    return _fake_layer(
        "rnn",
        x,
        {"h0": h0},
        _Int8Product(packed_ih, weight_scale_ih, bias_ih),
        _Int8Product(packed_hh, weight_scale_hh, bias_hh),
        None,
        batch_sizes,
    )


def _fake_lstm_half(
    x,
    h0,
    c0,
    weight_ih,
    bias_ih,
    weight_hh,
    bias_hh,
    weight_hr=None,
    batch_sizes=None,
    reverse=False,
):
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
    """
    return _fake_layer(
        "lstm",
        x,
        {"h0": h0, "c0": c0},
        _HalfProduct(weight_ih, bias_ih),
        _HalfProduct(weight_hh, bias_hh),
        None if weight_hr is None else _HalfProduct(weight_hr),
        batch_sizes,
    )


def _fake_gru_half(x, h0, weight_ih, bias_ih, weight_hh, bias_hh, batch_sizes=None, reverse=False):
    """One direction of one GRU layer over a whole sequence, with 16-bit weights.

    As gru_dynamic, with `product` as in linear_half, weights of [3 * H, K] and [3 * H, H], and the
    other arguments of lstm_half.

    Returns:
        as gru_dynamic.

    Raises:
        RuntimeError: as lstm_half.
    """
    return _fake_layer(
        "gru",
        x,
        {"h0": h0},
        _HalfProduct(weight_ih, bias_ih),
        _HalfProduct(weight_hh, bias_hh),
        None,
        batch_sizes,
    )


def _fake_rnn_half(
    x, h0, weight_ih, bias_ih, weight_hh, bias_hh, relu=False, batch_sizes=None, reverse=False
):
    """One direction of one plain recurrent layer over a whole sequence, with 16-bit weights.

    As rnn_dynamic, with `product` as in linear_half, weights of [H, K] and [H, H], and the other
    arguments of lstm_half.

    Returns:
        as rnn_dynamic.

    Raises:
        RuntimeError: as lstm_half.
    """
    return _fake_layer(
        "rnn",
        x,
        {"h0": h0},
        _HalfProduct(weight_ih, bias_ih),
        _HalfProduct(weight_hh, bias_hh),
        None,
        batch_sizes,
    )


def _lstm_step(given, hidden, h, c):
    i, f, g, o = (given + hidden).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(given, hidden, h):
    (r, z, n), (hidden_r, hidden_z, hidden_n) = given.chunk(3, -1), hidden.chunk(3, -1)
    r, z = (r + hidden_r).sigmoid(), (z + hidden_z).sigmoid()
    n = (n + r * hidden_n).tanh()
    return ((h - n) * z + n,)


def _tanh_step(given, hidden, h):
    return ((given + hidden).tanh(),)


def _relu_step(given, hidden, h):
    return ((given + hidden).relu(),)


def _float_layer(step, x, states, ih, hh, hr, batch_sizes, reverse):
    """The float layer, operator by operator, so that autograd can follow it; fp32."""
    given = linear(x, *ih)
    rows = list(given.unbind() if batch_sizes is None else given.split(batch_sizes.tolist()))
    outputs = [None] * len(rows)
    for t in reversed(range(len(rows))) if reverse else range(len(rows)):
        count = len(rows[t])
        running = [state[:count] for state in states]
        new = list(step(rows[t], linear(running[0], *hh), *running))
        if hr is not None:
            new[0] = linear(new[0], hr)
        outputs[t] = new[0]
        states = [torch.cat([one, old[count:]]) for one, old in zip(new, states, strict=True)]
    y = torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)
    return (y, *states)


def _float_weight(saved, part, n, k):
    """The weight [n, k] of the product `part` in fp32; None where there is none."""
    if f"packed_{part}" in saved:
        plain = _ops.unpack_weight(saved[f"packed_{part}"], n, k)
        return plain.to(torch.float32) * saved[f"weight_scale_{part}"][:, None]
    weight = saved.get(f"weight_{part}")
    return None if weight is None else weight.to(torch.float32)


def _save_layer(ctx, inputs, names):
    named = dict(zip(names, inputs, strict=False))
    ctx.names = [name for name, value in named.items() if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*(named[name] for name in ctx.names))
    ctx.relu, ctx.reverse = named.get("relu", False), named.get("reverse", False)
    ctx.arguments = len(inputs)


def _layer_gradient(cell, ctx, *gradients):
    """Those of x and the states: the float layer is run again, with its weights in fp32."""
    saved = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
    state_names = [name for name in ("h0", "c0") if name in saved]
    k, p, size = saved["x"].shape[-1], saved["h0"].shape[-1], saved[state_names[-1]].shape[-1]

    def product(part, n, depth):
        bias = saved.get(f"bias_{part}")
        bias = None if bias is None else bias.detach().to(torch.float32)
        return _float_weight(saved, part, n, depth), bias

    steps = {"lstm": _lstm_step, "gru": _gru_step, "rnn": _relu_step if ctx.relu else _tanh_step}
    columns = GATES[cell] * size
    ih, hh = product("ih", columns, k), product("hh", columns, p)
    hr = _float_weight(saved, "hr", p, size)
    names = ["x", *state_names]
    with torch.enable_grad():
        inputs = [saved[name].detach().to(torch.float32).requires_grad_() for name in names]
        outputs = _float_layer(
            steps[cell], inputs[0], inputs[1:], ih, hh, hr, saved.get("batch_sizes"), ctx.reverse
        )
        given = [(o, g.to(torch.float32)) for o, g in zip(outputs, gradients, strict=True)]
        outputs, gradients = zip(*given, strict=True)
        found = torch.autograd.grad(outputs, inputs, gradients)
    cast = [gradient.to(saved["x"].dtype) for gradient in found]
    return (*cast, *[None] * (ctx.arguments - len(cast)))


def _register(cell, kind, fake, inputs):
    name = f"{cell}_{kind}"
    _register_with_inference(name, fake, inputs)
    names = [argument.name for argument in getattr(_ops, name).default._schema.arguments]
    torch.library.register_autograd(
        f"dynquant::{name}",
        partial(_layer_gradient, cell),
        setup_context=lambda ctx, inputs, output: _save_layer(ctx, inputs, names),
        lib=_library,
    )


_register("lstm", "dynamic", _fake_lstm, inputs=3)
_register("gru", "dynamic", _fake_gru, inputs=2)
_register("rnn", "dynamic", _fake_rnn, inputs=2)
_register("lstm", "half", _fake_lstm_half, inputs=3)
_register("gru", "half", _fake_gru_half, inputs=2)
_register("rnn", "half", _fake_rnn_half, inputs=2)
