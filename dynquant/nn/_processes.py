"""How modules with packed weights go to other processes of this machine."""

from multiprocessing.reduction import ForkingPickler


def share_between_processes(cls):
    """Makes multiprocessing send modules of exactly this type with their packed weights, shared.

    torch sends a tensor as a handle of its memory, which must live until the other process has
    taken it. The plain weight that __getstate__ unpacks would be gone by then.
    """
    ForkingPickler.register(cls, _reduced)


def _reduced(module):
    return _rebuilt, (type(module), module.__dict__)


def _rebuilt(cls, state):
    module = cls.__new__(cls)
    module.__dict__.update(state)
    return module
