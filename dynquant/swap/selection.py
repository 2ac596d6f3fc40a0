"""Which modules a qconfig_spec asks for, and with which config."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

from dynquant.nn.experts import FloatExperts, is_experts
from dynquant.qconfig import QConfig, parse_qconfig
from dynquant.stubs import QuantStub


class Match(NamedTuple):
    """What a spec says about one module.

    qconfig: a QConfig, or None: the module stays in float.
    by_name: whether an entry names this very module.
    is_asked: whether some entry with a config is for this very module, by its name, a pattern for
        that or its type, and not for all that lies within another.
    """

    qconfig: QConfig | None
    by_name: bool
    is_asked: bool = False


class Spec:
    """A qconfig_spec, checked.

    Args:
        qconfig_spec: a set or list of module types, names and patterns, or a dict from those to
            configs or None.
        dtype: what holds for configs that name no dtype.
        argument: what messages call qconfig_spec.
        relatives: types of modules made of linear layers: an entry for nn.Linear covers them,
            after those for the types that they derive from, nn.Module excepted.

    Raises:
        TypeError: for another type of qconfig_spec, key or config.
        ValueError: for a config that contradicts itself or names what does not exist.
    """

    def __init__(self, qconfig_spec, dtype, argument="qconfig_spec", relatives=()):
        self._relatives = tuple(relatives)
        if not isinstance(qconfig_spec, Mapping):
            if not isinstance(qconfig_spec, (set, frozenset, list, tuple)):
                raise TypeError(
                    f"{argument} is {qconfig_spec!r}; expected None, a set or list of module types "
                    "and names, or a dict from those to configs"
                )
            qconfig_spec = dict.fromkeys(qconfig_spec, QConfig(dtype=dtype))
        self.types, self.names, self.patterns = {}, {}, {}
        for key, config in qconfig_spec.items():
            qconfig = _parse(config, dtype, f"{argument}[{describe(key)}]")
            if isinstance(key, type) and issubclass(key, nn.Module):
                self.types[key] = qconfig
            elif isinstance(key, str):
                (self.patterns if "*" in key else self.names)[key] = qconfig
            else:
                raise TypeError(
                    f"{argument} has the key {key!r}; expected a type of nn.Module or a module name"
                )

    def check_names(self, modules, products):
        """Raises ValueError for a name that is not in `modules`, a dict by name, and for a pattern
        that fits none of those nor of `products`, a set of names.
        """
        check_names(self.names, modules)
        for pattern in self.patterns:
            if not any(fits(pattern, name) for name in (*modules, *products)):
                raise ValueError(f"the model has no module whose name fits {pattern!r}")

    def match_product(self, name):
        """The Match of the entry that speaks of the product `name` itself; None where that is one
        for its module, or there is none.
        """
        if name in self.names:
            return Match(self.names[name], True)
        lineage = lineage_of(name)
        if any(covering in self.names for covering in lineage):
            return None
        best = self._best_pattern(lineage)
        if best is None or any(fits(best, covering) for covering in lineage[1:]):
            return None
        return Match(self.patterns[best], False)

    def match(self, name, modules):
        """The Match of the most specific entry, or None where no entry covers the module.

        The order is: exact name, longest parent name, pattern (that with most letters, the last
        of equals), exact type, base type, and the types of the parents from the nearest. Patterns
        and types cover submodules as names do.

        Args:
            name: of the module.
            modules: those of the model, a dict by name.
        """
        lineage = lineage_of(name)
        is_asked = self._asks(name, modules)
        for covering in lineage:
            if covering in self.names:
                return Match(self.names[covering], covering == name, is_asked)
        best = self._best_pattern(lineage)
        if best is not None:
            return Match(self.patterns[best], False, is_asked)
        for covering in lineage:
            for base in self._bases(type(modules[covering])):
                if base in self.types:
                    return Match(self.types[base], False, is_asked)
        return None

    def _asks(self, name, modules):
        """Whether an entry with a config is for the module `name` itself."""
        bases = set(self._bases(type(modules[name]))) - {nn.Module}
        entries = (
            self.names.get(name),
            *(qconfig for pattern, qconfig in self.patterns.items() if _is_for(pattern, name)),
            *(self.types.get(base) for base in bases),
        )
        return any(qconfig is not None for qconfig in entries)

    def _best_pattern(self, lineage):
        """The pattern with most letters, the last of equals, that fits one of the names."""
        fitting = [
            pattern
            for pattern in self.patterns
            if any(fits(pattern, covering) for covering in lineage)
        ]
        letters = {pattern: len(pattern.replace("*", "")) for pattern in fitting}
        return max(reversed(fitting), key=letters.get, default=None)

    def _bases(self, module_type):
        bases = bases_of(module_type)
        if nn.Linear in bases or not set(bases).intersection(self._relatives):
            return bases
        last = bases.index(nn.Module)
        return (*bases[:last], nn.Linear, *bases[last:])


def bases_of(module_type):
    """The type and its bases, from the nearest, as tables of types know them."""
    bases = module_type.__mro__
    if not any(is_experts(base) for base in bases):
        return bases
    last = bases.index(nn.Module)
    return (*bases[:last], FloatExperts, *bases[last:])


def check_names(names, modules):
    """Raises ValueError for a name that is not in `modules`, a dict by name."""
    for name in names:
        if name not in modules:
            raise ValueError(f"the model has no module named {name!r}{did_you_mean(name, modules)}")


def did_you_mean(name, names):
    """The end of a message about a name that is not one of `names`."""
    close = get_close_matches(name, names)
    # Of a long name, people often give the last part.
    close = close or [one for one in names if one.rpartition(".")[2] == name][:3]
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""


def describe(key):
    """How messages write a key of a spec."""
    return key.__name__ if isinstance(key, type) else repr(key)


def _parse(config, dtype, name):
    if config is None:
        return None
    return QConfig(dtype=dtype) if config is QuantStub else parse_qconfig(config, dtype, name)


def lineage_of(name):
    """The name, its parents from the nearest, and '' for the model itself."""
    parts = name.split(".") if name else []
    return [".".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _is_for(pattern, name):
    """Whether a pattern fits a name, and its last part that of the name, which is not any."""
    last = pattern.rpartition(".")[2]
    return bool(last.strip("*")) and fits(pattern, name) and fits(last, name.rpartition(".")[2])


def fits(pattern, name):
    """Whether a pattern, in which `*` stands for anything, fits a whole name."""
    return re.fullmatch(".*".join(map(re.escape, pattern.split("*"))), name) is not None
