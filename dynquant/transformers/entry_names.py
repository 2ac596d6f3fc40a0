"""Entries of quantized modules in a checkpoint of transformers keep the names of their modules.

transformers renames, joins and splits the parameters of many models while it loads them, and does
the reverse while it saves them: q_proj, k_proj and v_proj are one qkv_proj in the file, the rows of
a weight come in another order. That is right for float parameters, and wrong for a scale, a
version, or a weight of which no converter knows that it is quantized. So the names of these entries
are hidden behind marks, which no pattern fits, for as long as the conversions are applied.
"""

import re

from transformers.core_model_loading import WeightConverter, WeightRenaming

_NOTHING = "(?!)"  # a pattern that fits no name
_MARK = re.compile("\0([0-9]+)\0")


class _Change:
    """A step that changes names by a function and no tensor. It is its own reverse."""

    def rename_source_key(self, source_key):
        return self.change(source_key), None

    def reverse_transform(self):
        return self


class _Renaming(_Change, WeightRenaming):
    def __init__(self, change):
        super().__init__(_NOTHING, _NOTHING)
        self.change = change


class _Converter(_Change, WeightConverter):
    def __init__(self, change):
        super().__init__(_NOTHING, _NOTHING, [None])  # an operation that is never called
        self.change = change


class _Names:
    """The names to hide; and for each what is shown again in its place."""

    def __init__(self, shown):
        self._shown = list(shown.values())
        self._places = {name: place for place, name in enumerate(shown)}

    def hide(self, name):
        return f"\0{self._places[name]}\0" if name in self._places else name

    def show(self, name):
        mark = _MARK.search(name)  # a prefix may have been added to it
        return self._shown[int(mark[1])] if mark else name


class FloatNames(WeightRenaming):
    """Integers come under the float weight's name, as version 1 of the state dict had them.

    So a float layer finds those that it cannot take.
    """

    def __init__(self):
        super().__init__(source_patterns=r"^(.+)_u?int8$", target_patterns=r"\1")


def while_loading(conversions, names, prefix):
    """The conversions of a model, around which `names` are kept.

    Args:
        conversions: those of transformers, in its order: it applies the renamings, then at most one
            converter.
        names: of the entries of quantized modules, with integers under the float weight's name.
        prefix: the model's base_model_prefix, which transformers adds or removes afterwards.
    """
    shown = {}
    for name in names:
        for one in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            shown.update({one: one, f"{one}_int8": one, f"{one}_uint8": one})
    return renamed_while_loading([*conversions, FloatNames()], shown)


def renamed_while_loading(conversions, shown):
    """The conversions of a model, which the keys of `shown` pass by, to become its values."""
    own = _Names(shown)
    return [_Renaming(own.hide), *conversions, _Converter(own.show)]


def while_saving(conversions, names):
    """The conversions that transformers will reverse, last to first, around which `names` are kept.

    Args:
        conversions: those that the model was loaded with, also with what while_loading added.
        names: of the entries of quantized modules, as the state dict has them.
    """
    theirs = [one for one in conversions if not isinstance(one, (_Change, FloatNames))]
    own = _Names({name: name for name in names})
    # A name that no converter fits is renamed from the beginning: it is hidden from both.
    return [_Renaming(own.show), *theirs, _Renaming(own.hide), _Converter(own.hide)]
