"""Functions of other libraries, in Python, that find something else under some of their names."""

from functools import update_wrapper
from types import CellType, FunctionType


def with_names(function, names):
    """A copy of the function that finds global names in the dict `names`."""
    return _copied(function, names, function.__closure__)


def with_others(function, others):
    """A copy of a function, decorated or not, that finds what `others` has under its names.

    Returns:
        None where a decorator does not keep what it calls in its closure.
    """
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return with_names(function, {**function.__globals__, **others})
    replaced = with_others(inner, others)
    cells = getattr(function, "__closure__", None) or ()
    if replaced is None or not any(_holds(cell, inner) for cell in cells):
        return None
    cells = tuple(CellType(replaced) if _holds(cell, inner) else cell for cell in cells)
    return update_wrapper(_copied(function, function.__globals__, cells), replaced)


def _holds(cell, value):
    try:
        return cell.cell_contents is value
    except ValueError:  # nothing yet
        return False


def _copied(function, names, closure):
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
