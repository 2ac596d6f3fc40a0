"""The gradients of the recurrent ops: the float layer is run again, with its weights in fp32."""

from functools import partial

import torch
from torch.nn.functional import linear

from dynquant.ops.library import dequantized

GATES = {"lstm": 4, "gru": 3, "rnn": 1}


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
    weight = saved.get(f"packed_{part}", saved.get(f"weight_{part}"))
    if f"weight_scale_{part}" in saved:
        return dequantized(weight, saved[f"weight_scale_{part}"], n, k)
    return None if weight is None else weight.to(torch.float32)


def _save_layer(ctx, inputs, names):
    named = dict(zip(names, inputs, strict=False))
    ctx.names = [name for name, value in named.items() if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*(named[name] for name in ctx.names))
    ctx.relu, ctx.reverse = named.get("relu", False), named.get("reverse", False)
    ctx.arguments = len(inputs)


def _layer_gradient(cell, ctx, *gradients):
    """Those of x and the states."""
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


def register_gradient(name, cell, names, library):
    """Gives the op `name` its gradient.

    Args:
        cell: lstm, gru or rnn.
        names: those of the op's arguments.
        library: the torch.library.Library that the registration belongs to.
    """
    torch.library.register_autograd(
        f"dynquant::{name}",
        partial(_layer_gradient, cell),
        setup_context=lambda ctx, inputs, output: _save_layer(ctx, inputs, names),
        lib=library,
    )
