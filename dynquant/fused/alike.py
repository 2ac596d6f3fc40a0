"""Whether two classes run the same code: libraries copy blocks from model to model."""

import builtins
import dis
import logging
from functools import cache
from types import CodeType, FunctionType, MethodType

from torch import nn

# What a call of a module runs besides its forward, where its class has them.
_RUN_BY_A_CALL = ("forward", "__call__", "__getattr__", "__getattribute__", "_call_impl")
_MISSING = object()
_OF_ITS_CLASS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")


@cache
def runs_the_same(one: type, other: type) -> bool:
    """Whether calls of instances of either class run the same code, as far as Python shows it.

    Equal are the instructions of forward, of the methods of the class that it names and of the
    functions of its module, with their defaults and what they close over. What instances have is
    not looked at.
    """
    return _Comparison(one, other).of_names(_RUN_BY_A_CALL)


class _Comparison:
    def __init__(self, one, other):
        self._classes = one, other
        self._compared = set()

    def of_names(self, names):
        """Of attributes of the two classes."""
        return all(map(self._same_member, names))

    def _same_member(self, name):
        one, other = (getattr(kind, name, _MISSING) for kind in self._classes)
        if one is other and one is getattr(nn.Module, name, _MISSING):
            return True
        # One function in both may still call methods that differ.
        if isinstance(one, FunctionType) and isinstance(other, FunctionType):
            return self._same_function(one, other)
        return self._same(one, other)

    def _same(self, one, other):
        if one is other:
            return True
        if type(one) is not type(other):
            return False
        if isinstance(one, FunctionType):
            return self._same_function(one, other)
        if isinstance(one, MethodType | classmethod | staticmethod):
            return self._same(one.__func__, other.__func__)
        if isinstance(one, property):
            return self._same(one.fget, other.fget)
        if isinstance(one, logging.Logger):
            return True
        if isinstance(one, type):  # what super() starts from
            return (one, other) == self._classes and one.__bases__ == other.__bases__
        return _equal(one, other)

    def _same_function(self, one, other):
        if (one, other) in self._compared:
            return True
        self._compared.add((one, other))
        within = (map(_content, each.__closure__ or ()) for each in (one, other))
        return (
            _equal(one.__defaults__, other.__defaults__)
            and _equal(one.__kwdefaults__, other.__kwdefaults__)
            and self._same_code(one.__code__, other.__code__, one.__globals__, other.__globals__)
            and all(map(self._same, *within))
        )

    def _same_code(self, one, other, globals_of_one, globals_of_other):
        if _signature(one) != _signature(other):
            return False
        steps = list(dis.get_instructions(one)), list(dis.get_instructions(other))
        if len(steps[0]) != len(steps[1]):
            return False
        for step, twin in zip(*steps, strict=True):
            if step.opcode != twin.opcode:
                return False
            if isinstance(step.argval, CodeType) and isinstance(twin.argval, CodeType):
                found = self._same_code(step.argval, twin.argval, globals_of_one, globals_of_other)
            elif step.opname == "LOAD_GLOBAL":
                found = step.argval == twin.argval and self._same(
                    _global(globals_of_one, step.argval), _global(globals_of_other, twin.argval)
                )
            else:
                found = _equal(step.argval, twin.argval)
                # Names like __name__, which messages ask for, are each class's own.
                if found and step.opname in _OF_ITS_CLASS and not step.argval.startswith("__"):
                    found = self._same_member(step.argval)
            if not found:
                return False
        return True


def _signature(code):
    """The parameters by name and kind, and what is closed over."""
    count = code.co_argcount + code.co_kwonlyargcount
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount
    return code.co_varnames[:count], counts, code.co_flags, code.co_freevars


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return _MISSING


def _global(names, name):
    return names.get(name, getattr(builtins, name, _MISSING))


def _equal(one, other):
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:
        return False  # what cannot be compared is not equal
