"""Activations that a block calls by a name of its own file: gelu(x), F.silu(x)."""

from functools import lru_cache, partial
from types import FunctionType

from dynquant.fused import calls
from dynquant.fused.adapters import MARK
from dynquant.fused.classes import base_of
from dynquant.fused.functions import runs_as_op
from dynquant.nn._renamed import with_names


def function_of(module, name):
    """What the file of a module's forward has under a name like ":F.silu"; None where neither it
    nor a module inside it calls that by its name.
    """
    callers = (one for one in module.modules() if _calls(type(one), name))
    caller = next(callers, None)
    if caller is None:
        return None
    first, *rest = _steps(name)
    found = base_of(type(caller)).forward.__globals__[first]
    for step in rest:
        found = getattr(found, step, None)
    return found


def _steps(name):
    return name.removeprefix(MARK).split(".")


def _calls(module_type, name):
    """Whether the forward of a class finds the name in its file."""
    forward, first = base_of(module_type).forward, _steps(name)[0]
    is_plain = isinstance(forward, FunctionType)
    return is_plain and first in forward.__code__.co_names and first in forward.__globals__


def arguments_given(module, name, kwargs):
    """The arguments of each call of the function of that name in a call of the module's forward."""
    given = []

    def seen(function, *args, **named):
        given.append((args, named))
        return function(*args, **named)

    kind = base_of(type(module))
    if _calls(kind, name):
        _with_function(kind.forward, name, seen)(module, **kwargs)
    return given


def forward_of(kind, name, activation):
    """The forward of a class, in which the function of that name runs as the op `activation`.

    So a block that does not run fused has the bits that it has fused. Its own forward where it does
    not call the function itself.
    """
    return _forward_of(kind.forward, name, activation) if _calls(kind, name) else kind.forward


@lru_cache(maxsize=256)
def _forward_of(forward, name, activation):
    return _with_function(forward, name, partial(activated, activation))


def _with_function(forward, name, instead):
    """forward, where a call of the function of that name is one of instead(function, ...)."""
    first, *rest = _steps(name)
    names = forward.__globals__.copy()
    names[first] = _replaced(names[first], rest, instead)
    return with_names(forward, names)


def _replaced(found, steps, instead):
    if not steps:
        return partial(instead, found)
    return _Namespace(found, steps[0], _replaced(getattr(found, steps[0]), steps[1:], instead))


class _Namespace:
    """A module of Python with something else under one of its names."""

    def __init__(self, module, name, value):
        self.__dict__.update({name: value, "_module": module})

    def __getattr__(self, name):
        return getattr(self._module, name)


def activated(name, function, x, *args, **kwargs):
    is_plain = not args and not kwargs and runs_as_op(x)
    return calls.activation(name, x) if is_plain else function(x, *args, **kwargs)
