"""Instances get another class: one made for each class of modules, which keeps all that it is."""

from contextlib import contextmanager
from functools import wraps

_CLASSES = {}


class Swapped:
    """What comes before a class of modules, to run its forward as ops where that is possible.

    Attributes:
        _base: the class that the instance had.
        _kind: the class derived from this one.
        _settings: what else makes the class.
    """

    _NOT_KEPT = ("_parts",)  # derived from the rest

    def __reduce_ex__(self, protocol):
        # The class is made, and found under no name: a copy is told how.
        own = getattr(super(), "__getstate__", None)  # object has none before Python 3.11
        state = self.__dict__ if own is None else own()
        state = {key: value for key, value in state.items() if key not in self._NOT_KEPT}
        return _blank, (self._base, self._kind, self._settings), state

    def __prepare_scriptable__(self):
        raise RuntimeError(
            f"torch.jit.script cannot compile a fused {type(self).__name__}, which decides at each "
            "call what it runs: script the model before dynquant.fuse, or use torch.jit.trace or "
            "torch.export.export"
        )

    def extra_repr(self):
        return ", ".join(filter(None, (super().extra_repr(), "fused")))


class SwappedModel(Swapped):
    """One whose forward has the parameters of the one it had: callers of models read them.

    Classes of this kind have a method _called(base, args, kwargs) for a call, where base is the
    forward that there was.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "_base"):
            return  # a kind, not made for any class yet
        base = cls._base.forward

        @wraps(base)
        def forward(self, *args, **kwargs):
            return self._called(base, args, kwargs)

        cls.forward = forward


def swap_class(module, kind, *settings):
    """Gives the instance the class of `kind` that is made for its own."""
    unswap_class(module)
    module.__class__ = fused_class(type(module), kind, settings)


def unswap_class(module):
    """Gives an instance of a swapped class the one that it had."""
    if isinstance(module, Swapped):
        for key in module._NOT_KEPT:
            module.__dict__.pop(key, None)
        module.__class__ = type(module)._base


def base_of(module_type):
    """The class itself, or the one that a swapped class was made for."""
    return module_type._base if issubclass(module_type, Swapped) else module_type


@contextmanager
def unfused(model):
    """Within the block, every instance in the model has the class again that it had before."""
    fused = [(one, type(one)) for one in model.modules() if isinstance(one, Swapped)]
    try:
        for module, kind in fused:
            module.__class__ = base_of(kind)
        yield
    finally:
        for module, kind in fused:
            module.__class__ = kind


def fused_class(base, kind, settings):
    """The class of `kind` and these settings that is made for `base`: always the same one."""
    key = base, kind, settings
    if key not in _CLASSES:
        body = {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "_base": base,
            "_kind": kind,
            "_settings": settings,
        }
        _CLASSES[key] = type(base.__name__, (kind, base), body)
    return _CLASSES[key]


def _blank(base, kind, settings):
    made = fused_class(base, kind, settings)
    return made.__new__(made)
