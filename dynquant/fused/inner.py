"""Activations that a block calls by a name of its own file: gelu(x), F.silu(x)."""

import sys
from functools import cache, partial
from types import FunctionType, SimpleNamespace

from dynquant.fused import calls
from dynquant.fused.classes import base_of
from dynquant.fused.functions import runs_as_op
from dynquant.nn._renamed import with_names

MARK = ":"  # what such names begin with


def function_of(module, name):
    """What the file of the module's class has under a name like ":F.silu", or None."""
    found = sys.modules.get(base_of(type(module)).__module__)
    for step in name.removeprefix(MARK).split("."):
        found = getattr(found, step, None)
    return found


@cache
def forward_of(kind, name, activation):
    """The forward of a class, in which the function of that name runs as the op `activation`.

    So a block that does not run fused has the bits that it has fused. Its own forward where it does
    not call the function itself.
    """
    forward = kind.forward
    first, *rest = name.removeprefix(MARK).split(".")
    if not isinstance(forward, FunctionType) or first not in forward.__code__.co_names:
        return forward
    names = vars(sys.modules[kind.__module__]).copy()
    names[first] = _replaced(names[first], rest, activation)
    return with_names(forward, names)


def _replaced(found, steps, activation):
    """`found`, or what it has under the names `steps`, as the op."""
    if not steps:
        return partial(activated, activation, found)
    inner = _replaced(getattr(found, steps[0]), steps[1:], activation)
    return SimpleNamespace(**{**vars(found), steps[0]: inner})


def activated(name, function, x):
    return calls.activation(name, x) if runs_as_op(x) else function(x)
