"""Which registered class a block is of: its own, or one whose code it runs."""

import importlib
import os
import sys

from torch import nn

from dynquant.fused.adapters import Adapter, name_of, registered
from dynquant.fused.alike import runs_the_same
from dynquant.fused.classes import base_of
from dynquant.fused.places import part_of

# They do nothing in eval mode, or what the same code can only look up.
_PASSED_OVER = (nn.Dropout, nn.Identity, nn.Embedding)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_MISSING = object()


def known_as(block: nn.Module) -> str | None:
    """The full name of the class under which an adapter is registered for a block, or None."""
    kind = base_of(type(block))
    adapters, own = registered(), name_of(kind)
    if own in adapters:
        return own
    if not block._modules or kind.__module__.startswith("torch.nn."):
        return None
    alike = (name for name, adapter in adapters.items() if _is_alike(block, kind, name, adapter))
    return next(alike, None)


def stranger_in(block: nn.Module, adapter: Adapter) -> str:
    """Why a module between the block and its parts may do what its adapter does not say, or "".

    A few tokens do not show all that it does, a window that it attends within, say. So it has to be
    of transformers as the block is, or of a class that is known itself. Who registers a block of
    another library knows what is in it.
    """
    if not _is_of_transformers(base_of(type(block))):
        return ""
    for path in _between(adapter):
        module = part_of(block, path)
        kind = base_of(type(module))
        if not isinstance(module, nn.Module) or kind in _CONTAINERS or _is_of_transformers(kind):
            continue
        if known_as(module) is None:
            return f"{path} is of class {name_of(kind)}; register an adapter for it if it is known"
    return ""


def _between(adapter):
    """The names of the modules inside a block that hold what an adapter names."""
    found = {holder for name in adapter.names() for holder in _holders_of(name)}
    core = adapter.attention.core if adapter.attention is not None else ""
    return sorted((found | {core, *_holders_of(core)}) - {""})


def _holders_of(name):
    steps = name.split(".")
    return [".".join(steps[:end]) for end in range(1, len(steps))]


def _is_of_transformers(kind):
    return kind.__module__.partition(".")[0] == "transformers"


def _is_alike(block, kind, name, adapter):
    """Whether the block runs the code of the class `name`, and what it calls does as well."""
    parts = {path: part_of(block, path, _MISSING) for path in adapter.names()}
    if adapter.family != "transformers" or _MISSING in parts.values():
        return False
    known = _class_of(name)
    if known is None or not runs_the_same(kind, known):
        return False
    return adapter.inline or _has_alike_inside(block, kind, known, adapter, parts)


def _has_alike_inside(block, kind, known, adapter, parts):
    """The same of the modules inside it, but for those that the adapter names.

    These are looked at where the block is fused.
    """
    core = adapter.attention and adapter.attention.core
    named = {path for path, part in parts.items() if isinstance(part, nn.Module) and path != core}
    holders = {path.rpartition(".")[0] for path in named}
    for path, module in block.named_modules():
        if path == "" or type(module) in _PASSED_OVER or _is_within(path, named):
            continue
        if not module._modules and path.rpartition(".")[0] not in holders:
            continue  # a leaf of a module that has a twin itself
        if not _has_twin(module, kind, known):
            return False
    return True


def _is_within(path, named):
    return any(path == name or path.startswith(f"{name}.") for name in named)


def _has_twin(module, kind, known):
    """Whether the library of `known` has a class for it that runs the same.

    Copies are renamed by the name of their model: what BertLayer is to BertSelfAttention, EsmLayer
    is to EsmSelfAttention.
    """
    own = base_of(type(module))
    if own.__module__ != kind.__module__:
        twin = own.__name__
    else:
        end = len(os.path.commonprefix([kind.__name__[::-1], known.__name__[::-1]]))
        prefix, other = (name[: len(name) - end] for name in (kind.__name__, known.__name__))
        if not own.__name__.startswith(prefix):
            return False
        twin = other + own.__name__.removeprefix(prefix)
    found = getattr(sys.modules[known.__module__], twin, None)
    return isinstance(found, type) and runs_the_same(own, found)


def _class_of(name):
    """The class of a full name, where its library is in use; None where there is none."""
    module, _, own = name.rpartition(".")
    if module.partition(".")[0] not in sys.modules:
        return None
    try:
        return getattr(importlib.import_module(module), own, None)
    except ImportError:
        return None
