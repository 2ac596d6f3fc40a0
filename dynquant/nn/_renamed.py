"""Functions of other libraries, in Python, that find something else under some of their names."""

from types import FunctionType


def with_names(function, names):
    """A copy of the function that finds global names in the dict `names`."""
    parts = function.__name__, function.__defaults__, function.__closure__
    copy = FunctionType(function.__code__, names, *parts)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
