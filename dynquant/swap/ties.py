"""Weights that several modules share: what quantization parts, and what dequantizing ties again."""

from dynquant.nn._formats import Float, are_alike
from dynquant.nn._module import QuantizedModule

# Attributes of modules, for the time in which something is quantized.
_PARTED = "_parted_ties"  # what stood where keep_ties has put something; None: the class's own
_SHARED = "_shared_names"  # what remember_shared was given


def part_from_quantized(model):
    """Makes transformers forget the ties to weights of quantized modules.

    A model of transformers names its ties in _tied_weights_keys and all_tied_weights_keys, {target:
    source}; tie_weights() would look for the source among parameters and buffers, and not find it.
    Both sides have what they need: a target keeps the weight that it has, quantized or float.
    """
    for module in model.modules():
        for key in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, key, None)
            if not isinstance(ties, dict):
                continue
            kept = {
                target: source
                for target, source in ties.items()
                if not isinstance(_owner(module, source), QuantizedModule)
            }
            if len(kept) < len(ties):
                keep_ties(module, key, kept)


def keep_ties(module, key, kept):
    """Puts the ties `kept` in the place of what the attribute `key` has, until all are tied again.

    key: "_tied_weights_keys", which may be an attribute of the class, or "all_tied_weights_keys".
    """
    module.__dict__.setdefault(_PARTED, {}).setdefault(key, vars(module).get(key))
    setattr(module, key, kept)


def shared_names(model, swapped):
    """The names of each parameter that has several, and of which a module is to be swapped.

    Args:
        swapped: modules of the model.
    """
    own = {id(one) for module in swapped for one in module.parameters()}
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own:
            names.setdefault(id(parameter), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def remember_shared(model, names):
    """Leaves on the model what shared_names has found, beside what is there."""
    if names:
        model.__dict__[_SHARED] = [*vars(model).get(_SHARED, ()), *names]


def shared_groups(model):
    """The names that remember_shared was given within `model`, by which it has the weights."""
    for prefix, module in model.named_modules():
        outer = f"{prefix}." if prefix else ""
        for names in vars(module).get(_SHARED, ()):
            yield [outer + name for name in names]


class Shared:
    """The weights of a model, partly quantized, that were shared in float: groups of their names.

    Left out are those that cannot be forms of one float weight any more, and parts of weights.
    """

    def __init__(self, model):
        self._model = model
        found = map(self._alike, shared_groups(model))
        self.groups = [alike for alike in found if len(alike) > 1]

    def _alike(self, names):
        weights = {name: held for name in names if (held := self._weight(name)) is not None}
        # What is in float is exact.
        names = sorted(weights, key=lambda name: not isinstance(weights[name][0], Float))
        first = names[:1]
        return first + [name for name in names[1:] if are_alike(*weights[first[0]], *weights[name])]

    def _weight(self, name):
        """The format and what it holds, or None for what is no matrix of its own."""
        owner, key = _owner(self._model, name), name.rpartition(".")[2]
        if isinstance(owner, QuantizedModule) and key in owner._formats:
            return owner._formats[key], owner._held(key)
        parameter = None if owner is None else owner._parameters.get(key)
        if parameter is None or parameter.dim() != 2:
            return None
        return Float(key, parameter, None), (parameter,)

    def tie(self, model):
        """Ties the parameters of `model` that have these names, and says so to transformers."""
        for first, *others in self.groups:
            shared = model.get_parameter(first)
            for name in others:
                setattr(_owner(model, name), name.rpartition(".")[2], shared)
        for module in model.modules():
            for key, ties in module.__dict__.pop(_PARTED, {}).items():
                if ties is None:
                    delattr(module, key)
                else:
                    setattr(module, key, ties)
            module.__dict__.pop(_SHARED, None)


def _owner(module, name):
    """The submodule that has the parameter, or None, as where the name is a pattern."""
    try:
        return module.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None
