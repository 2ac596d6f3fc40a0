"""Which modules of a model are swapped for what: everything is checked before anything changes."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from dynquant import nn as quantized
from dynquant.qconfig import DTYPES, QConfig, one_of, parse_qconfig
from dynquant.spec import Match, Spec, describe
from dynquant.stubs import DeQuantStub, QuantStub

# The quantized forms of each float type, of which the config's dtype chooses one; None for a type
# that has none although its base type has.
_FORMS = {
    nn.Linear: (quantized.Linear, quantized.HalfLinear),
    nn.Embedding: quantized.Embedding,
    nn.EmbeddingBag: quantized.EmbeddingBag,
    NonDynamicallyQuantizableLinear: None,  # nn.MultiheadAttention computes with its weight
    QuantStub: quantized.Quantize,
    DeQuantStub: quantized.DeQuantize,
}
_STUBS = (QuantStub, DeQuantStub)
_RECURRENT = (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_NOT_AVAILABLE = _RECURRENT
_RECURRENT_DTYPES = (torch.qint8, torch.float16, torch.bfloat16)


@dataclass
class Item:
    """One swap: `module`, found as `name` and in `places`, gives way to its quantized form.

    places: each (parent module, key in its _modules); none for the model itself.
    tie: equal for items whose forms can share a packed weight.
    """

    name: str
    module: nn.Module
    form: type
    qconfig: QConfig
    places: list
    tie: tuple


class Forms:
    """The quantized form of every float type, those of the user's `mapping` first."""

    def __init__(self, mapping):
        mapping = {} if mapping is None else mapping
        if not isinstance(mapping, Mapping):
            raise TypeError(f"mapping is {mapping!r}; expected a dict from float types to classes")
        for base, form in mapping.items():
            if not (isinstance(base, type) and issubclass(base, nn.Module)):
                raise TypeError(f"mapping has the key {base!r}; expected a type of nn.Module")
            if not callable(getattr(form, "from_float", None)):
                raise TypeError(
                    f"mapping[{describe(base)}] is {form!r}; expected a class with from_float"
                )
        self._forms = {**_FORMS, **mapping}
        self._quantized = tuple({form for forms in self._forms.values() for form in _each(forms)})

    def of(self, module_type):
        """The nearest base type that has an entry, and its forms: (None, ()) without one."""
        base = next((base for base in module_type.__mro__ if base in self._forms), None)
        return base, _each(self._forms.get(base))

    def is_quantized(self, module_type):
        return issubclass(module_type, self._quantized)

    def has_any(self, module_type):
        """Whether the type, or one that derives from it, has a quantized form or is one."""
        return (
            bool(self.of(module_type)[1])
            or self.is_quantized(module_type)
            or any(issubclass(base, module_type) for base, form in self._forms.items() if form)
        )

    def default_types(self, dtype):
        """What is quantized where nothing but a dtype is asked for."""
        types = [base for base in self._forms if self._has_default(base, dtype)]
        return types + list(_RECURRENT if dtype in _RECURRENT_DTYPES else ())

    def _has_default(self, base, dtype):
        forms = _each(self._forms[base])
        return base not in _STUBS and (not forms or _for_dtype(forms, dtype) is not None)


def _each(forms):
    """The entry of a type as a tuple."""
    if forms is None:
        return ()
    return forms if isinstance(forms, tuple) else (forms,)


def _for_dtype(forms, dtype):
    """That of the forms that serves the dtype, or None. One without DTYPES serves them all."""
    return next((form for form in forms if dtype in getattr(form, "DTYPES", (dtype,))), None)


def _check_dtype(forms, dtype, subject):
    """Raises ValueError where none of the forms serves the dtype."""
    if forms and _for_dtype(forms, dtype) is None:
        one_of(f"{subject}: dtype", dtype, [one for form in forms for one in form.DTYPES])


