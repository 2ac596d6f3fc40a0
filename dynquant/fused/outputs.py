"""Results of models of transformers, made without the checks of each field.

These take as long as a layer does where a text is short.
"""

from collections import OrderedDict
from dataclasses import fields
from functools import cache


@cache
def maker_of(kind):
    """What makes a ModelOutput of that class: `kind`, or something faster that does the same.

    It takes the fields by name, tensors or None.
    """
    try:
        names = tuple(field.name for field in fields(kind))
        wanted, made = kind(**{names[0]: 1.5}), _made(kind, names, {names[0]: 1.5})
        same = vars(made) == vars(wanted) and list(made.items()) == list(wanted.items())
    except Exception:  # one that is made in another way
        return kind
    return _Maker(kind, names) if same else kind


class _Maker:
    def __init__(self, kind, names):
        self._kind, self._names = kind, names

    def __call__(self, **given):
        return _made(self._kind, self._names, given)


def _made(kind, names, given):
    made = kind.__new__(kind)
    own = vars(made)
    for name in names:
        value = own[name] = given.get(name)
        if value is not None:
            OrderedDict.__setitem__(made, name, value)
    return made
