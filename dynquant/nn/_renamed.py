"""Functions of other libraries, in Python, that find something else under some of their names."""

from functools import WRAPPER_ASSIGNMENTS, WRAPPER_UPDATES
from types import CellType, FunctionType


def with_names(function, names):
    """A copy of the function that finds global names in the dict `names`."""
    return _copied(function, names, function.__closure__)


def with_others(function, other):
    """A copy of a function, decorated or not, that finds other(name, value) for its global names.

    It looks them up at each call, as the function itself does: what its file has then.

    Returns:
        None where a decorator does not keep what it calls in its closure.
    """
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return with_names(function, _Others(function, other))
    replaced = with_others(inner, other)
    cells = getattr(function, "__closure__", None) or ()
    if replaced is None or not any(_holds(cell, inner) for cell in cells):
        return None
    cells = tuple(CellType(replaced) if _holds(cell, inner) else cell for cell in cells)
    copy = _copied(function, function.__globals__, cells)
    copy.__wrapped__ = replaced
    return copy


class _Others(dict):
    """Global names of a function: those of its file, or what is in their place."""

    def __init__(self, function, other):
        super().__init__(__builtins__=function.__builtins__)  # the interpreter reads it itself
        self.names, self.other = function.__globals__, other

    def __missing__(self, name):
        return self.other(name, self.names[name])


def _holds(cell, value):
    try:
        return cell.cell_contents is value
    except ValueError:  # nothing yet
        return False


def _copied(function, names, closure):
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    for name in WRAPPER_ASSIGNMENTS:
        setattr(copy, name, getattr(function, name))
    for name in WRAPPER_UPDATES:
        getattr(copy, name).update(getattr(function, name))
    return copy
