"""Type hints: every function, method and property that users call has them."""

import functools
import importlib
import inspect
from pathlib import Path

import pytest

import dynquant
import dynquant.compat
import dynquant.fused

# Each with the library that it needs, which is none of dynquant's own.
INTEGRATIONS = {
    "dynquant.compat": "torch",
    "dynquant.parallel": "torch.distributed.tensor",
    "dynquant.torchao": "torchao",
    "dynquant.transformers": "transformers",
}


CALLED_BY_OTHERS = {"dynquant.transformers.DynquantQuantizer"}  # whose base class has no hints


def public(module):
    names = getattr(module, "__all__", None)
    names = names or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    found = {f"{module.__name__}.{name}": getattr(module, name) for name in names}
    return {name: value for name, value in found.items() if name not in CALLED_BY_OTHERS}


def functions(name, value):
    """The functions of a public object, by name: its own, not those that torch's classes have."""
    if inspect.isfunction(value):
        yield name, value
    if not inspect.isclass(value):
        return
    for base in value.__mro__:
        if not base.__module__.startswith("dynquant"):
            continue
        for key, member in vars(base).items():
            if key.startswith("_") and key != "__init__":
                continue
            if isinstance(member, property | functools.cached_property):
                member = getattr(member, "fget", None) or member.func
            member = getattr(member, "__func__", member)  # of class methods and static ones
            if inspect.isfunction(member) and not is_made_by_dataclass(base, key):
                yield f"{base.__module__}.{base.__qualname__}.{key}", member


def is_made_by_dataclass(base, key):
    return key == "__init__" and hasattr(base, "__dataclass_fields__")


def without_hint(function):
    signature = inspect.signature(function)
    named = function.__qualname__.count(".") and list(signature.parameters)[:1]
    bound = named if named in (["self"], ["cls"]) else []
    missing = [
        name
        for name, parameter in signature.parameters.items()
        if name not in bound and parameter.annotation is parameter.empty
    ]
    is_init = function.__name__ == "__init__"
    if signature.return_annotation is signature.empty and not is_init:
        missing.append("its result")
    return missing


def complaints(module):
    found = {}
    for name, value in public(module).items():
        found |= {key: without_hint(one) for key, one in functions(name, value)}
    assert found
    return {name: missing for name, missing in found.items() if missing}


@pytest.mark.parametrize(
    "module", [dynquant, dynquant.nn, dynquant.fused], ids=lambda one: one.__name__
)
def test_of_the_package(module):
    assert complaints(module) == {}


@pytest.mark.parametrize(("module", "library"), INTEGRATIONS.items())
def test_of_integrations(module, library):
    pytest.importorskip(library)
    assert complaints(importlib.import_module(module)) == {}


def test_the_package_says_so():
    assert (Path(dynquant.__file__).parent / "py.typed").exists()
