"""A model that is changed as a whole or not at all."""

from contextlib import contextmanager

from torch import nn

_CONTAINERS = (list, dict)


@contextmanager
def all_or_nothing(model):
    """An exception within the block, an interrupt included, leaves the model as it was before it.

    That is the class and the attributes of every module, its submodules, parameters, buffers and
    hooks, and what lists and dicts among the attributes hold; and the config that a model of
    transformers is saved with. The values of tensors are not looked at.

    Args:
        model: for anything but a module, which the block has yet to check, nothing is done.
    """
    kept = [_Kept(thing) for thing in _things(model)]
    try:
        yield
    except BaseException:
        _restore(kept)
        raise


def _things(model):
    """The objects with attributes that quantization may change."""
    things = {}
    for module in model.modules() if isinstance(model, nn.Module) else ():
        things[id(module)] = module
        if hasattr(type(module), "config_class"):  # a model of transformers
            config = module.config
            things[id(config)] = config
            held = getattr(config, "quantization_config", None)
            if hasattr(held, "__dict__"):
                things[id(held)] = held
    return things.values()


class _Kept:
    """What an object is before it is changed."""

    def __init__(self, thing):
        self._thing = thing
        self._class = type(thing)
        self._attributes = vars(thing).copy()
        self._containers = {}  # by id: the container, and what it holds
        self._keep_containers(self._attributes.values())

    def _keep_containers(self, values):
        for value in values:
            if isinstance(value, _CONTAINERS) and id(value) not in self._containers:
                self._containers[id(value)] = value, value.copy()
                self._keep_containers(value.values() if isinstance(value, dict) else value)
            elif isinstance(value, tuple):
                self._keep_containers(value)

    def restore(self):
        if type(self._thing) is not self._class:
            self._thing.__class__ = self._class
        _refill(vars(self._thing), self._attributes)
        for container, held in self._containers.values():
            _refill(container, held)


def _refill(container, held):
    container.clear()
    (container.update if isinstance(container, dict) else container.extend)(held)


def _restore(kept):
    try:
        for one in kept:
            one.restore()
    except KeyboardInterrupt:  # pressed once more: what was restored is restored again
        _restore(kept)