class Plan:
    """The items to swap, and the warnings about what was asked for and stays as it is.

    Args:
        modules: those of the model, a dict by name.
        match: gives for a name the Match that tells the module's config, or None.
        forms: a Forms.
    """

    def __init__(self, modules, match, forms):
        self.items = []
        self.warnings = []
        left, not_available = [], []
        places = _places(modules)
        asked = {}  # by id(module): its first name and config
        outer = None
        for name, module in modules.items():
            if outer is not None and (outer == "" or name.startswith(f"{outer}.")):
                continue
            base, candidates = forms.of(type(module))
            found = match(name) or (Match(QConfig(), False) if base in _STUBS else None)
            if found is None or found.qconfig is None and not candidates:
                continue
            if not candidates:
                if found.by_name and isinstance(module, _NOT_AVAILABLE):
                    raise NotImplementedError(f"{_titled(name, module)} cannot be quantized yet")
                if isinstance(module, _RECURRENT) and found.qconfig.dtype in _RECURRENT_DTYPES:
                    not_available.append(_titled(name, module))
                continue
            first, qconfig = asked.setdefault(id(module), (name, found.qconfig))
            if qconfig != found.qconfig:
                raise ValueError(f"{first!r} and {name!r} are one module, asked for differently")
            if first != name or qconfig is None:
                continue
            form = _for_dtype(candidates, qconfig.dtype)
            if form is None:  # a name or type that covers it asks for a dtype of other modules
                if found.by_name:
                    _check_dtype(candidates, qconfig.dtype, _titled(name, module))
                continue
            obstacle = _obstacle(module, base)
            if obstacle:
                left.append(f"{_titled(name, module)} {obstacle}")
                continue
            if hasattr(form, "check_float"):
                form.check_float(module, qconfig, name)
            weight = module._parameters.get("weight", module)
            tie = (id(weight), form, qconfig.weight, qconfig.dtype)
            self.items.append(Item(name, module, form, qconfig, places[id(module)], tie))
            outer = name
        self._warn("left in float", left)
        self._warn("not available yet, left in float", not_available)

    def _warn(self, what, subjects):
        if subjects:
            self.warnings.append(f"{what}: {'; '.join(subjects)}")

    def warn_of_requests_without_form(self, modules, spec, forms):
        """Adds the warning that names the types and names that cover nothing to quantize."""

        def idle(covering, dtype):
            return not any(
                isinstance(module, _NOT_AVAILABLE)
                or forms.is_quantized(type(module))
                or _for_dtype(forms.of(type(module))[1], dtype) is not None
                for outer in covering
                for module in outer.modules()
            )

        subjects = []
        for base, qconfig in spec.types.items():
            instances = [module for module in modules.values() if isinstance(module, base)]
            if qconfig is not None and not forms.has_any(base) and idle(instances, qconfig.dtype):
                subjects.append(describe(base))
        for name, qconfig in spec.names.items():
            if qconfig is not None and idle([modules[name]], qconfig.dtype):
                subjects.append(_titled(name, modules[name]))
        self._warn("no quantized form, left as it is", subjects)


def plan_from_spec(model, qconfig_spec, dtype, mapping, inplace, qconfig):
    """The Plan that the arguments of quantize_dynamic ask for."""
    argument = "qconfig_spec" if qconfig is None else "qconfig"
    if qconfig is not None:
        if qconfig_spec is not None:
            raise TypeError("qconfig is another name of qconfig_spec: pass one of them")
        qconfig_spec = qconfig
    modules = _modules(model, inplace)
    one_of("dtype", dtype, DTYPES)
    forms = Forms(mapping)
    if qconfig_spec is None:
        spec = Spec(forms.default_types(dtype), dtype)
        return Plan(modules, lambda name: spec.match(name, modules), forms)
    spec = Spec(qconfig_spec, dtype, argument)
    spec.check_names(modules)
    for base, config in spec.types.items():
        if config is None:
            continue
        if issubclass(base, _NOT_AVAILABLE) and not forms.has_any(base):
            raise NotImplementedError(f"{argument}: {describe(base)} cannot be quantized yet")
        _check_dtype(forms.of(base)[1], config.dtype, f"{argument}[{describe(base)}]")
    plan = Plan(modules, lambda name: spec.match(name, modules), forms)
    plan.warn_of_requests_without_form(modules, spec, forms)
    return plan


def plan_from_attributes(model, mapping, inplace):
    """The Plan of swapping stubs and the modules that have a `qconfig` of their own.

    Raises:
        ValueError: when there is nothing to swap, and nothing swapped already.
    """
    modules = _modules(model, inplace)
    forms = Forms(mapping)

    def match(name):
        module = modules[name]
        if isinstance(module, _STUBS) or not hasattr(module, "qconfig"):
            return None
        config = module.qconfig
        if config is not None and forms.of(type(module))[1]:
            config = parse_qconfig(config, name=f"{name or 'model'}.qconfig")
            _check_dtype(forms.of(type(module))[1], config.dtype, f"{name or 'model'}.qconfig")
        return Match(config, False)

    plan = Plan(modules, match, forms)
    if not plan.items and not any(forms.is_quantized(type(module)) for module in modules.values()):
        raise ValueError("the model has nothing to convert; call dynquant.prepare first")
    return plan


def _modules(model, inplace):
    """All modules by name, one that has several names under each of them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; expected an nn.Module")
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace is {inplace!r}; expected a bool")
    return dict(model.named_modules(remove_duplicate=False))


def _places(modules):
    """By id(module): each (parent module, key in its _modules)."""
    places = defaultdict(list)
    for parent in modules.values():
        for key, child in parent._modules.items():
            places[id(child)].append((parent, key))
    return places


def _obstacle(module, base):
    """Why a module of a type with a quantized form has none itself, or None."""
    if "forward" in vars(module) or type(module).forward is not base.forward:
        return f"has a forward other than {base.__name__}'s"
    has_weight = "weight" in module._parameters or is_parametrized(module, "weight")
    if issubclass(base, nn.Linear) and not has_weight:
        return "has a weight that a hook computes, as weight_norm's does: remove that first"
    return None


def _titled(name, module):
    return f"{name or 'the model'} ({type(module).__name__})"
